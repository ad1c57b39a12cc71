"""Blocks that leave their domain, and owners as the auditor asks for them."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import reference
from kernels.gpu.gather_tags import gather_tags
from kernels.gpu.scrub_blocks import BLOCK, scrub_blocks
from tests.kernels.gpu.steps import DEVICE, few
from tests.kernels.native import bits


@few
@given(ids=st.lists(st.integers(-1, 5), max_size=4, unique=True), size=st.sampled_from([2, 16]))
def test_scrubbed_blocks_are_zero_and_nobodys(ids: list[int], size: int) -> None:
    """5 and -1 are no blocks: nothing happens to them, or to anyone else."""
    memory = torch.full((2, 2, 5, 9, 8, size), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    assert (9 * 8 * size > BLOCK) == (size == 16), "a block in one piece, and in two"
    tags = torch.arange(1, 6, dtype=torch.int64, device=DEVICE)
    twin, twin_tags = memory.cpu().clone(), tags.cpu().clone()
    scrub_blocks(memory, torch.tensor(ids, dtype=torch.int64, device=DEVICE), tags)
    reference.scrub_blocks(twin, torch.tensor(ids, dtype=torch.int64), twin_tags)
    assert torch.equal(bits(memory.cpu()), bits(twin))
    assert torch.equal(tags.cpu(), twin_tags)
    for block in range(5):
        part = memory[:, :, block].cpu()
        assert (part == 0).all() if block in ids else part.isnan().all()
        assert int(tags[block]) == (0 if block in ids else block + 1)


@few
@given(
    kv_lens=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    entries=st.lists(st.integers(-2, 5), min_size=9, max_size=9),
)
def test_owners_are_those_of_the_blocks_that_a_row_reads(kv_lens: list[int], entries: list[int]) -> None:
    tables = torch.tensor(entries, dtype=torch.int32).view(3, 3)[: len(kv_lens)].contiguous()
    tags = torch.tensor([11, 12, 13, 14, 15], dtype=torch.int64)
    lengths = torch.tensor(kv_lens, dtype=torch.int32)
    got = gather_tags(tables.to(DEVICE), lengths.to(DEVICE), tags.to(DEVICE), 4).cpu()
    assert torch.equal(got, reference.gather_tags(tables, lengths, tags, 4))
    for row, kv_len in enumerate(kv_lens):
        for entry in range(3):
            block = int(tables[row, entry])
            owner = int(tags[block]) if 0 <= block < 5 else -1
            assert got[row, entry] == (owner if entry * 4 < kv_len else 0)
