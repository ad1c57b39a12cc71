"""The pool against a model of a few dictionaries, under any order of calls."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.cache.block_pool import BlockPool, BlockState
from engine.cache.cache_shares import CacheShares
from engine.cache.prefix_index import Prefix
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
        self.published: dict[int, Prefix] = {}
        self.num_published = 0
        self.in_flight = False
        self.step = 0
        self.num_made = 0

    @initialize(
        num_blocks=st.integers(1, 12),
        floor_percent=st.sampled_from([0, 0, 25, 50]),
        ceiling_percent=st.sampled_from([100, 100, 50, 20, 1]),
        kept_free=st.integers(0, 6),
    )
    def make(self, num_blocks: int, floor_percent: int, ceiling_percent: int, kept_free: int) -> None:
        self.floor_percent, self.ceiling_percent, self.kept_free = floor_percent, ceiling_percent, kept_free
        shares = CacheShares(floor_percent, ceiling_percent, kept_free)
        self.pool = BlockPool(num_blocks, scrub=self.scrub, on_event=self.hear, shares=shares)

    def scrub(self, block_ids: list[int]) -> None:
        assert not self.held() & set(block_ids), "scrubbed a block in use"
        assert not set(self.published) & set(block_ids), "scrubbed a block that may still be shared"
        assert not self.fenced & set(block_ids), "scrubbed a block that a launched step may read"
        for block in block_ids:
            del self.content[block]

    def held(self) -> set[int]:
        return {block for _, blocks in self.holdings.values() for block in blocks}

    def hear(self, event: EngineEvent) -> None:
        self.events.append(event)
        if event.kind == "evict":
            del self.published[event.block_id]

    def cached(self) -> dict[str, int]:
        """How many published blocks of each domain nobody reads."""
        idle = set(self.published) - self.held() - self.fenced - self.quarantined
        return dict(Counter(self.published[block].domain for block in idle))

    def floor(self, domain: str) -> int:
        num_usable = self.pool.num_blocks - len(self.quarantined)
        reserved = max(0, min(num_usable * self.floor_percent // 100, num_usable - self.kept_free))
        users = {owner for owner, blocks in self.holdings.values() if blocks} | set(self.cached()) | {domain}
        return reserved // len(users)

    def num_available(self, domain: str) -> int:
        floor = self.floor(domain)
        return self.num_free() - sum(min(num, floor) for other, num in self.cached().items() if other != domain)

    def check_floors(self, domain: str, floor: int, before: dict[str, int]) -> None:
        """What an allocation of ``domain`` must not have done to the others."""
        after = self.cached()
        for other, num in before.items():
            assert other == domain or after.get(other, 0) >= min(num, floor), "evicted below the floor"

    def num_free(self) -> int:
        return self.pool.num_blocks - len(self.held()) - len(self.fenced) - len(self.quarantined)

    @rule(num_blocks=st.integers(0, 6), domain=DOMAINS)
    def allocate(self, num_blocks: int, domain: str) -> None:
        name, self.num_made = f"s{self.num_made}", self.num_made + 1
        assert self.pool.num_available(domain) == self.num_available(domain)
        assert self.num_available(domain) + len(self.held()) + len(self.fenced) >= self.pool.num_promised
        floor, cached = self.floor(domain), self.cached()
        if num_blocks > self.num_available(domain):
            before = [(block.state, block.generation) for block in self.pool.blocks]
            with pytest.raises(OutOfBlocksError):
                self.pool.allocate(num_blocks, domain=domain, sequence_id=name)
            assert before == [(block.state, block.generation) for block in self.pool.blocks], "not all or nothing"
            return
        blocks = self.pool.allocate(num_blocks, domain=domain, sequence_id=name)
        assert len(set(blocks)) == num_blocks
        for block in blocks:
            assert block not in self.held(), "two owners"
            assert block not in self.fenced | self.quarantined
            assert block not in self.published, "it may still be shared"
            assert self.content.get(block, domain) == domain, "another domain's content was not scrubbed"
            assert self.pool.blocks[block].generation > self.generation.get(block, 0)
            self.content[block] = domain
            self.generation[block] = self.pool.blocks[block].generation
        self.holdings[name] = (domain, blocks)
        self.check_floors(domain, floor, cached)

    @precondition(lambda self: self.holdings)
    @rule(data=st.data())
    def seal(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.holdings)))
        for block in self.holdings[name][1]:
            if self.pool.blocks[block].state is BlockState.WRITING:
                self.pool.seal(block, sequence_id=name)
                return

    @precondition(lambda self: self.holdings)
    @rule(data=st.data(), known=st.booleans())
    def publish(self, data: st.DataObject, known: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.holdings)))
        domain, blocks = self.holdings[name]
        for block in blocks:
            if self.pool.blocks[block].state is BlockState.SEALED and block not in self.published:
                taken = [prefix for prefix in self.published.values() if prefix.domain == domain]
                self.num_published += 1
                prefix = Prefix(domain, b"", str(self.num_published).encode(), (self.num_published,))
                if known and taken:
                    prefix = taken[0]  # the first to publish it stays
                else:
                    self.published[block] = prefix
                self.pool.publish(block, prefix, sequence_id=name)
                return

    @precondition(lambda self: self.published)
    @rule(data=st.data(), num_blocks=st.integers(0, 4))
    def share(self, data: st.DataObject, num_blocks: int) -> None:
        block = data.draw(st.sampled_from(sorted(self.published)))
        prefix = self.published[block]
        name, self.num_made = f"s{self.num_made}", self.num_made + 1
        if block in self.fenced:
            assert self.pool.find(prefix) is None
            return
        assert self.pool.find(prefix) == block
        assert self.pool.find(replace(prefix, domain="stranger")) is None
        assert self.pool.find(replace(prefix, token_ids=(-1,))) is None
        generation, content = self.pool.blocks[block].generation, self.content[block]
        num_free_after = self.num_available(prefix.domain) - (block not in self.held())
        floor, cached = self.floor(prefix.domain), self.cached()
        if num_blocks > num_free_after:
            with pytest.raises(OutOfBlocksError):
                self.pool.allocate(num_blocks, domain=prefix.domain, sequence_id=name, shared=[block])
            assert self.pool.blocks[block].generation == generation
            return
        blocks = self.pool.allocate(num_blocks, domain=prefix.domain, sequence_id=name, shared=[block])
        assert blocks[0] == block
        assert (self.pool.blocks[block].generation, self.content[block]) == (generation, content)
        for other in blocks[1:]:
            assert other not in self.held() | self.fenced | self.quarantined
            assert other not in self.published
            assert self.content.get(other, prefix.domain) == prefix.domain
            self.content[other] = prefix.domain
            self.generation[other] = self.pool.blocks[other].generation
        self.holdings[name] = (prefix.domain, blocks)
        self.check_floors(prefix.domain, floor, cached)

    @precondition(lambda self: self.holdings)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.holdings)))
        _, blocks = self.holdings.pop(name)
        self.pool.release(blocks, sequence_id=name)
        if self.in_flight:
            self.fenced.update(set(blocks) - self.quarantined - self.held())

    @precondition(lambda self: self.holdings)
    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.holdings)))
        domain, blocks = self.holdings.pop(name)
        self.pool.quarantine(blocks, sequence_id=name)
        self.quarantined.update(blocks)
        for other, (_, theirs) in list(self.holdings.items()):  # as the engine does: who shares one goes with it
            if set(theirs) & set(blocks):
                self.pool.release(self.holdings.pop(other)[1], sequence_id=other)
                if self.in_flight:
                    self.fenced.update(set(theirs) - self.quarantined - self.held())
        self.pool.forget_domains([domain])
        assert all(prefix.domain != domain for prefix in self.published.values())

    @rule(data=st.data())
    def quarantine_a_block_that_nobody_holds(self, data: st.DataObject) -> None:
        idle = [block for block in range(self.pool.num_blocks) if block not in self.held()]
        if idle:
            block = data.draw(st.sampled_from(idle))
            self.pool.quarantine([block], sequence_id="")
            self.fenced.discard(block)
            self.quarantined.add(block)

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
        assert self.pool.num_published == len(self.published)
        assert self.pool.num_usable == self.pool.num_blocks - len(self.quarantined)
        assert self.pool.num_cached_by_domain == self.cached()
        for num in self.cached().values():  # quarantines lower a ceiling without evicting anything
            assert num <= self.pool.num_blocks * self.ceiling_percent // 100, "above the ceiling"
        by_domain: dict[str, set[int]] = {}
        for domain, blocks in self.holdings.values():
            if blocks:
                by_domain.setdefault(domain, set()).update(blocks)
        assert self.pool.num_by_domain == {domain: len(blocks) for domain, blocks in by_domain.items()}

    @invariant()
    def events_tell_the_owners(self) -> None:
        if not hasattr(self, "pool"):
            return
        holders: dict[int, set[tuple[str, str]]] = {}
        for event in self.events:
            if event.kind == "allocate":
                assert not holders.get(event.block_id)
            if event.kind in ("allocate", "share"):
                holders.setdefault(event.block_id, set()).add((event.domain, event.sequence_id))
            elif event.kind == "free":
                holders[event.block_id].remove((event.domain, event.sequence_id))
        expected: dict[int, set[tuple[str, str]]] = {}
        for name, (domain, blocks) in self.holdings.items():
            for block in blocks:
                expected.setdefault(block, set()).add((domain, name))
        assert {block: names for block, names in holders.items() if names} == expected


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
