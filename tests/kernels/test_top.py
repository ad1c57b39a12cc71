"""The largest logits of a row: against both twins, on every instruction set, whatever the company and the threads."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference, torch_cpu
from kernels.cpu.backend import NativeBackend
from tests.kernels.native import every_isa
from tests.kernels.test_native_bits import ROW_COUNTS

WIDTHS = st.sampled_from([1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 33, 63, 64, 65, 500, 2049])
KINDS = st.sampled_from(["noise", "ties", "equal", "zeros", "peaks", "rising", "falling", "tiny"])


def logits_of(kind: str, num_rows: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((num_rows, width), generator=generator)
    match kind:
        case "ties":
            return (noise * 2).round() / 2
        case "equal":
            return torch.full((num_rows, width), -1.5)
        case "zeros":  # the two zeros are one number
            return torch.where(noise > 0, 0.0, -0.0)
        case "peaks":
            return torch.where(noise > 1.5, noise, -3e38)
        case "rising":
            return noise.sort(dim=-1).values.contiguous()
        case "falling":
            return noise.sort(dim=-1, descending=True).values.contiguous()
        case "tiny":  # numbers below the least normal one are still in order
            return noise * 1e-40
    return noise * 3


@every_isa
@given(
    kind=KINDS,
    num_rows=st.integers(0, 5),
    width=WIDTHS,
    count=st.integers(1, 2049),
    num_threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**20),
)
def test_it_finds_what_its_twins_find(
    isa: str, kind: str, num_rows: int, width: int, count: int, num_threads: int, seed: int
) -> None:
    logits, count = logits_of(kind, num_rows, width, seed), min(count, width)
    ids, finite = NativeBackend(isa, num_threads).top(logits, count)
    assert finite.all()
    for twin in (reference.top, torch_cpu.top):
        wanted, _ = twin(logits, count)
        assert torch.equal(ids, wanted)


@every_isa
@given(
    width=WIDTHS,
    place=st.integers(0, 2048),
    number=st.sampled_from([math.nan, -math.nan, math.inf, -math.inf]),
    row=st.integers(0, 2),
    count=st.integers(1, 3),
)
def test_a_broken_number_anywhere_breaks_its_row_alone(
    isa: str, width: int, place: int, number: float, row: int, count: int
) -> None:
    logits = logits_of("noise", 3, width, place)
    whole, count = logits.clone(), min(count, width)
    logits[row, place % width] = number
    ids, finite = NativeBackend(isa, 2).top(logits, count)
    assert finite.tolist() == [other != row for other in range(3)]
    assert torch.equal(ids[finite], reference.top(whole, count)[0][finite])
    for twin in (reference.top, torch_cpu.top):
        assert torch.equal(finite, twin(logits, count)[1])


@every_isa
@pytest.mark.parametrize("count", [1, 40])
def test_rows_are_found_alike_in_any_company(isa: str, count: int) -> None:
    logits = logits_of("ties", 257, 1003, 3)
    alone = NativeBackend(isa, 1)
    wanted = torch.cat([alone.top(logits[row : row + 1], count)[0] for row in range(257)])
    for num_threads in (1, 2):
        backend = NativeBackend(isa, num_threads)
        for num_rows in ROW_COUNTS:
            rows = torch.from_numpy(np.random.default_rng(num_rows).permutation(257)[:num_rows])
            assert torch.equal(backend.top(logits[rows], count)[0], wanted[rows])


@every_isa
@pytest.mark.parametrize("kind", ["noise", "ties", "tiny", "peaks"])
@pytest.mark.parametrize("count", [999, 1000, 2048, 2049])
def test_both_ways_of_sorting_agree(isa: str, kind: str, count: int) -> None:
    """From a thousand wanted on keys are sorted digit by digit: numbers that differ in their last digit alone are still
    in order."""
    logits = logits_of(kind, 2, 2049, 7)
    logits[1, 1::2] = torch.nextafter(logits[1, :-1:2], torch.tensor(math.inf))
    ids, _ = NativeBackend(isa, 1).top(logits, count)
    assert torch.equal(ids, reference.top(logits, count)[0])
