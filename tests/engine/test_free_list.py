"""The free list against a plain list."""

from hypothesis import given
from hypothesis import strategies as st

from engine.free_list import FreeList


@given(st.integers(1, 8), st.lists(st.tuples(st.sampled_from(["first", "last", "pop", "remove"]), st.integers(0, 7))))
def test_it_is_a_list(num_blocks: int, calls: list[tuple[str, int]]) -> None:
    free, model = FreeList(num_blocks), list(range(num_blocks))
    for call, number in calls:
        block_id = number % num_blocks
        if call == "pop" and model:
            assert free.pop_first() == model.pop(0)
        elif call == "remove" and block_id in model:
            free.remove(block_id)
            model.remove(block_id)
        elif call == "first" and block_id not in model:
            free.push_first(block_id)
            model.insert(0, block_id)
        elif call == "last" and block_id not in model:
            free.push_last(block_id)
            model.append(block_id)
        assert list(free) == model
        assert len(free) == len(model)
        assert [block_id in free for block_id in range(num_blocks)] == [b in model for b in range(num_blocks)]
