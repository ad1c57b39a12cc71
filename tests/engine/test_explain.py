"""What `bulkhead worker --explain` says is what a worker with the same config says of itself."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.build import build, unobserved
from engine.config import WorkerConfig
from engine.errors import ConfigError
from engine.explain import explain, main
from kernels.backend import Backend
from kernels.cpu.backend import NativeBackend
from kernels.explain import NOT_OPS
from kernels.gpu.launch import is_interpreted
from kernels.gpu.launch_table import attention_shape
from tests.kernels.native import isas
from tests.strategies.tiny_model import write_tiny_model

ROOT = Path(__file__).parents[2]
SET = isas()[-1] if isas() else "torch"


def config_of(model_dir: Path, kernels: str, **changes: Any) -> WorkerConfig:
    return WorkerConfig(
        model_dir=model_dir, socket_path=model_dir, journal_dir=model_dir, kernels=kernels, num_blocks=8, **changes
    )


@pytest.mark.parametrize("kernels", ["auto", "torch", SET])
def test_it_says_what_a_worker_says(tiny_model_dir: Path, kernels: str) -> None:
    config = config_of(tiny_model_dir, kernels)
    said, (_, ready) = explain(config), build(config, unobserved)
    for name in ("kernels", "device", "dtype", "isolation"):
        assert said[name] == getattr(ready, name), name
    assert said["reason"]
    if isas() and kernels != "torch":
        assert said["instruction_set"] == NativeBackend(kernels.replace("auto", "")).isa
        assert said["isolation"] == "bitwise"


def test_every_op_has_a_source_that_is_there(tiny_model_dir: Path) -> None:
    for kernels in ("torch", SET):
        said = explain(config_of(tiny_model_dir, kernels))
        assert {op["op"] for op in said["ops"]} >= {"linear", "gate_up", "head", "rms_norm", "silu_and_mul", "attend"}
        assert all(hasattr(Backend, op["op"]) and op["op"] not in NOT_OPS for op in said["ops"])
        assert all((ROOT / path).is_file() for op in said["ops"] for path in op["source"].split(", "))


@pytest.mark.skipif(not is_interpreted(), reason="a GPU has other launch parameters")
def test_the_gpus_launch_parameters_are_the_tables(tmp_path: Path) -> None:
    shape = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "hidden_size": 16}
    write_tiny_model(tmp_path, num_hidden_layers=1, vocab_size=64, intermediate_size=16, **shape)
    said = explain(
        config_of(tmp_path, "triton", kv_cache_dtype="fp8_e4m3", block_size=16, cuda_graphs="4, 1", max_num_seqs=4)
    )
    assert said["cuda_graphs"] == [1, 4]
    sources = {op["op"]: op["source"] for op in said["ops"]}
    assert sources["top"] == "kernels/gpu/logits.py"
    assert sources["scrub"] == "kernels/gpu/scrub_blocks.py"
    assert "kernels/gpu/gather_tags.py" in sources["check"]
    assert (said["instruction_set"], said["kv_cache_dtype"]) == ("interpreted", "fp8_e4m3")
    (attend,) = (op for op in said["ops"] if op["op"] == "attend")
    assert all((ROOT / path).is_file() for op in said["ops"] for path in op["source"].split(", "))
    launch = attend["launches"][1]
    assert (launch["ratio"], launch["head_size"], launch["block_size"], launch["cache_bytes"]) == (2, 16, 16, 1)
    assert launch["tile"] == attention_shape(0, 16, 2, 16, 2, 1).tile


def command(config: dict[str, Any], *arguments: str) -> subprocess.CompletedProcess[str]:
    text = json.dumps({**config, "socket_path": "x", "journal_dir": "x", "audit_slots_per_step": 1})
    run = [sys.executable, "-m", "gateway", "worker", "--explain", "--config", text, *arguments]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


def test_the_command_prints_it_and_keeps_it(tiny_model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "explained.json"
    done = command({"model_dir": str(tiny_model_dir), "kernels": "torch"}, "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert json.loads(file.read_text())["kernels"] == "torch-cpu"
    assert "torch-cpu" in done.stdout
    assert "relaxed" in done.stdout
    assert "kernels/torch_cpu.py" in done.stdout
    assert "CUDA graphs" in done.stdout


def test_where_no_worker_would_start_it_says_why(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model_dir": str(tiny_model_dir), "kernels": "torch", "kv_cache_dtype": "fp8_e4m3"}
    assert main(["--config", json.dumps({**config, "socket_path": "x", "journal_dir": "x"})]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "kv_cache_dtype fp8_e4m3 wants BULKHEAD_KERNELS=triton: torch-cpu does not take it"
    ]
    with pytest.raises(ConfigError, match="cuda_graphs wants BULKHEAD_KERNELS=triton: torch-cpu has none"):
        explain(config_of(tiny_model_dir, "torch", cuda_graphs="1"))
    with pytest.raises(ConfigError, match="no model folder"):
        explain(config_of(tiny_model_dir / "nowhere", "torch"))


@pytest.mark.parametrize("sizes", ["0", "9", "1,,2", "one", "-1", "1.5"])
def test_sizes_of_graphs_are_checked_at_start(tmp_path: Path, sizes: str) -> None:
    with pytest.raises(ConfigError, match="cuda_graphs must be numbers of rows from 1 to 8"):
        config_of(tmp_path, "triton", cuda_graphs=sizes, max_num_seqs=8)
    assert config_of(tmp_path, "triton", cuda_graphs=" 8, 2,8 ", max_num_seqs=8).graph_sizes == (2, 8)
    many = ",".join(str(size) for size in range(1, 34))
    with pytest.raises(ConfigError, match="32 sizes or fewer, not 33"):
        config_of(tmp_path, "triton", cuda_graphs=many, max_num_seqs=64)
