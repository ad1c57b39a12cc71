"""Digests and fills of whole blocks against their twins; every byte counts, and no other block is touched."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import reference
from kernels.cpu.blocks import digest_blocks, fill_blocks
from kernels.cpu.library import load
from tests.kernels.native import bits, isas

pytestmark = pytest.mark.skipif(not isas(), reason="no native kernels: install a C++ compiler, run make native")
KEYS = st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
NUM_BLOCKS = 7
GOLDEN = [[-9009973924190336201, 5292903629061282156]]


def caches(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key, value = (torch.randn((NUM_BLOCKS, *shape), generator=generator).to(dtype) for _ in range(2))
    return key, value


@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    shape=st.tuples(st.sampled_from([1, 3, 16]), st.sampled_from([1, 3]), st.sampled_from([1, 2, 14, 16])),
    block_ids=st.lists(st.integers(0, NUM_BLOCKS - 1), max_size=9),
    key=KEYS,
    num_threads=st.sampled_from([1, 2]),
    data=st.data(),
)
def test_blocks_match_their_twins(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    block_ids: list[int],
    key: tuple[int, int],
    num_threads: int,
    data: st.DataObject,
) -> None:
    library = load()
    library.set_num_threads(num_threads)
    keys, values = caches(shape, dtype, 5)
    ids = torch.tensor(block_ids, dtype=torch.int64)
    found = digest_blocks(library, keys, values, ids, key)
    assert torch.equal(found, reference.digest_blocks(keys, values, ids, key))
    # One flipped bit anywhere changes its block's digest and no other.
    block = data.draw(st.integers(0, NUM_BLOCKS - 1))
    changed = data.draw(st.sampled_from([keys, values]))
    place = data.draw(st.integers(0, changed[0].numel() * dtype.itemsize - 1))
    everything = torch.arange(NUM_BLOCKS)
    before = digest_blocks(library, keys, values, everything, key)
    changed[block].flatten().view(torch.uint8)[place] ^= 1 << data.draw(st.integers(0, 7))
    after = digest_blocks(library, keys, values, everything, key)
    assert (before != after).any(dim=1).nonzero().flatten().tolist() == [block]
    assert not torch.equal(after[block], digest_blocks(library, keys, values, everything, (key[0] ^ 1, key[1]))[block])
    # Filled like the twin fills, and nothing else.
    byte = data.draw(st.sampled_from([0, 255, 170]))
    twins = keys.clone(), values.clone()
    fill_blocks(library, keys, values, ids, byte)
    reference.fill_blocks(*twins, ids, byte)
    assert torch.equal(bits(keys), bits(twins[0]))
    assert torch.equal(bits(values), bits(twins[1]))


def test_a_golden_digest() -> None:
    """The definition is a promise: two processes, two machines and two versions agree."""
    keys = torch.arange(2 * 3 * 2 * 5, dtype=torch.float32).view(2, 3, 2, 5)
    found = digest_blocks(load(), keys, -keys, torch.tensor([1]), (1, 2**63))
    assert found.tolist() == GOLDEN


@pytest.mark.parametrize("block_id", [-1, NUM_BLOCKS])
def test_a_block_that_is_not_there_is_refused(block_id: int) -> None:
    keys, values = caches((2, 1, 4), torch.float32, 1)
    before = keys.clone()
    ids = torch.tensor([0, block_id])
    with pytest.raises(IndexError):
        fill_blocks(load(), keys, values, ids, 0)
    with pytest.raises(IndexError):
        digest_blocks(load(), keys, values, ids, (0, 0))
    assert torch.equal(keys, before)


def test_filled_with_ones_a_block_is_no_number() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        keys, values = caches((2, 1, 4), dtype, 1)
        fill_blocks(load(), keys, values, torch.tensor([3]), 255)
        assert keys[3].isnan().all()
        assert values[3].isnan().all()
        assert not keys[2].isnan().any()
