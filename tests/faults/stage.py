"""The real engine on a model without arithmetic, under a random load, with the truth beside it.

The model's cache holds plain tokens and its logits are a hash of everything that a row can see, so one stale, missing
or foreign token changes what is sampled. It has no checks of its own: the detectors are alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import numpy as np
from numpy.typing import NDArray

from engine.batch import Batch
from engine.core import EngineCore
from engine.events import NullObserver, Observer, SamplingState
from engine.protocol import SamplingParams, Submit
from engine.sampling.row import Row
from engine.sampling.sampler import Picks, pick
from gateway.audit_observer import AuditObserver

VOCAB_SIZE = 64
NUM_STEPS_MAX = 400
LARGE = {"num_blocks": 24, "block_size": 4}
FORMS = {"even": 0, "odd": 1}


def decode(token_ids: object) -> str:
    """One letter a token."""
    return "".join(chr(0x100 + token_id) for token_id in token_ids)  # type: ignore[attr-defined]


class ParityMatcher:
    """A form: an answer of even, or of odd tokens, whose sum so far shifts the parity."""

    def __init__(self, grammar: str) -> None:
        self.grammar = grammar
        self.consumed: list[int] = []

    def allowed(self, output_token_ids: list[int]) -> NDArray[np.bool_] | None:
        self.consumed += output_token_ids[len(self.consumed) :]
        mask: NDArray[np.bool_] = np.arange(VOCAB_SIZE) % 2 == (FORMS[self.grammar] + sum(self.consumed)) % 2
        return mask

    def complete(self, output_token_ids: list[int]) -> bool:
        return False


def logits_of(seen: list[int]) -> NDArray[np.float32]:
    values = np.random.default_rng(seen).integers(-8, 9, VOCAB_SIZE) / 4
    return values.astype(np.float32)


class PlainRunner:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.slots = np.zeros((num_blocks, block_size), dtype=np.int64)  # 0: zeroed, else token id + 1
        self.rows: dict[int, Row] = {}

    def set_row(self, index: int, row: Row) -> None:
        self.rows[index] = row

    def state_of(self, index: int) -> SamplingState:
        return self.rows[index].state() if index in self.rows else SamplingState()

    def scrub(self, block_ids: list[int]) -> None:
        self.slots[block_ids] = 0

    def execute(self, batch: Batch) -> Picks:
        evidence = batch.evidence
        self.slots.reshape(-1)[evidence.slot_mapping] = batch.token_ids + 1
        picks = Picks(np.zeros(len(batch.sampled_rows), dtype=np.int64), {})
        places = zip(batch.sampled_tokens.tolist(), batch.sampled_positions.tolist(), strict=True)
        for place, (token_index, position) in enumerate(places):
            at = int(np.searchsorted(evidence.cu_seqlens, token_index, side="right")) - 1
            kv_len = int(evidence.kv_lens[at])
            blocks = evidence.block_tables[at, : -(-kv_len // self.block_size)]
            seen = self.slots[blocks].reshape(-1)[:kv_len].tolist()
            picked = pick(logits_of(seen), self.rows[int(batch.sampled_rows[place])], position)
            picks.token_ids[place] = picked.token_id
            if picked.logprob is not None:
                picks.logprobs[place] = picked.logprob
        return picks


@dataclass(frozen=True)
class Arrival:
    submit: Submit
    step: int
    abort_step: int = -1


def load(seed: int, num_arrivals: int = 10) -> list[Arrival]:
    """Three domains, two salts, common beginnings, every kind of sampling, aborts."""
    random = Random(seed)
    arrivals = []
    for index in range(num_arrivals):
        prompt = [9, 8, 7, 6, 5, 4, 3, 2][: random.choice([0, 4, 8, 8])]
        prompt += [random.randrange(VOCAB_SIZE) for _ in range(random.randint(1, 7))]
        max_tokens = random.randint(3, 12)
        sampling = (
            SamplingParams(max_tokens, temperature=1.0, seed=random.randrange(1000), ignore_eos=True),
            SamplingParams(max_tokens, temperature=1.0, seed=index, frequency_penalty=1.5, ignore_eos=True),
            SamplingParams(max_tokens, temperature=0.0, logit_bias=((index + 1, 9.0),), ignore_eos=True),
            SamplingParams(max_tokens, temperature=0.0, grammar=random.choice(["even", "odd"]), ignore_eos=True),
            SamplingParams(max_tokens, temperature=0.0, logprobs=2, ignore_eos=True),
        )[random.randrange(5)]
        salt = random.choice([b"", b"salt"])
        abort_step = random.choice([-1, -1, -1, random.randint(2, 25)])
        domain = random.choice("abc")
        arrivals.append(Arrival(Submit(f"s{index}", domain, salt, prompt, sampling), random.randint(0, 8), abort_step))
    return arrivals


def truth(submit: Submit) -> list[int]:
    """What the sequence says alone, without an engine."""
    sampling, tokens = submit.sampling, list(submit.prompt_token_ids)
    matcher = ParityMatcher(sampling.grammar) if sampling.grammar else None
    row = Row(sampling, tokens, len(tokens), (), matcher)
    for _ in range(sampling.max_tokens):
        picked = pick(logits_of([token_id + 1 for token_id in tokens]), row, len(tokens))
        tokens.append(picked.token_id)
    return tokens[len(submit.prompt_token_ids) :]


@dataclass
class Run:
    """What happened; steps are -1 where it never did."""

    core: EngineCore
    runner: PlainRunner
    reached_step: int = -1
    wrong_output_step: int = -1
    wrong_count_step: int = -1
    wrong_sum_step: int = -1
    wrong_end: bool = False
    change_batch: Callable[[Batch], Batch] | None = None  # a fault in what the engine builds
    detected_step: int = -1
    detectors: list[str] = field(default_factory=list)
    num_steps: int = 0

    def reach(self) -> None:
        if self.reached_step < 0:
            self.reached_step = self.core.step_number

    def note(self, name: str, step: int) -> None:
        self.detectors.append(name)
        if self.detected_step < 0:
            self.detected_step = step


def prepare(audited: bool) -> Run:
    observer: Observer = AuditObserver(LARGE["num_blocks"], LARGE["block_size"]) if audited else NullObserver()
    runner = PlainRunner(**LARGE)
    core = EngineCore(
        runner,
        decode=decode,
        eos_token_ids=frozenset(),
        context_max=96,
        vocab_size=VOCAB_SIZE,
        max_batched_tokens=16,
        max_num_seqs=5,
        max_waiting=100,
        observer=observer,
        matchers=ParityMatcher,
    )
    return Run(core, runner)


def perform(run: Run, arrivals: list[Arrival]) -> None:
    """Run the load to its end, comparing with the truth at every step."""
    truths = {one.submit.sequence_id: truth(one.submit) for one in arrivals}
    by_name = {one.submit.sequence_id: one for one in arrivals}
    sent: dict[str, int] = dict.fromkeys(truths, 0)
    text: dict[str, str] = dict.fromkeys(truths, "")
    core = run.core
    last = max(max(one.step, one.abort_step) for one in arrivals)
    try:
        for step in range(NUM_STEPS_MAX):
            if not core.has_work and step > last:
                break
            outputs = []
            for name, one in by_name.items():
                if one.step == step:
                    core.add(one.submit)
                if one.abort_step == step and (ending := core.abort(name)) is not None:
                    outputs.append(ending)
            result = core.step()
            run.num_steps += 1
            for incident in result.incidents:
                run.note(incident.kind, core.step_number)
            if result.failure:
                run.note("engine's own check", core.step_number)
            for output in (*outputs, *result.outputs):
                name, num_new = output.sequence_id, len(output.token_ids)
                own = truths.get(name, [])
                expected = own[sent.get(name, 0) : sent.get(name, 0) + num_new]
                sent[name] = sent.get(name, 0) + num_new
                text[name] = text.get(name, "") + output.text
                whole = output.finish_reason == "length" and sent[name] != len(own)
                right_text = decode(own).startswith(text[name])
                named = all(one.token_id in output.token_ids for one in output.logprobs)
                if (list(output.token_ids) != expected or whole or not right_text or not named) and (
                    run.wrong_output_step < 0
                ):
                    run.wrong_output_step = core.step_number
                num_prompt = len(by_name[name].submit.prompt_token_ids) if name in by_name else 0
                wrong = num_new > 0 and output.num_prompt_tokens != num_prompt
                wrong |= output.num_completion_tokens != sent[name]
                if not output.error and wrong and run.wrong_count_step < 0:
                    run.wrong_count_step = core.step_number
            pool = core.pool
            total = pool.num_free + sum(pool.num_by_domain.values()) + pool.num_blocks - pool.num_usable
            if total != pool.num_blocks and run.wrong_sum_step < 0:
                run.wrong_sum_step = core.step_number
    except Exception as error:  # a check of the engine's own: the worker would end here
        run.note(f"engine's own check ({type(error).__name__})", core.step_number)
    run.wrong_end = bool(core.has_work or core.pool.num_by_domain or run.wrong_sum_step >= 0)
