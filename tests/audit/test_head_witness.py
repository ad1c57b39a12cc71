"""The head's witness: no head that adds in float32 is ever doubted, whatever its order of sums, and a logit that was
made of another row's hidden state or of another token's weights is."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save_file

from audit.runtime.head_weight import mapped
from audit.runtime.head_witness import HeadWitness, rounded, wide

Floats = NDArray[np.float32]


def bits(values: Floats) -> NDArray[np.uint16]:
    return (rounded(values).view(np.uint32) >> 16).astype(np.uint16)


def added(products: Floats, order: NDArray[np.int64], width: int) -> np.float32:
    """Products [K] in float32: ``width`` chains in this order, then the chains."""
    chains = [np.float32(0)] * width
    for place, index in enumerate(order):
        chains[place % width] = np.float32(chains[place % width] + products[index])
    total = np.float32(0)
    for chain in chains:
        total = np.float32(total + chain)
    return total


@st.composite
def heads(draw: st.DrawFn) -> tuple[Floats, Floats, NDArray[np.int64], np.random.Generator]:
    """A weight [V, K], hidden states [S, K] and tokens [S], of magnitudes far apart, with sums that cancel."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_rows, num_inputs, size = draw(st.integers(1, 6)), draw(st.integers(1, 96)), draw(st.integers(1, 20))
    spread = draw(st.sampled_from([0, 3, 12]))

    def numbers(*shape: int) -> Floats:
        drawn = random.standard_normal(shape) * 2.0 ** random.integers(-spread, spread + 1, shape)
        return rounded(drawn.astype(np.float32))

    weight, hidden = numbers(size, num_inputs), numbers(num_rows, num_inputs)
    if num_inputs > 1 and draw(st.booleans()):
        hidden[:, 1], weight[:, 1] = hidden[:, 0], -weight[:, 0]
    return weight, hidden, random.integers(size, size=num_rows), random


@given(heads(), st.booleans(), st.sampled_from([1, 2, 8, 16]), st.sampled_from([1.0, 0.125, 1 / 3, -7.1]))
def test_no_order_of_sums_is_doubted(
    head: tuple[Floats, Floats, NDArray[np.int64], np.random.Generator], is_bfloat16: bool, width: int, scale: float
) -> None:
    weight, hidden, tokens, random = head
    order = random.permutation(weight.shape[1])
    logits = np.array([added(h * weight[t], order, width) for h, t in zip(hidden, tokens, strict=True)], np.float32)
    logits *= np.float32(scale)
    given_weight, given_hidden = (bits(weight), bits(hidden)) if is_bfloat16 else (weight, hidden)
    witness = HeadWitness(given_weight, is_bfloat16=is_bfloat16, scale=scale)
    assert not witness.disagrees(given_hidden, tokens, logits).any()


@given(heads())
def test_logits_of_another_row_or_token_are_doubted_where_they_differ(
    head: tuple[Floats, Floats, NDArray[np.int64], np.random.Generator],
) -> None:
    """By more than twice the bound, written down here a second time."""
    weight, hidden, tokens, random = head
    exact = hidden.astype(np.float64) @ weight.astype(np.float64).T
    sizes = np.abs(hidden).astype(np.float64) @ np.abs(weight).astype(np.float64).T
    rows = np.arange(len(tokens))
    bound = (weight.shape[1] + 4) * 2.0**-24 * sizes[rows, tokens] * 1.01 + 2.0**-120
    for others in (exact[rows[::-1], tokens], exact[rows, random.permutation(tokens)]):
        logits = others.astype(np.float32)
        differs = np.abs(logits - exact[rows, tokens]) > 2 * bound
        doubted = HeadWitness(bits(weight), is_bfloat16=True).disagrees(bits(hidden), tokens, logits)
        assert doubted[differs].all()


def test_what_is_no_number_no_token_and_no_row_is_doubted() -> None:
    weight = np.eye(3, dtype=np.float32)
    witness, hidden = HeadWitness(weight, is_bfloat16=False), np.ones((4, 3), np.float32)
    logits = np.array([1, np.nan, np.inf, 1], np.float32)
    assert witness.disagrees(hidden, np.array([0, 1, 2, 3]), logits).tolist() == [False, True, True, True]
    assert witness.disagrees(hidden, np.array([0, 1, 2, -1]), np.ones(4, np.float32)).tolist() == [False] * 3 + [True]
    assert witness.disagrees(hidden[:3], np.array([0, 1, 2, 0]), logits).all()
    with pytest.raises(ValueError, match="float64"):
        HeadWitness(weight.astype(np.float64), is_bfloat16=False)


@given(st.integers(0, 2**32))
def test_rounding_is_torchs(seed: int) -> None:
    random = np.random.default_rng(seed)
    values = random.integers(2**32, size=64, dtype=np.uint32).view(np.float32)
    values = np.append(values[np.isfinite(values)], np.float32([0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8]))
    told = torch.from_numpy(values).bfloat16()
    assert np.array_equal(bits(values), told.view(torch.uint16).numpy())
    assert np.array_equal(wide(bits(values)), told.float().numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_weight_is_read_as_it_lies_in_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.randn(7, 5).to(dtype)
    save_file({"a": torch.ones(3)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.ones(3, dtype=torch.int8), "head": weight}, tmp_path / "model-2.safetensors")
    told = mapped(tmp_path, "head")
    assert np.array_equal(wide(told), weight.float().numpy())
    assert not told.flags.writeable
    for absent, match in (("other", "no file"), ("a", "shape"), ("b", "I8")):
        with pytest.raises(ValueError, match=match):
            mapped(tmp_path, absent)


def test_a_header_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 16)
    with pytest.raises(ValueError, match="header"):
        mapped(tmp_path, "head")
    text = json.dumps({}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match="no file"):
        mapped(tmp_path, "head")
