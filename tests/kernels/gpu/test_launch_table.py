"""The table of launch parameters: everything that is served has a row, and no row changes bits by the block size."""

import ast
import itertools
from pathlib import Path

import pytest

from kernels.backend import KernelError
from kernels.gpu import launch
from kernels.gpu.launch import SPLIT
from kernels.gpu.launch_table import TABLE, attention_shape
from kernels.gpu.variants import CAPABILITIES

HEAD_SIZES, RATIOS, BLOCK_SIZES = (8, 16, 24, 64, 80, 96, 128, 192, 256), (1, 3, 4, 8, 64, 65, 128), (1, 16, 32, 64)
BYTES = ((2, 2), (2, 1), (4, 4), (4, 1))  # of a number in queries and in the cache


def test_every_shape_has_a_row_that_fits_it() -> None:
    for capability, size, ratio, block_size, numbers in itertools.product(
        (0, *CAPABILITIES), HEAD_SIZES, RATIOS, BLOCK_SIZES, BYTES
    ):
        shape = attention_shape(capability, size, ratio, block_size, *numbers)
        assert ratio <= shape.block_m
        assert SPLIT % shape.tile == 0
        assert shape.tile >= 16, "a matrix instruction takes 16 keys"


def test_the_block_size_changes_no_bits() -> None:
    for capability, size, ratio, numbers in itertools.product((0, *CAPABILITIES), HEAD_SIZES, RATIOS, BYTES):
        shapes = [attention_shape(capability, size, ratio, block_size, *numbers) for block_size in BLOCK_SIZES]
        assert len({(shape.block_m, shape.tile, shape.num_warps) for shape in shapes}) == 1


def test_every_row_is_somebodys() -> None:
    """A row behind a more general one would never be read."""
    found = {
        id(next(row.shape for row in TABLE if row.fits(capability, size, ratio, block_size, *numbers)))
        for capability, size, ratio, block_size, numbers in itertools.product(
            CAPABILITIES, HEAD_SIZES, RATIOS, BLOCK_SIZES, BYTES
        )
    }
    assert found == {id(row.shape) for row in TABLE}


def test_what_no_row_fits_is_refused() -> None:
    with pytest.raises(KernelError, match="129 query heads"):
        attention_shape(90, 64, 129, 32, 2, 2)


def test_multiplication_and_addition_are_fused_nowhere() -> None:
    """Every launch says so itself: Triton's default may change. A launch is a kernel with a grid."""
    launches = 0
    for path in sorted(Path(launch.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launches += 1
                given = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg is None]
                assert any(one.startswith("options(") for one in given), f"{path.name}:{node.lineno}"
    assert launches >= 12
    assert launch.options()["enable_fp_fusion"] is False
