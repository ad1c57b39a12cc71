from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.memory import ALIGNMENT, HUGE_PAGE, Arena, zeros

SHAPES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), min_size=1, max_size=12)


@given(shapes=SHAPES, mapping_bytes=st.sampled_from([1, 64, 1000, HUGE_PAGE]))
def test_pieces_are_aligned_and_apart(shapes: list[tuple[int, int]], mapping_bytes: int) -> None:
    arena = Arena(mapping_bytes)
    pieces = [arena.empty(shape, torch.bfloat16) for shape in shapes]
    for index, piece in enumerate(pieces):
        piece.fill_(index)
    for index, (piece, shape) in enumerate(zip(pieces, shapes, strict=True)):
        assert piece.shape == shape
        assert piece.is_contiguous()
        assert (piece == index).all()
        assert piece.numel() == 0 or piece.data_ptr() % ALIGNMENT == 0


def test_zeros_begin_at_a_huge_page() -> None:
    tensor = zeros((3, 5, 7), torch.float32)
    assert tensor.shape == (3, 5, 7)
    assert not tensor.any()
    assert tensor.data_ptr() % HUGE_PAGE == 0
    tensor[2] = 1
    assert tensor.sum() == 35
    assert zeros((0, 4), torch.bfloat16).shape == (0, 4)


THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_huge_pages_are_really_used() -> None:
    """A shared mapping asks for them as politely and gets none: it belongs to a file system that has them off."""
    if not THP.exists() or "[never]" in THP.read_text():
        pytest.skip("this system gives no huge pages to anybody")
    tensor = zeros((4 * HUGE_PAGE,), torch.uint8)
    tensor.fill_(1)
    assert huge_bytes(tensor.data_ptr()) >= HUGE_PAGE


def huge_bytes(address: int) -> int:
    """Of the mapping that holds ``address``, from /proc/self/smaps."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "AnonHugePages:":
            return int(line.split()[1]) * 1024
    return 0
