"""The pool against a model of a few dictionaries, under any order of calls."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.block_pool import BlockPool, BlockState
from engine.errors import OutOfBlocksError
from engine.events import EngineEvent

DOMAINS = st.sampled_from(["a", "b", "c"])


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.holdings: dict[str, tuple[str, list[int]]] = {}  # sequence -> (domain, blocks)
        self.fenced: set[int] = set()
        self.quarantined: set[int] = set()
        self.content: dict[int, str] = {}
        self.generation: dict[int, int] = {}
        self.events: list[EngineEvent] = []
        self.in_flight = False
        self.step = 0
        self.num_made = 0

    @initialize(num_blocks=st.integers(1, 12))
    def make(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, scrub=self.scrub, on_event=self.events.append)

    def scrub(self, block_ids: list[int]) -> None:
        held = {block for _, blocks in self.holdings.values() for block in blocks}
        assert not held & set(block_ids), "scrubbed a block in use"
        assert not self.fenced & set(block_ids), "scrubbed a block that a launched step may read"
        for block in block_ids:
            del self.content[block]

    def num_free(self) -> int:
        num_held = sum(len(blocks) for _, blocks in self.holdings.values())
        return self.pool.num_blocks - num_held - len(self.fenced) - len(self.quarantined)

    @rule(num_blocks=st.integers(0, 6), domain=DOMAINS)
    def allocate(self, num_blocks: int, domain: str) -> None:
        name, self.num_made = f"s{self.num_made}", self.num_made + 1
        if num_blocks > self.num_free():
            before = [(block.state, block.generation) for block in self.pool.blocks]
            with pytest.raises(OutOfBlocksError):
                self.pool.allocate(num_blocks, domain=domain, sequence_id=name)
            assert before == [(block.state, block.generation) for block in self.pool.blocks], "not all or nothing"
            return
        blocks = self.pool.allocate(num_blocks, domain=domain, sequence_id=name)
        assert len(set(blocks)) == num_blocks
        for block in blocks:
            assert all(block not in others for _, others in self.holdings.values()), "two owners"
            assert block not in self.fenced | self.quarantined
            assert self.content.get(block, domain) == domain, "another domain's content was not scrubbed"
            assert self.pool.blocks[block].generation > self.generation.get(block, 0)
            self.content[block] = domain
            self.generation[block] = self.pool.blocks[block].generation
        self.holdings[name] = (domain, blocks)

    @precondition(lambda self: self.holdings)
    @rule(data=st.data())
    def seal(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.holdings)))
        for block in self.holdings[name][1]:
            if self.pool.blocks[block].state is BlockState.WRITING:
                self.pool.seal(block, sequence_id=name)
                return

    @precondition(lambda self: self.holdings)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.holdings)))
        _, blocks = self.holdings.pop(name)
        self.pool.release(blocks, sequence_id=name)
        if self.in_flight:
            self.fenced.update(set(blocks) - self.quarantined)

    @precondition(lambda self: self.holdings)
    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.holdings)))
        _, blocks = self.holdings.pop(name)
        self.pool.quarantine(blocks, sequence_id=name)
        self.pool.release(blocks, sequence_id=name)  # as the scheduler does afterwards: harmless
        self.quarantined.update(blocks)

    @precondition(lambda self: not self.in_flight)
    @rule()
    def launch(self) -> None:
        self.step += 1
        self.in_flight = True
        self.pool.launched(self.step)

    @precondition(lambda self: self.in_flight)
    @rule()
    def complete(self) -> None:
        self.in_flight = False
        self.fenced.clear()
        self.pool.completed(self.step)

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "pool"):
            return
        assert self.pool.num_free == self.num_free(), "a leak"
        by_domain: dict[str, int] = {}
        for domain, blocks in self.holdings.values():
            if blocks:
                by_domain[domain] = by_domain.get(domain, 0) + len(blocks)
        assert self.pool.num_by_domain == by_domain

    @invariant()
    def events_tell_the_owners(self) -> None:
        if not hasattr(self, "pool"):
            return
        owners: dict[int, str] = {}
        for event in self.events:
            if event.kind == "allocate":
                assert event.block_id not in owners
                owners[event.block_id] = event.domain
            elif event.kind == "free":
                assert owners.pop(event.block_id) == event.domain
        assert owners == {block: domain for domain, blocks in self.holdings.values() for block in blocks}


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
