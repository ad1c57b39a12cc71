"""Traces of everything that can happen to an engine, as library code: what is asked of it, in which order, and a world
that performs it on the stage of tests/faults (the real engine, a model without arithmetic, the auditor) and keeps the
truth beside it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from hypothesis import strategies as st

from engine.events import StepEvidence, Violation
from engine.protocol import SamplingParams, Submit, TokenOutput
from engine.scheduling.tiers import TIERS
from gateway.audit_observer import AuditObserver
from tests.faults.hidden_states import VOCAB_SIZE, written
from tests.faults.stage import ALIKE, BLOCK_SIZE, Received, Run, prepare, run_again, truth
from tests.strategies.integer_model import NUM_LAYERS

DOMAINS = ("a", "b", "c")
NUM_STEPS_MAX = 3_000


@dataclass(frozen=True)
class Asked:
    """A request; ``num_choices`` sequences begin alike and differ in their seeds."""

    domain: str
    salt: bytes
    prompt: tuple[int, ...]
    sampling: SamplingParams
    tier: str = "default"
    num_choices: int = 1


@dataclass(frozen=True)
class Act:
    """What happens next: ``ask``, ``come`` (asked while the next step computes its n-th layer), ``step`` so often,
    ``abort`` the n-th that is alive, ``evict`` or ``leave`` (all of a domain is aborted and forgotten)."""

    kind: str
    number: int = 1
    domain: str = ""
    asked: Asked | None = None


def samplings() -> st.SearchStrategy[SamplingParams]:
    numbers = st.integers(1, 4) | st.integers(8, 16)

    def build(kind: int, max_tokens: int, seed: int) -> SamplingParams:
        return (
            SamplingParams(max_tokens, temperature=1.0, seed=seed, ignore_eos=True),
            SamplingParams(max_tokens, temperature=1.0, seed=seed, logprobs=2, ignore_eos=True),
            SamplingParams(max_tokens, temperature=1.0, seed=seed, frequency_penalty=1.5, ignore_eos=True),
            SamplingParams(max_tokens, temperature=0.0, logit_bias=((seed, 9.0),), ignore_eos=True),
            SamplingParams(max_tokens, temperature=0.0, grammar=("even", "odd")[seed % 2], ignore_eos=True),
            SamplingParams(max_tokens, temperature=0.0, prompt_logprobs=1, ignore_eos=True),
        )[kind]

    return st.builds(build, st.integers(0, 5), numbers, st.integers(0, 40))


def requests() -> st.SearchStrategy[Asked]:
    rest = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=14)
    prompts = st.builds(lambda num, then: (*ALIKE[:num], *then), st.sampled_from([0, 4, 8, 8]), rest)
    return st.builds(
        Asked,
        domain=st.sampled_from(DOMAINS),
        salt=st.sampled_from([b"", b"salt"]),
        prompt=prompts,
        sampling=samplings(),
        tier=st.sampled_from(["batch", "default", "default", *TIERS]),
        num_choices=st.sampled_from([1, 1, 2, 3]),
    )


def floods() -> st.SearchStrategy[Asked]:
    """More than twice one's share of the rows, so that others' first tokens are owed."""
    sampling = st.integers(2, 9).map(lambda num: SamplingParams(num, temperature=0.0, ignore_eos=True))
    prompts = st.integers(1, 30).map(lambda num: tuple(range(num)))
    domains = st.sampled_from(DOMAINS)
    return st.builds(Asked, domains, st.just(b""), prompts, sampling, st.just("default"), st.integers(5, 9))


def visits() -> st.SearchStrategy[Asked]:
    """What may be owed its first token: one short prompt."""
    prompts = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=8).map(tuple)
    return st.builds(Asked, st.sampled_from(DOMAINS), st.just(b""), prompts, samplings())


def traces() -> st.SearchStrategy[list[Act]]:
    ask = st.builds(lambda asked: Act("ask", asked=asked), requests())
    come = st.builds(lambda asked, layer: Act("come", layer, asked=asked), visits(), st.integers(0, NUM_LAYERS))
    step = st.builds(lambda number: Act("step", number), st.integers(1, 5))
    others = st.builds(Act, st.sampled_from(["abort", "evict", "leave"]), st.integers(0, 9), st.sampled_from(DOMAINS))
    flood = st.builds(lambda asked: Act("ask", asked=asked), floods())
    rush = st.tuples(flood, step, come, step, come, st.just(Act("step", 3)))
    single = (ask | ask | ask | step | step | others).map(lambda act: (act,))
    return st.lists(single | single | single | rush, min_size=5, max_size=18).map(lambda parts: [*chain(*parts)])


def renamed(asked: Asked) -> Asked:
    """The same shape with other content: every token and seed is another, equal ones stay equal."""
    changed: dict[str, Any] = {"seed": asked.sampling.seed + 100}
    if asked.sampling.logit_bias:
        changed["logit_bias"] = tuple(((token + 7) % VOCAB_SIZE, bias) for token, bias in asked.sampling.logit_bias)
    if asked.sampling.grammar:
        changed["grammar"] = "odd" if asked.sampling.grammar == "even" else "even"
    fields = {name: getattr(asked.sampling, name) for name in SamplingParams.__struct_fields__} | changed
    prompt = tuple((token * 5 + 11) % VOCAB_SIZE for token in asked.prompt)
    return Asked(asked.domain, asked.salt, prompt, SamplingParams(**fields), asked.tier, asked.num_choices)


@dataclass
class World:
    """Performs acts. What is not right raises AssertionError at once; ``transcript`` is what one domain could see."""

    victim: str = "a"
    run: Run = field(default_factory=lambda: prepare(audited=True))
    transcript: list[tuple[Any, ...]] = field(default_factory=list)
    received: dict[str, Received] = field(default_factory=dict)
    domain_of: dict[str, str] = field(default_factory=dict)
    alive: list[str] = field(default_factory=list)
    num_asked: int = 0
    coming: list[tuple[int, Submit]] = field(default_factory=list)  # and the layer
    num_broken_off: int = 0

    def __post_init__(self) -> None:
        self._listen()

    def act(self, act: Act) -> None:
        if act.kind == "ask":
            assert act.asked is not None
            self.ask(act.asked)
        elif act.kind == "come":
            assert act.asked is not None
            self.come(act.asked, act.number)
        elif act.kind == "step":
            for _ in range(act.number):
                self.step()
        elif act.kind == "abort" and self.alive:
            self.abort(self.alive[act.number % len(self.alive)])
        elif act.kind == "evict":
            self.run.core.pool.forget_domains([act.domain])
        elif act.kind == "leave":
            for name in [name for name in self.alive if self.domain_of[name] == act.domain]:
                self.abort(name)
            self.run.core.pool.forget_domains([act.domain])

    def ask(self, asked: Asked) -> None:
        for submit in self._submits(asked):
            self._enter(submit)

    def come(self, asked: Asked, layer: int) -> None:
        self.coming += [(layer, submit) for submit in self._submits(asked)]

    def _submits(self, asked: Asked) -> list[Submit]:
        self.num_asked += 1
        submits = []
        for choice in range(asked.num_choices):
            name = f"s{self.num_asked}.{choice}"
            fields = {one: getattr(asked.sampling, one) for one in SamplingParams.__struct_fields__}
            sampling = SamplingParams(**fields | {"seed": asked.sampling.seed + 1_000 * choice})
            submits.append(
                Submit(name, asked.domain, asked.salt, list(asked.prompt), sampling, priority=TIERS[asked.tier])
            )
        return submits

    def _enter(self, submit: Submit) -> None:
        refused = self.run.core.add(submit)
        if refused is not None:
            assert refused.error == "busy"
            return
        self.received[submit.sequence_id] = Received(submit, truth(submit))
        self.domain_of[submit.sequence_id] = submit.domain
        self.alive.append(submit.sequence_id)

    def abort(self, name: str) -> None:
        ending = self.run.core.abort(name)
        assert ending is not None
        self._take([ending])

    def step(self) -> None:
        layers, told = iter(range(1, NUM_LAYERS + 1)), 0

        def newcomers() -> list[Submit]:
            nonlocal told
            layer, new = next(layers), self.coming[told:]
            new = [submit for at, submit in new if at <= layer]
            told += len(new)
            return new

        self.coming.sort(key=lambda one: one[0])
        result = self.run.core.step(newcomers)
        if self.run.core.break_offs.num_broken_off > self.num_broken_off:
            self.num_broken_off += 1
            assert not result.outputs
            self.transcript.append((self.run.core.step_number, "broken off"))
        coming, self.coming = self.coming, []
        for _, submit in coming:
            self._enter(submit)
        assert not result.incidents, result.incidents
        assert not result.failure, result.failure
        self._take(result.outputs)
        self.check()

    def check(self) -> None:
        """The cache and the engine's sequences against plain lists of tokens."""
        core, slots = self.run.core, self.run.runner.slots
        assert set(core._sequences) == set(self.alive)
        for sequence in core._sequences.values():
            own = self.received[sequence.sequence_id]
            tokens = own.submit.prompt_token_ids + own.truth.token_ids[: own.num_tokens]
            assert sequence.token_ids == tokens
            held = slots[sequence.block_ids].reshape(-1)[: sequence.num_computed_tokens].tolist()
            assert held == written(tokens[: sequence.num_computed_tokens])
            assert len(sequence.block_ids) * BLOCK_SIZE >= sequence.num_computed_tokens

    def finish(self) -> None:
        """To the end of everything, and everything again alone; then no block is lost and everybody has had the whole
        answer."""
        for _ in range(NUM_STEPS_MAX):
            if not self.run.core.has_work and not self.coming:
                break
            self.step()
        assert not self.alive
        run_again(self.run)
        assert not self.run.detectors, self.run.detectors
        pool = self.run.core.pool
        assert (pool.num_free, pool.num_by_domain) == (pool.num_blocks, {})

    def restart(self) -> None:
        """A new worker; what ran is gone."""
        self.run = prepare(audited=True)
        self.num_broken_off = 0
        self.alive.clear()
        self._listen()

    def _take(self, outputs: Iterable[TokenOutput]) -> None:
        for output in outputs:
            name = output.sequence_id
            own = self.received[name]
            assert own.is_right(output), (name, output)
            assert own.counts_are_right(output), (name, output)
            assert not output.error
            if output.finish_reason is not None:
                self.alive.remove(name)
            if self.domain_of[name] == self.victim:
                self.transcript.append((self.run.core.step_number, output))

    def _listen(self) -> None:
        """Note the victim's chunks as they are launched."""
        observer = self.run.core._observer
        assert isinstance(observer, AuditObserver)
        before = observer.before_launch

        def listening(evidence: StepEvidence) -> list[Violation]:
            sizes = (evidence.cu_seqlens[1:] - evidence.cu_seqlens[:-1]).tolist()
            rows = zip(evidence.sequence_ids, evidence.domains, sizes, evidence.kv_lens.tolist(), strict=True)
            mine = tuple((name, size, kv_len) for name, domain, size, kv_len in rows if domain == self.victim)
            self.transcript.append((evidence.step, mine))
            return before(evidence)

        observer.before_launch = listening  # type: ignore[method-assign]


def perform(trace: Iterable[Act], world: World | None = None) -> World:
    world = World() if world is None else world
    for act in trace:
        world.act(act)
    world.finish()
    return world


def with_other_content(trace: Iterable[Act], victim: str) -> list[Act]:
    """The same trace, in which everybody but the victim says something else."""
    return [
        Act(act.kind, act.number, act.domain, renamed(act.asked))
        if act.asked is not None and act.asked.domain != victim
        else act
        for act in trace
    ]
