"""A config read in a process of its own is the one read here, and the worker stays without transformers."""

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from engine.models import config_process
from engine.models.config_process import Reading
from engine.models.llama_config import ModelConfig, NotOurs
from engine.text.tokenizer import read_json
from tests.engine.test_model import YARN
from tests.strategies.tiny_model import write_tiny_model

BUILD = """
import json, sys
import msgspec
from pathlib import Path
from engine.build import build, unobserved
from engine.config import WorkerConfig

folder = Path(sys.argv[1])
config = WorkerConfig(
    model_dir=folder, socket_path=folder / "s", journal_dir=folder, num_blocks=8, num_threads=1, dtype="float32"
)
core, ready = build(config, unobserved)
modules = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps([ready.isolation, modules, msgspec.json.encode(core._runner.model.config).decode()]))
"""


def test_a_worker_of_the_own_decoder_has_no_transformers_and_the_same_numbers(tmp_path: Path) -> None:
    """To the last bit: yarn's angles are not round."""
    write_tiny_model(tmp_path / "model", rope_parameters=YARN)
    command = [sys.executable, "-c", BUILD, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    isolation, modules, config = json.loads(done.stdout.splitlines()[-1])
    assert isolation == "bitwise"
    assert not {"transformers", "sympy", "triton"} & set(modules)
    here = ModelConfig.from_json(read_json(tmp_path / "model" / "config.json"))
    assert msgspec.json.decode(config, type=ModelConfig) == here
    assert here.rope.factor != 1.0


def test_what_it_cannot_read_is_read_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_process, "HEAVY", "a module that nobody has")  # as in a worker that has just begun
    write_tiny_model(tmp_path / "model")
    config = read_json(tmp_path / "model" / "config.json")
    for program in ("/nonexistent", "/bin/false", "/bin/echo"):  # none; one that fails; one that says something else
        monkeypatch.setattr(sys, "executable", program)
        assert Reading.begin(tmp_path / "model").result(config) == ModelConfig.from_json(config)
    with pytest.raises(NotOurs):
        Reading.begin(tmp_path / "model").result(config | {"architectures": ["OtherForCausalLM"]})
