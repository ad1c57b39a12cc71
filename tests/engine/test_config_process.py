"""What transformers' classes say in a process of its own is what they say here, and the worker stays without them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from transformers import CONFIG_MAPPING

from engine.models import config_process, llama_config
from engine.models.config_process import Values, told
from engine.models.llama_config import ARCHITECTURES, READ, ModelConfig, read_config
from engine.text.tokenizer import read_json
from tests.engine.test_model import FAMILY, YARN
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
print(json.dumps([ready.isolation, sorted(sys.modules), msgspec.json.encode(core._runner.model.config).decode()]))
"""


@pytest.mark.parametrize("name", FAMILY)
def test_values_that_travelled_make_the_same_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_model(tmp_path / "model", **FAMILY[name])
    config = read_json(tmp_path / "model" / "config.json")
    here = ModelConfig.from_json(config)

    def travelled(model_type: str, rest: dict[str, Any], names: frozenset[str]) -> Values:
        found = json.loads(told(CONFIG_MAPPING[model_type](**rest), names))
        return Values(**found["values"], declared=frozenset(found["declared"]))

    monkeypatch.setattr(llama_config, "read_apart", travelled)
    assert ModelConfig.from_json(config) == here


@pytest.mark.parametrize("rope", [{}, {"rope_parameters": YARN}], ids=["plain", "yarn"])
def test_a_worker_of_the_own_decoder_has_nothing_heavy_and_the_same_numbers(
    rope: dict[str, Any], tmp_path: Path
) -> None:
    """To the last bit: yarn's angles are not round."""
    write_tiny_model(tmp_path / "model", **rope)
    command = [sys.executable, "-c", BUILD, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    isolation, modules, config = json.loads(done.stdout.splitlines()[-1])
    assert isolation == "bitwise"
    assert not {config_process.HEAVY, "sympy", "triton", "torch._dynamo"} & set(modules)
    assert ("transformers" in modules) is bool(rope), "whose functions know stretched angles"
    here = ModelConfig.from_json(read_json(tmp_path / "model" / "config.json"))
    assert msgspec.json.decode(config, type=ModelConfig) == here


def test_what_the_other_process_cannot_read_is_read_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_process, "HEAVY", "a module that nobody has")  # as in a worker that has just begun
    for program in ("/nonexistent", "/bin/false", "/bin/echo"):  # none; one that fails; one that says something else
        monkeypatch.setattr(sys, "executable", program)
        assert config_process.read_apart("llama", {}, READ) is None
        assert type(read_config("llama", {})) is CONFIG_MAPPING["llama"]
    assert set(ARCHITECTURES.values()) <= set(CONFIG_MAPPING)
