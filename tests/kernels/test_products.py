"""The library's own matrix product: right, in one order of sums, and the same bits for a row in any company."""

import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.backend import KernelError
from kernels.choice import choose
from kernels.cpu.backend import NativeBackend
from kernels.cpu.library import load
from kernels.cpu.product import NativeProduct
from kernels.cpu.trial import SIZES, multiplies
from kernels.products import PlainHead, Product, keeps_bits
from kernels.torch_cpu import TorchBackend
from tests.kernels.native import bits, every_isa, isas

ROW_COUNTS = [*range(1, 71), 127, 128, 129, 255, 256, 257]
DTYPES = [torch.float32, torch.bfloat16]


def matrices(sizes: tuple[int, int], dtype: torch.dtype, num_rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    num_inputs, num_outputs = sizes
    weight = torch.randn((num_outputs, num_inputs), generator=generator).mul(0.05).to(dtype)
    bias = torch.randn(num_outputs, generator=generator).to(dtype)
    return torch.randn((num_rows, num_inputs), generator=generator).to(dtype), weight, bias


def wide(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())


@every_isa
@given(
    num_inputs=st.integers(1, 70),
    num_outputs=st.integers(1, 140),
    num_rows=st.integers(0, 30),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_a_product_is_right(
    isa: str, num_inputs: int, num_outputs: int, num_rows: int, dtype: torch.dtype, with_bias: bool, seed: int
) -> None:
    backend = NativeBackend(isa)
    x, weight, bias = matrices((num_inputs, num_outputs), dtype, num_rows, seed)
    y = backend.linear(weight, bias if with_bias else None)(x)
    assert (y.dtype, y.shape) == (dtype, (num_rows, num_outputs))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(y.double(), wide(x, weight, bias if with_bias else None), atol=tolerance, rtol=tolerance)
    head = backend.head(weight)
    logits = head(x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), wide(x, weight), atol=1e-5, rtol=1e-5)
    indices = torch.randint(num_outputs, (num_rows,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(head.rows(indices), weight[indices])


@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(576, 960), (65, 33)])
def test_rows_of_products(isa: str, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    x, weight, bias = matrices(sizes, dtype, 257, 1)
    backend = NativeBackend(isa, 1)
    generator = torch.Generator().manual_seed(2)
    for product in (backend.linear(weight, bias), backend.head(weight)):
        alone = torch.cat([product(x[i : i + 1]) for i in range(257)])
        for num_threads in (1, 2):
            NativeBackend(isa, num_threads)
            for count in ROW_COUNTS:
                order = torch.randperm(257, generator=generator)[:count]
                assert torch.equal(bits(product(x[order])), bits(alone[order])), f"{count} rows"
        assert product.is_exact()


@every_isa
def test_columns_do_not_matter_to_each_other(isa: str) -> None:
    """A column's bits are the same wherever it lies in a panel and whoever its neighbours are."""
    x, weight, _ = matrices((100, 90), torch.bfloat16, 9, 3)
    backend = NativeBackend(isa)
    whole = backend.linear(weight)(x)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(4))[:53]
    assert torch.equal(bits(backend.linear(weight[order])(x)), bits(whole[:, order]))


@pytest.mark.skipif(not isas() or platform.machine() not in ("x86_64", "AMD64"), reason="fused where the compiler may")
def test_the_order_of_sums() -> None:
    """By input, from the first to the last: what a plain loop of single precision computes, to the bit."""
    x, weight, _ = matrices((75, 40), torch.float32, 7, 5)
    want = np.zeros((7, 40), dtype=np.float32)
    for k in range(75):
        want += x[:, k : k + 1].numpy() * weight[:, k].numpy()
    got = NativeBackend("portable").linear(weight)(x)
    assert (got.numpy().view(np.int32) == want.view(np.int32)).all()


@every_isa
def test_a_broken_number_stays_in_its_row_and_column(isa: str) -> None:
    x, weight, _ = matrices((33, 50), torch.bfloat16, 5, 6)
    x[2, 7] = torch.nan
    weight[11, 3] = torch.inf
    broken = ~NativeBackend(isa).linear(weight)(x).isfinite()
    assert broken[2].all()
    assert broken[:, 11].all()
    broken[2], broken[:, 11] = False, False
    assert not broken.any()


@pytest.mark.skipif(not isas(), reason="no native kernels: install a C++ compiler, run make native")
def test_kernels_that_multiply_wrongly_do_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a processor might whose flags promise what it does not keep."""
    names, best, lines = isas(), isas()[0], list[str]()
    monkeypatch.setattr("kernels.cpu.backend.multiplies", lambda library, isa: isa != library.isas()[best])
    chosen = choose("auto", 1, lines.append)
    if len(names) > 1:
        assert chosen.name == f"native-{names[1]}"
    assert f"the native kernels {best} multiply wrongly" in lines[0]
    with pytest.raises(KernelError, match=f"tried {best}"):
        choose(best, 1, print)
    monkeypatch.setattr("kernels.cpu.backend.multiplies", lambda library, isa: False)
    assert isinstance(choose("auto", 1, lines.append), TorchBackend)


@every_isa
@pytest.mark.parametrize("slip", [lambda y: y * 1.1, lambda y: y + len(y) * 1e-3, lambda y: y * float("nan")])
@pytest.mark.parametrize("gated", [False, True])
def test_the_trial_finds_wrong_products(isa: str, slip: Callable[[Tensor], Tensor], gated: bool) -> None:
    library, number = load(), load().isas()[isa]
    assert multiplies(library, number)
    sizes = {outputs // 2 if gated else outputs for _, outputs in SIZES}

    def slipped(self: NativeProduct, x: Tensor) -> Tensor:
        y = whole(self, x)
        return slip(y.float()).to(x.dtype) if self.num_outputs in sizes else y

    whole = NativeProduct.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NativeProduct, "__call__", slipped)
        assert not multiplies.__wrapped__(library, number)


@pytest.mark.skipif("avx512_bf16" not in isas(), reason="this processor has no AVX-512-BF16")
def test_the_order_of_sums_in_pairs() -> None:
    """Pairs from the first to the last, of each the upper input first; a bfloat16 product is exact in float32."""
    x, weight, _ = matrices((75, 40), torch.bfloat16, 7, 5)
    want = np.zeros((7, 40), dtype=np.float32)
    for k in range(0, 75, 2):
        for at in (k + 1, k):
            if at < 75:
                want += x[:, at : at + 1].float().numpy() * weight[:, at].float().numpy()
    got = NativeBackend("avx512_bf16").head(weight)(x)
    assert (got.numpy().view(np.int32) == want.view(np.int32)).all()


FLAGS_OF = {
    "amx": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "amx_tile", "amx_bf16"},
    "avx512_bf16": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx2": {"avx2", "fma"},
    "portable": set(),
}


@pytest.mark.skipif(not isas() or not Path("/proc/cpuinfo").exists(), reason="needs Linux and the native kernels")
def test_the_processor_is_asked_by_its_flags() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split())
    for isa in isas():
        assert FLAGS_OF[isa] <= flags
    assert isas() == [isa for isa in FLAGS_OF if isa in isas()], "best first"


def test_torchs_head_keeps_its_rows() -> None:
    weight = torch.randn(9, 4).bfloat16()
    head = PlainHead(weight)
    assert torch.equal(head.rows(torch.tensor([8, 0])), weight[[8, 0]])
    assert head(torch.ones(1, 4)).dtype == torch.float32


def test_a_product_that_depends_on_its_company_is_found_out() -> None:
    def meddles(x: Tensor) -> Tensor:
        return x + x.sum()

    def counts(x: Tensor) -> Tensor:
        return x + len(x)

    product: Product = PlainHead(torch.eye(8))
    assert keeps_bits(product, 8, torch.float32)
    assert not keeps_bits(meddles, 8, torch.float32)
    assert not keeps_bits(counts, 8, torch.float32)
