"""The free lists against plain lists."""

from hypothesis import given
from hypothesis import strategies as st

from engine.cache.free_list import FreeLists

CALLS = st.tuples(
    st.sampled_from(["first", "last", "pop", "remove"]), st.integers(0, 7), st.sampled_from(["", "a", "b"])
)


@given(st.integers(1, 8), st.lists(CALLS, max_size=60))
def test_they_are_lists(num_blocks: int, calls: list[tuple[str, int, str]]) -> None:
    free = FreeLists(num_blocks)
    model: dict[str, list[int]] = {"": list(range(num_blocks)), "a": [], "b": []}
    for call, number, name in calls:
        block_id = number % num_blocks
        held = [other for other, blocks in model.items() if block_id in blocks]
        if call == "pop" and model[name]:
            block_id = free.first_of(name)
            assert block_id == model[name].pop(0)
            free.remove(block_id)
        elif call == "remove" and held:
            free.remove(block_id)
            model[held[0]].remove(block_id)
        elif call == "first" and not held:
            free.push_first(block_id, name)
            model[name].insert(0, block_id)
        elif call == "last" and not held:
            free.push_last(block_id, name)
            model[name].append(block_id)
        assert {name: list(free.blocks_of(name)) for name in model} == model
        assert free.lengths == {name: len(blocks) for name, blocks in model.items() if blocks or not name}
        assert len(free) == sum(map(len, model.values()))
        assert [block_id in free for block_id in range(num_blocks)] == [
            any(block_id in blocks for blocks in model.values()) for block_id in range(num_blocks)
        ]
