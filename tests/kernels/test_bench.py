"""The benchmark measures every op: a small run, its figures and its table."""

import json

import pytest
import torch

from gateway.commands.bench_kernels import steps_table, table_of
from kernels import bench, bench_ops
from kernels.bench_step import CALLS as CALLS_OF_A_STEP
from kernels.bench_step import Times
from kernels.call_times import CALLS, inside
from kernels.cpu.backend import NativeBackend
from kernels.cpu.library import load
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
        assert figure["library_us"] > 0
        assert figure["twin_us"] > 0
        assert figure["torch_us"] > 0
        assert figure["gb_per_s"] == pytest.approx(figure["bytes"] / figure["ours_us"] / 1e3, rel=0.05, abs=0.01)
    assert table_of(figures).row_count == len(figures)
    assert [step["rows"] for step in result["steps"]] == [1, 2]
    for step in result["steps"]:
        for name, call, without in (
            ("rope", "attend", "attention"),
            ("activation", "gate_up", "gate_up_bare"),
        ):
            assert step[f"{name}_ms"] == pytest.approx(step[f"{call}_ms"] - step[f"{without}_ms"], abs=0.01)
        norms = step["normed_qkv_ms"] - step["qkv_ms"] + step["normed_gate_up_ms"] - step["gate_up_ms"]
        assert step["norms_ms"] == pytest.approx(norms, abs=0.01)
        parts = [step["normed_qkv_ms"] - step["qkv_ms"], step["normed_gate_up_ms"] - step["gate_up_ms"]]
        parts += [step["rope_ms"], step["activation_ms"]]
        assert step["together_ms"] == pytest.approx(sum(max(0, part) for part in parts), abs=0.01)  # noise is no gain
        assert min(step[f"{name}_ms"] for name in CALLS_OF_A_STEP) > 0
        assert step["warm_ms"] > 0
        assert step["together_ms"] < step["step_ms"], "products and attention take time, too"
        assert step["step_apart_ms"] > step["qkv_ms"] + step["attention_ms"] + step["gate_up_bare_ms"]
    assert steps_table(result["steps"]).row_count == 2
    chunk = result["chunk"]
    products = [figure["ours_us"] for figure in figures if figure["case"] == "33 rows bfloat16"]
    assert len(products) == len(bench_ops.LAYER_PRODUCTS)
    assert chunk["products_us"] == pytest.approx(sum(products), abs=0.1)
    assert chunk["share"] == pytest.approx(chunk["attention_us"] / chunk["products_us"], abs=0.001)


def test_a_steps_time_is_the_sum_of_its_calls_medians() -> None:
    """One slow round must not count, wherever in the step it strikes; and no layer may be left out."""
    times = Times()
    for first, second in ((1.0, 10.0), (500.0, 30.0), (2.0, 700.0)):
        times.begin_step()
        times.add("qkv", first)
        times.add("other", 0.5)
        times.add("qkv", second)
    assert times["qkv"] == 2.0 + 30.0
    assert times["other"] == 0.5


@pytest.mark.skipif(not isas(), reason="no native kernels: install a C++ compiler, run make native")
def test_what_is_spent_inside_counts_every_call_and_the_library_is_as_it_was() -> None:
    backend, library = NativeBackend(), load()
    before = {name: getattr(library, name) for name in CALLS}
    with inside(library) as spent:
        backend.silu_and_mul(torch.zeros((64, 4096)))
        first = spent.seconds
        backend.silu_and_mul(torch.zeros((64, 4096)))
    assert 0 < first < spent.seconds
    assert {name: getattr(library, name) for name in CALLS} == before
    functions = {name for name in vars(library) if callable(getattr(library, name))}
    assert functions - {"_loaded"} == set(CALLS), "a new op is timed, too"
