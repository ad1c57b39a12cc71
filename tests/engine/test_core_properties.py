"""The whole engine on the integer model: any load, any limits, aborts at any time."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from engine.core import EngineCore
from engine.protocol import TokenOutput
from engine.scheduling.order import POLICIES, WAIT_MAX_TOKENS
from engine.scheduling.tiers import BATCH, TIERS
from tests.strategies.integer_model import (
    VOCAB_SIZE,
    IntegerRunner,
    Watcher,
    continuation,
    decode,
    integer_core,
    submit,
)


@dataclass(frozen=True)
class Arrival:
    prompt: list[int]
    max_tokens: int
    domain: str
    step: int
    abort_step: int | None
    tier: str = "default"


@dataclass(frozen=True)
class Load:
    arrivals: list[Arrival]
    num_blocks: int
    block_size: int
    max_batched_tokens: int
    max_num_seqs: int
    scheduling: str
    wait_max_tokens: int = WAIT_MAX_TOKENS
    max_prompt_tokens: int = 0

    def core(self, observer: Watcher | None = None) -> tuple[EngineCore, IntegerRunner]:
        """An engine for it."""
        return integer_core(
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            max_batched_tokens=self.max_batched_tokens,
            max_num_seqs=self.max_num_seqs,
            scheduling=self.scheduling,
            wait_max_tokens=self.wait_max_tokens,
            max_prompt_tokens=self.max_prompt_tokens,
            observer=observer,
        )


def prompts() -> st.SearchStrategy[list[int]]:
    """Many begin alike, as chats with the same instructions do."""
    alike = st.integers(0, 12).map(lambda length: [5, 3, 8, 5, 1, 2, 6, 4, 3, 9, 7, 0][:length])
    rest = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=8)
    return st.builds(lambda first, then: first + then, alike, rest)


@st.composite
def loads(draw: st.DrawFn) -> Load:
    arrival = st.builds(
        Arrival,
        prompt=prompts(),
        max_tokens=st.integers(1, 12),
        domain=st.sampled_from("abc"),
        step=st.integers(0, 15),
        abort_step=st.one_of(st.none(), st.none(), st.integers(0, 30)),
        tier=st.sampled_from(["default", *TIERS]),
    )
    return Load(
        arrivals=draw(st.lists(arrival, min_size=1, max_size=10)),
        num_blocks=draw(st.integers(1, 24)),
        block_size=draw(st.integers(1, 5)),
        max_batched_tokens=draw(st.integers(1, 24)),
        max_num_seqs=draw(st.integers(1, 6)),
        scheduling=draw(st.sampled_from(sorted(POLICIES))),
        wait_max_tokens=draw(st.sampled_from([1, 8, 30, 100, WAIT_MAX_TOKENS, WAIT_MAX_TOKENS])),
        max_prompt_tokens=draw(st.sampled_from([0, 0, 1, 4])),
    )


def fits(load: Load, arrival: Arrival) -> bool:
    return len(arrival.prompt) + arrival.max_tokens - 1 <= load.num_blocks * load.block_size


@given(loads())
def test_every_sequence_gets_exactly_its_own_tokens(load: Load) -> None:
    watcher = Watcher(load.max_batched_tokens, load.max_num_seqs, load.block_size)
    core, _ = load.core(watcher)
    arrivals = {f"s{index}": arrival for index, arrival in enumerate(load.arrivals)}
    received: dict[str, list[TokenOutput]] = {name: [] for name in arrivals}
    refused = set()
    last_step = max(max(arrival.step, arrival.abort_step or 0) for arrival in load.arrivals)
    step = 0
    while core.has_work or step <= last_step:
        for name, arrival in arrivals.items():
            if arrival.step == step:
                refusal = core.add(
                    submit(name, arrival.prompt, arrival.max_tokens, domain=arrival.domain, tier=arrival.tier)
                )
                if refusal is not None:
                    assert refusal.error == "too_long"
                    refused.add(name)
            if arrival.abort_step == step and (ending := core.abort(name)) is not None:
                received[name].append(ending)
        was_preempted = {sequence.rank for sequence in core.scheduler.preempted}
        was_waiting = set(core.scheduler.waiting)
        result = core.step()
        assert result.failure == ""
        for output in result.outputs:
            received[output.sequence_id].append(output)
        still_preempted = [sequence.rank for sequence in core.scheduler.preempted if sequence.rank in was_preempted]
        for entered in was_waiting & set(core.scheduler.running):
            overtook = entered.rank <= max(still_preempted, default=BATCH - 1)
            assert not overtook or entered.owed, "it overtook a preempted one of its rank"
        for sequence in [*core.scheduler.running, *core.scheduler.preempted]:
            # The only waste: what is left of the last block. Blocks are held for known tokens and for no others.
            num_slots = len(sequence.block_ids) * load.block_size
            assert not num_slots or 0 <= num_slots - max(sequence.num_computed_tokens, sequence.num_tokens - 1) < (
                load.block_size + 1
            )
        now = core.stats()
        filled = {}
        for sequence in [*core.scheduler.running, *core.scheduler.preempted]:
            for index, block_id in enumerate(sequence.block_ids):
                here = max(0, min(load.block_size, sequence.num_computed_tokens - index * load.block_size))
                filled[block_id] = max(filled.get(block_id, 0), here)
        assert (now.num_slots_held, now.num_slots_filled) == (len(filled) * load.block_size, sum(filled.values()))
        step += 1
        assert step < 2000, "no progress"

    total_prompt = total_completion = 0
    for name, arrival in arrivals.items():
        assert (name in refused) == (not fits(load, arrival))
        if name in refused:
            assert not received[name]
            continue
        outputs = received[name]
        assert [output.finish_reason is not None for output in outputs] == [False] * (len(outputs) - 1) + [True]
        token_ids = [token_id for output in outputs for token_id in output.token_ids]
        assert token_ids == continuation(arrival.prompt, arrival.max_tokens)[: len(token_ids)]
        assert "".join(output.text for output in outputs) == decode(token_ids)
        last = outputs[-1]
        assert last.num_completion_tokens == len(token_ids)
        assert last.finish_reason in ("length", "abort")
        if last.finish_reason == "length":
            assert len(token_ids) == arrival.max_tokens
            assert last.num_prompt_tokens == len(arrival.prompt)
        else:
            assert arrival.abort_step is not None
            assert last.num_prompt_tokens <= len(arrival.prompt)
        assert last.num_cached_tokens <= max(0, last.num_prompt_tokens - 1)
    assert core.stats().num_batch_tokens == sum(len(evidence.slot_mapping) for evidence in watcher.evidence)
    assert core.stats().num_batch_rows == sum(len(evidence.sequence_ids) for evidence in watcher.evidence)
    for outputs in received.values():
        if outputs:
            total_prompt += outputs[-1].num_prompt_tokens
            total_completion += outputs[-1].num_completion_tokens
    stats = core.stats()
    assert (stats.num_prompt_tokens, stats.num_completion_tokens) == (total_prompt, total_completion)
    assert (stats.num_running, stats.num_waiting, stats.blocks_by_domain) == (0, 0, {})
    assert stats.num_blocks_free == load.num_blocks
    assert not watcher.owner


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12))
def test_round_robin_serves_domains_in_turn(domains: list[str]) -> None:
    core, _ = integer_core(max_num_seqs=1, num_blocks=64, scheduling="round_robin")
    for index, domain in enumerate(domains):
        core.add(submit(f"{domain}{index}", [1], 1, domain=domain))
    order = [output.sequence_id for _ in domains for output in core.step().outputs]
    served: list[str] = []
    left = {domain: [f"{d}{i}" for i, d in enumerate(domains) if d == domain] for domain in set(domains)}
    while any(left.values()):
        served += [left[domain].pop(0) for domain in sorted(left) if left[domain]]
    assert order == served


def test_a_full_pool_preempts_and_everybody_still_finishes() -> None:
    core, _ = integer_core(num_blocks=6, block_size=2, max_num_seqs=4)
    prompts = {f"s{index}": [index + 1] * 3 for index in range(3)}
    for name, prompt in prompts.items():
        core.add(submit(name, prompt, 8))
    token_ids: dict[str, list[int]] = {name: [] for name in prompts}
    while core.has_work:
        for output in core.step().outputs:
            token_ids[output.sequence_id] += output.token_ids
    assert core.stats().num_preemptions > 0
    assert token_ids == {name: continuation(prompt, 8) for name, prompt in prompts.items()}


def test_long_prompts_are_chunked_and_short_ones_join_between() -> None:
    watcher = Watcher(8, 4, 2)
    core, _ = integer_core(num_blocks=64, observer=watcher)
    core.add(submit("long", list(range(1, 31)), 2))
    core.step()
    core.add(submit("short", [5], 2))
    finished: list[str] = []
    while core.has_work:
        finished += [output.sequence_id for output in core.step().outputs if output.finish_reason]
    num_new = [int(evidence.cu_seqlens[1]) for evidence in watcher.evidence]
    assert num_new[:4] == [8, 8, 8, 6], "the prompt takes the whole budget until it is read"
    assert watcher.evidence[3].sequence_ids == ("long", "short"), "what is left of the budget goes to the next"
    assert set(finished) == {"long", "short"}
