"""The engine's Observer, backed by the isolation auditor.

Translation only: engine evidence in, plain values to the auditor, plain findings back. Neither room knows the other.
Digests of sampling parameters are made here, from the objects themselves: neither room makes the other's.
"""

import hashlib
import time
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from audit.runtime.block_digests import Digest
from audit.runtime.head_weight import mapped
from audit.runtime.head_witness import HeadWitness
from audit.runtime.isolation import BLOCKS_PER_STEP, SLOTS_PER_STEP, IsolationAuditor
from audit.runtime.launch import Head, KernelArrays, Launch, Logprob
from audit.runtime.released_tokens import Output
from audit.runtime.sampling_rows import SampledRow, SamplingFacts, ScoredRow
from engine.errors import BrokenOffError
from engine.events import EngineEvent, SamplingState, StepEvidence, Violation, Watched, Words
from engine.events import KernelArrays as HeldArrays
from engine.protocol import SamplingParams, Submit, TokenLogprob, TokenOutput
from engine.sampling.sampler import Picks
from engine.text.tokenizer import Tokenizer
from gateway.own_runs import NOTHING, OwnRuns, OwnRunSettings
from gateway.spelling import spelling

SELF_TEST_INTERVAL_STEPS = 256  # how often the auditor must prove that it is awake while the engine is busy
SELF_TEST_INTERVAL_S = 5.0  # and at the latest after this long, so that an idle engine is covered too
NUM_DIGESTS_KEPT = 4096  # of sampling parameters; the others' are made again


class Digests:
    """SHA-256 of sampling parameters, remembered by object. Parameters are frozen, and an object that is remembered is
    kept alive, so that no other can take its place."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[SamplingParams, bytes]] = {}
        self._facts: dict[int, tuple[SamplingParams | None, str, tuple[bool, ...], bytes, SamplingFacts]] = {}

    def of(self, sampling: SamplingParams | None) -> bytes:
        if sampling is None:
            return b""
        known = self._known.get(id(sampling))
        if known is None:
            if len(self._known) >= NUM_DIGESTS_KEPT:
                self._known.clear()
            known = sampling, hashlib.sha256(msgspec.msgpack.encode(sampling)).digest()
            self._known[id(sampling)] = known
        return known[1]

    def facts(self, sampling: SamplingParams | None, form: str, kind: tuple[bool, ...], bias: bytes) -> SamplingFacts:
        """Remembered by everything that they are made of; the last ones of each parameters."""
        known = self._facts.get(id(sampling))
        if known is None or known[0] is not sampling or known[1:4] != (form, kind, bias):
            if len(self._facts) >= NUM_DIGESTS_KEPT:
                self._facts.clear()
            made = SamplingFacts(self.of(sampling), form_digest(form), bias, kind)
            known = self._facts[id(sampling)] = (sampling, form, kind, bias, made)
        return known[4]


def form_digest(grammar: str) -> bytes:
    return hashlib.sha256(grammar.encode()).digest() if grammar else b""


def bias_bytes(ids: NDArray[np.int64], values: NDArray[np.float64]) -> bytes:
    return ids.tobytes() + values.tobytes()


def _logprob(told: TokenLogprob) -> Logprob:
    return Logprob(told.token_id, told.logprob, told.top, told.rank)


def _logprobs(told: Sequence[TokenLogprob]) -> list[Logprob]:
    return [_logprob(one) for one in told] if told else []


def _arrays(held: HeldArrays | None) -> KernelArrays | None:
    if held is None:
        return None
    given = held.token_ids, held.positions, held.wanted, held.sampled_positions, held.sampled_rows
    return KernelArrays(*given, held.cu_seqlens, held.kv_lens, held.block_tables, held.slot_mapping)


def _witness(watched: Watched, log: Callable[[str], None]) -> HeadWitness | None:
    """From the model's own files; None, and said, where the head cannot be witnessed."""
    facts = watched.head
    if facts is None:
        log("the head's work is not shown by this model on its kernels: the auditor does not compare logits")
        return None
    try:
        weight = mapped(watched.model_dir, facts.tensor)
        return HeadWitness(weight, is_bfloat16=facts.is_bfloat16, scale=facts.scale)
    except (OSError, ValueError) as error:
        log(f"the head's weight cannot be read: {error}; the auditor does not compare logits")
        return None


def _scored(evidence: StepEvidence) -> list[ScoredRow]:
    rows, at = [], 0
    for one in evidence.scored:
        end = at + len(one.next_token_ids)
        rows.append(ScoredRow(one.index, evidence.scored_tokens[at:end].tolist(), one.next_token_ids))
        at = end
    return rows


def observer_of(
    watched: Watched,
    *,
    slots_per_step: int = SLOTS_PER_STEP,
    blocks_per_step: int = BLOCKS_PER_STEP,
    own: OwnRunSettings = NOTHING,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> "AuditObserver":
    """The auditor of one engine, with what it may look at; ``seed`` decides which bytes of the cache are read, which
    sequences are run again and what canaries hide: it is a secret."""
    tokenizer = Tokenizer.load(watched.model_dir)
    spell = spelling(tokenizer)
    if own.replay_percent and not watched.exact:
        log("isolation is relaxed: an answer may depend on its company in the last bits, and none is run again alone")
    if spell is None:
        log("the text of this vocabulary is not its tokens' bytes: the auditor does not compare text")
    return AuditObserver(
        watched.num_blocks,
        watched.block_size,
        memory=watched.memory,
        digest=watched.digest,
        spell=spell,
        head=_witness(watched, log),
        slots_per_step=slots_per_step,
        blocks_per_step=blocks_per_step,
        own=OwnRuns(own, exact=watched.exact, encode=tokenizer.encode, seed=seed),
        seed=seed,
    )


class AuditObserver:
    """The engine's Observer, backed by the isolation auditor."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        memory: Sequence[Words] = (),
        digest: Digest | None = None,
        spell: Callable[[int], bytes] | None = None,
        head: HeadWitness | None = None,
        slots_per_step: int = SLOTS_PER_STEP,
        blocks_per_step: int = BLOCKS_PER_STEP,
        own: OwnRuns | None = None,
        seed: int = 0,
    ) -> None:
        self._own = own or OwnRuns(NOTHING)
        self._slots_per_step = slots_per_step
        self._auditor = IsolationAuditor(
            num_blocks,
            block_size,
            memory=memory,
            digest=digest,
            spell=spell,
            head=head,
            slots_per_step=slots_per_step,
            blocks_per_step=blocks_per_step,
            seed=seed,
        )
        self._has_head = head is not None
        self._digests = Digests()
        self._last_self_test_s = float("-inf")
        self._steps_since_self_test = 0

    def on_events(self, events: list[EngineEvent]) -> None:
        for event in events:
            self._own.on_event(event)
            self._auditor.on_event(
                kind=event.kind,
                step=event.step,
                block_id=event.block_id,
                generation=event.generation,
                domain=event.domain,
                sequence_id=event.sequence_id,
                token_ids=event.token_ids,
                cache_salt=event.cache_salt,
                sampling=None if event.sampling is None else self._expected(event.sampling),
            )

    def before_launch(self, evidence: StepEvidence) -> list[Violation]:
        violations = self._auditor.check_step(
            step=evidence.step,
            sequence_ids=evidence.sequence_ids,
            domains=evidence.domains,
            token_ids=evidence.token_ids,
            cu_seqlens=evidence.cu_seqlens,
            kv_lens=evidence.kv_lens,
            block_tables=evidence.block_tables,
            slot_mapping=evidence.slot_mapping,
            sampled=self._sampled(evidence),
            scored=_scored(evidence),
            positions=evidence.positions,
            num_blocks_free=evidence.num_blocks_free,
        )
        self._steps_since_self_test += 1
        return [(v.kind, v.sequence_ids, v.domains, v.block_id, v.detail) for v in violations]

    def after_launch(self, step: int, picks: Picks) -> None:
        logprobs = {place: _logprob(one) for place, one in picks.logprobs.items()}
        scores = {row: None if told is None else _logprobs(told) for row, told in picks.scores.items()}
        head = None if picks.head is None else Head(picks.head.hidden, picks.head.logits)
        launch = Launch(_arrays(picks.arrays), logprobs, scores, head)
        self._auditor.on_sampled(step, picks.token_ids.tolist(), launch)

    def broken_off(self, step: int, broken: BrokenOffError) -> None:
        self._auditor.on_broken_off(step, _arrays(broken.arrays))

    def before_release(self, step: int, outputs: Sequence[TokenOutput]) -> list[Violation]:
        told = [
            Output(
                output.sequence_id,
                output.token_ids,
                output.num_prompt_tokens,
                output.num_cached_tokens,
                output.num_completion_tokens,
                bool(output.error),
                output.text,
                _logprobs(output.logprobs),
                _logprobs(output.prompt_logprobs),
                output.finish_reason or "",
            )
            for output in outputs
        ]
        found = self._auditor.check_outputs(step, told)
        violations: list[Violation] = [(v.kind, v.sequence_ids, v.domains, v.block_id, v.detail) for v in found]
        distrusted = frozenset(name for violation in violations for name in violation[1])
        return violations + self._own.hear(step, told, distrusted)

    def next_run(self, *, idle: bool) -> Submit | None:
        return self._own.next(idle=idle)

    def forget_domain(self, domain: str) -> Sequence[str]:
        return self._own.forget_domain(domain)

    def _expected(self, sampling: SamplingParams) -> SamplingFacts:
        """What the row of a sequence with these parameters must hold."""
        ids = np.array([token_id for token_id, _ in sampling.logit_bias], dtype=np.int64)
        values = np.array([bias for _, bias in sampling.logit_bias], dtype=np.float64)
        penalties = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        has = (bool(sampling.grammar), bool(len(ids)), penalties != (1.0, 0.0, 0.0))
        kind = (*has, not (any(has) or sampling.min_tokens))
        form, may_cut = form_digest(sampling.grammar), bool(sampling.stop)
        return SamplingFacts(self._digests.of(sampling), form, bias_bytes(ids, values), kind, may_cut)

    def _found(self, state: SamplingState) -> SamplingFacts:
        kind = (state.has_form, state.has_bias, state.has_penalties, state.plain)
        bias = b""
        if (
            state.bias_ids is not None
            and state.bias_values is not None
            and state.bias_ids.size + state.bias_values.size
        ):
            bias = bias_bytes(state.bias_ids, state.bias_values)
        return self._digests.facts(state.sampling, state.form, kind, bias)

    def _sampled(self, evidence: StepEvidence) -> list[SampledRow]:
        return [
            SampledRow(
                row,
                token_index,
                position,
                stable_row,
                state.sequence_id,
                self._found(state),
                state.num_prompt_tokens,
                state.token_ids,
                state.form_token_ids,
                state.seen,
                state.counts,
                state.num_counted,
            )
            for row, token_index, position, stable_row, state in zip(
                evidence.sampled_index,
                evidence.sampled_tokens.tolist(),
                evidence.sampled_positions.tolist(),
                evidence.sampled_rows.tolist(),
                evidence.sampling,
                strict=True,
            )
        ]

    def counters(self) -> dict[str, int]:
        """The auditor's counts, after a self-test if one is due. Called by the worker once a second."""
        now_s = time.monotonic()
        due = now_s - self._last_self_test_s >= SELF_TEST_INTERVAL_S
        if due or self._steps_since_self_test >= SELF_TEST_INTERVAL_STEPS:
            self._auditor.self_test()
            self._last_self_test_s = now_s
            self._steps_since_self_test = 0
        own, counters = self._own.counters(), self._auditor.counters()
        counters["num_violations"] += own["num_replays_differing"] + own["num_canary_leaks"]
        return counters | own | {"slots_per_step": self._slots_per_step, "head_is_witnessed": int(self._has_head)}
