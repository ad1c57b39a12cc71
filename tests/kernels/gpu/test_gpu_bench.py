"""The GPU's benchmark without a clock: every op is there, runs on memory of its own, and its figures are sums that can
be done by hand. The clock itself wants a GPU (`make gpu`)."""

from collections.abc import Sequence

import pytest
import torch

from gateway.commands.bench_kernels import gpu_table
from kernels.gpu.bench import COPIES_MAX, Call, Case, Layer, device_us, figure, known, measure, num_copies, rows
from kernels.gpu.launch import is_interpreted
from kernels.gpu.roofline import GPUS, Load, Work, layer
from kernels.gpu.variants import LLAMA_8B, Model
from tests.kernels.gpu.steps import DEVICE

TINY = Model("tiny", 100, 32, 48, 2, 1, 16)
LOAD = Load("prefill, 2 rows of 40", 2, 3, 40)


class Stopped:
    """A clock that counts calls."""

    def __init__(self) -> None:
        self.num_calls: list[int] = []

    def __call__(self, calls: Sequence[Call], num_rounds: int) -> list[float]:
        for call in calls:
            call()
        self.num_calls.append(len(calls))
        return [10.0, 500.0, 20.0]


def test_every_op_is_measured_and_runs() -> None:
    clock = Stopped()
    tiny = Layer(TINY, LOAD, torch.float32, DEVICE, working_set_bytes=1)
    found = rows(measure([tiny], clock, GPUS[1], num_rounds=1))
    assert [row["op"] for row in found if not row["case"]] == [
        *(work.op for work in layer(TINY, LOAD)),
        "greedy",
        "gather_tags",
    ]
    assert {(row["op"], row["case"]) for row in found if row["case"]} == {
        *((op, case) for op in ("rope_and_store_kv", "paged_attention") for case in ("unchecked", "e4m3 cache")),
        ("top_k", "k 20"),
        ("scrub_blocks", "2 blocks"),
    }
    assert set(clock.num_calls) == {1}
    assert gpu_table(found).row_count == len(found)
    assert gpu_table([{**found[0], "floor_us": None, "of_floor": None}]).row_count == 1
    assert {(row["model"], row["step"], row["median_us"]) for row in found} == {("tiny", LOAD.name, 20.0)}


def test_a_figure_is_what_it_says() -> None:
    case = Case(Work("op", 335_000_000, 4_000_000), "label", [])
    got = figure(case, [300.0, 100.0, 200.0], GPUS[1])
    assert (got.op, got.case, got.median_us, got.bytes) == ("op", "label", 200.0, 335_000_000)
    assert got.gb_per_s == 1675.0
    assert got.tflop_per_s == 0.02
    assert got.floor_us == 100.0
    assert got.of_floor == 0.5
    unknown = figure(case, [200.0], None)
    assert (unknown.floor_us, unknown.of_floor) == (None, None)


def test_copies_fill_the_working_set_and_are_different_memory() -> None:
    assert [num_copies(size, 100) for size in (1, 10, 50, 51, 100, 1000)] == [COPIES_MAX, 10, 2, 2, 1, 1]
    tiny = Layer(TINY, LOAD, torch.float32, DEVICE, working_set_bytes=1 << 30)
    norm = next(tiny.cases())
    assert len(norm.calls) == COPIES_MAX
    assert len({call.args[0].data_ptr() for call in norm.calls}) == COPIES_MAX  # type: ignore[attr-defined]


def test_a_cache_in_8_bits_has_half_the_bytes() -> None:
    wide, narrow = ({work.op: work.bytes for work in layer(LLAMA_8B, LOAD, item)} for item in (2, 1))
    kept = 2 * 8 * 128
    assert wide["paged_attention"] - narrow["paged_attention"] == 2 * 40 * kept
    assert wide["rope_and_store_kv"] - narrow["rope_and_store_kv"] == 2 * 3 * kept
    assert wide["matmul qkv"] == narrow["matmul qkv"]


def test_data_sheets_are_found_by_the_drivers_name() -> None:
    assert [known(name) for name in ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 5090")] == [
        *GPUS,
        None,
    ]


@pytest.mark.skipif(is_interpreted(), reason="the clock is the GPU's own")
def test_the_devices_clock_runs() -> None:
    large = torch.zeros(1 << 20, device=DEVICE)
    times = device_us([lambda: large.add_(1.0)] * 2, 3)
    assert len(times) == 6
    assert min(times) > 0
