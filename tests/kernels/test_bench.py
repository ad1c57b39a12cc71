"""The benchmark measures every op: a small run, its figures and its table."""

import json

import pytest
import torch

from gateway.commands.bench_kernels import table_of
from kernels import bench
from tests.kernels.native import isas


@pytest.mark.skipif(not isas(), reason="no native kernels: install a C++ compiler, run make native")
def test_every_op_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rows", "1,2", "--rounds", "1", "--context", "40", "--chunk", "33", "--working-set", "1000000"]
    assert bench.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["copy_gb_per_s"] > 0
    assert (result["gpu"] is None) == (not torch.cuda.is_available())
    figures = result["figures"]
    assert {figure["op"].split()[0] for figure in figures} == {
        *("qkv", "output", "gate_up", "down", "head", "top"),
        *("rms_norm", "silu_and_mul", "gelu_and_mul", "rope_and_store", "attention", "digest_blocks", "fill_blocks"),
    }
    for figure in figures:
        assert figure["ours_us"] > 0
        assert figure["twin_us"] > 0
        assert figure["torch_us"] > 0
        assert figure["gb_per_s"] == pytest.approx(figure["bytes"] / figure["ours_us"] / 1e3, rel=0.05, abs=0.01)
    assert table_of(figures).row_count == len(figures)
