"""Attention on numbers as a trained model has them: keys with a few channels near 30, scores up to 60 either way, rows
of many tiles whose largest score moves. A kernel can be right on standard normal numbers and answer nonsense here."""

import math

import pytest
import torch
from torch import Tensor

from kernels.cpu.backend import NativeBackend
from tests.kernels.native import Features, Row, Shape, bits, every_isa, make_step, run

HEADS, KV_HEADS, HEAD_SIZE = 9, 3, 64  # the demo model's
OUTLIERS = {5: 1.0, 37: -1.0, 60: 0.5}  # channel of a key -> its share of the outlier's size
KEY_MAX, SCORE_MAX = 30.0, 60.0
# How strongly each query head of a group looks at the outliers: one hears mostly noise, one mostly a single key.
STRENGTHS = (0.02, 0.3, 1.0)
PARTS = [(0, 97), (299, 300), (130, 200), (32, 33), (0, 1), (449, 450), (64, 128)]
ROTATED = Features(rotate=False)


def real_row(shape: Shape, length: int, seed: int) -> Row:
    """Queries and keys after rotation. The largest outliers come late in one head and early in the next, so that
    running maxima move and stay; in the third whole tiles are large one way, then the other."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn((length, HEADS + 2 * KV_HEADS, HEAD_SIZE), generator=generator)
    at = torch.arange(length)
    reach = sum(share * share for share in OUTLIERS.values()) * KEY_MAX * HEAD_SIZE**-0.5
    for kv_head in range(KV_HEADS):
        swing = torch.cos(at * 0.7 + kv_head)
        turns = (swing * (at + 1) / length, swing * (length - at) / length, 1.0 - 2.0 * (at // 32 % 2))
        size = KEY_MAX * turns[kv_head]
        for channel, share in OUTLIERS.items():
            qkv[:, HEADS + kv_head, channel] = size * share
            for index, strength in enumerate(STRENGTHS):
                sign = -1.0 if index == 1 else 1.0
                qkv[:, kv_head * len(STRENGTHS) + index, channel] = sign * strength * share * SCORE_MAX / reach
    qkv[:, HEADS + KV_HEADS :] *= 4.0
    return Row(qkv.to(shape.dtype))


def dense(row: Row, first: int, end: int) -> tuple[Tensor, Tensor]:
    """float64 [end - first, Hq, D], and the scores that are seen."""
    wide = row.qkv[:end].double()
    query = wide[first:, :HEADS]
    key = wide[:, HEADS : HEADS + KV_HEADS].repeat_interleave(HEADS // KV_HEADS, dim=1)
    value = wide[:, HEADS + KV_HEADS :].repeat_interleave(HEADS // KV_HEADS, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * HEAD_SIZE**-0.5
    ahead = torch.arange(end)[None, :] > torch.arange(first, end)[:, None]
    weights = scores.masked_fill(ahead, -math.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value), scores[:, ~ahead]


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [16, 32])
def test_attention_at_real_magnitudes(isa: str, dtype: torch.dtype, block_size: int) -> None:
    shape = Shape(HEADS, KV_HEADS, HEAD_SIZE, block_size, dtype)
    rows = [real_row(shape, end, seed) for seed, (_, end) in enumerate(PARTS)]
    out = run(NativeBackend(isa, 2), shape, make_step(shape, rows, PARTS, rotate=False), features=ROTATED)
    start, largest = 0, 0.0
    # A score of 60 is known to 60 * 2^-23 and a few sums more; a bfloat16 answer is rounded once, to 2^-9 of itself.
    rtol, atol = (1e-4, 2e-4) if dtype == torch.float32 else (2.0**-8, 2e-4)
    for row, (first, end) in zip(rows, PARTS, strict=True):
        want, scores = dense(row, first, end)
        torch.testing.assert_close(out[start : start + end - first].double(), want, rtol=rtol, atol=atol)
        largest = max(largest, float(scores.abs().max()))
        start += end - first
    assert 50 < largest < 80, "the numbers are as large as they are said to be"


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_at_real_magnitudes(isa: str, dtype: torch.dtype) -> None:
    shape = Shape(HEADS, KV_HEADS, HEAD_SIZE, 32, dtype)
    row = real_row(shape, 200, 3)
    backend = NativeBackend(isa)
    whole = run(backend, shape, make_step(shape, [row], [(0, 200)], rotate=False), features=ROTATED)
    for first, end in [(199, 200), (63, 64), (64, 65), (95, 180)]:
        step = make_step(shape, [row, row], [(first, end), (0, 40)], 1, rotate=False)
        part = run(backend, shape, step, features=ROTATED)
        assert torch.equal(bits(part[: end - first]), bits(whole[first:end]))
