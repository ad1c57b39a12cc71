"""The product on AMX tiles, with the tile instructions emulated: its shapes, addresses and order, on any processor."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.cpu.library import DTYPES, ProductArgs, optional_pointer, pointer
from kernels.cpu.product import pack, side_by_side
from kernels.memory import Arena
from tests.kernels.native import bits

PANEL, INPUTS = 32, 32  # as product_amx.h has them
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
HERE = Path(__file__).parent
ROOT = HERE.parent.parent

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: install g++")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("tiles") / "tiles.so"
    command = [*(COMPILER or "").split(), "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(
        [*command, f"-I{ROOT / 'kernels/cpu/src'}", str(HERE / "emulated_tiles.cpp"), "-o", str(path)], check=True
    )
    return ctypes.CDLL(str(path))


class Emulated:
    def __init__(
        self, library: ctypes.CDLL, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype, *, gated: bool = False
    ) -> None:
        self._library, self._bias, self._out_dtype = library, bias, out_dtype
        self._gated = gated
        self._num_outputs, self._num_inputs = weight.shape
        if gated:
            self._num_outputs //= 2
            weight = side_by_side(weight, PANEL // 2)
        self._packed = pack(weight, PANEL, INPUTS, Arena())

    def __call__(self, x: Tensor, cut: int = 0) -> Tensor:
        """The first ``cut`` panels in a call of their own."""
        y = torch.full((len(x), self._num_outputs), torch.nan, dtype=self._out_dtype)
        args = ProductArgs(
            x=pointer(x),
            weight=pointer(self._packed),
            bias=optional_pointer(self._bias),
            y=pointer(y),
            num_rows=len(x),
            num_inputs=self._num_inputs,
            num_outputs=self._num_outputs,
            weight_dtype=DTYPES[x.dtype],
            y_dtype=DTYPES[self._out_dtype],
            gated=self._gated,
        )
        for begin, end in ((0, cut), (cut, len(self._packed))):
            faults = self._library.emulated_product(
                ctypes.byref(args), *map(ctypes.c_int64, (begin, end, self._packed.nbytes))
            )
            assert faults == 0
        return y


def drawn(num_inputs: int, num_outputs: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_inputs)
    weight = torch.randn((num_outputs, num_inputs), generator=generator).mul(0.05).bfloat16()
    bias = torch.randn(num_outputs, generator=generator).bfloat16()
    return torch.randn((num_rows, num_inputs), generator=generator).bfloat16(), weight, bias


@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(1, 1), (31, 33), (64, 32), (65, 100), (96, 64)])
@pytest.mark.parametrize("num_rows", [0, 1, 15, 16, 17, 31, 32, 33, 64, 70])
def test_a_product_on_tiles_is_right(library: ctypes.CDLL, num_inputs: int, num_outputs: int, num_rows: int) -> None:
    x, weight, bias = drawn(num_inputs, num_outputs, num_rows)
    right = x.double() @ weight.double().T
    logits = Emulated(library, weight, None, torch.float32)(x)
    torch.testing.assert_close(logits.double(), right, atol=1e-5, rtol=1e-5)
    y = Emulated(library, weight, bias, torch.bfloat16)(x, cut=1)
    torch.testing.assert_close(y.double(), right + bias.double(), atol=2e-2, rtol=2e-2)


def test_rows_on_tiles_do_not_depend_on_their_company(library: ctypes.CDLL) -> None:
    x, weight, bias = drawn(97, 45, 70)
    product = Emulated(library, weight, bias, torch.bfloat16)
    alone = torch.cat([product(x[i : i + 1]) for i in range(70)])
    generator = torch.Generator().manual_seed(1)
    for count in range(1, 71):
        order = torch.randperm(70, generator=generator)[:count]
        assert torch.equal(bits(product(x[order])), bits(alone[order])), f"{count} rows"


@pytest.mark.parametrize(("num_inputs", "size"), [(1, 1), (31, 17), (64, 32), (65, 45)])
@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 32, 33, 70])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gate_and_up_on_tiles(library: ctypes.CDLL, num_inputs: int, size: int, num_rows: int, with_bias: bool) -> None:
    """The activation of what the product gives; its bits, among instruction sets, are test_gate.py's."""
    x, weight, bias = drawn(num_inputs, 2 * size, num_rows)
    some_bias = bias if with_bias else None
    product = Emulated(library, weight, some_bias, torch.bfloat16)(x)
    got = Emulated(library, weight, some_bias, torch.bfloat16, gated=True)(x, cut=1)
    torch.testing.assert_close(got, reference.silu_and_mul(product), atol=1e-6, rtol=1e-2)


def test_a_broken_number_stays_in_its_row_on_tiles(library: ctypes.CDLL) -> None:
    x, weight, _ = drawn(33, 40, 20)
    x[2, 7] = torch.nan
    broken = Emulated(library, weight, None, torch.float32)(x).isnan()
    assert broken[2].all()
    broken[2] = False
    assert not broken.any()
