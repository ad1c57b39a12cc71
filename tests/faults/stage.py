"""The real engine on a model without arithmetic, under a random load, with the truth beside it.

The model's cache holds plain tokens with their positions and its logits are a hash of everything that a row can see, so
one stale, missing, misplaced or foreign token changes what is sampled. It has no checks of its own: the detectors are
alone.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from audit.runtime.head_witness import HeadWitness
from engine.batch import Batch
from engine.core import EngineCore
from engine.errors import BrokenOffError
from engine.events import HeadWork, KernelArrays, NullObserver, Observer, SamplingState
from engine.own_runs import OwnRuns as EngineOwnRuns
from engine.protocol import SamplingParams, Submit, TokenLogprob, TokenOutput
from engine.sampling.row import Row
from engine.sampling.sampler import Picks, pick, scored
from engine.scheduling.break_off import GoOn
from engine.scheduling.tiers import TIERS
from gateway.audit_observer import AuditObserver
from gateway.own_runs import OwnRuns, OwnRunSettings
from tests.faults.hidden_states import HEAD, VOCAB_SIZE, hidden_of, logits_of, written
from tests.strategies.integer_model import compute_layers

NUM_WHOLE = 32  # tokens that are whole letters
NUM_STEPS_MAX = 400
NUM_BLOCKS, BLOCK_SIZE = 24, 4
CANARY_INTERVAL_STEPS = 20
FORMS = {"even": 0, "odd": 1}
ALIKE = [9, 8, 7, 6, 5, 4, 3, 2]  # how some prompts begin


def spell(token_id: int) -> bytes:
    """A letter a token; but some are the first half of one and some the second, so that text has to wait."""
    if token_id >= NUM_WHOLE:
        return bytes([0xC7 if token_id % 2 else 0x80 + token_id])
    return chr(0x100 + token_id).encode()


def decode(token_ids: Iterable[int]) -> str:
    return b"".join(map(spell, token_ids)).decode(errors="replace")


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


class PlainRunner:
    def __init__(self) -> None:
        self.num_blocks, self.block_size = NUM_BLOCKS, BLOCK_SIZE
        self.slots = np.zeros((NUM_BLOCKS, BLOCK_SIZE), dtype=np.int64)
        self.rows: dict[int, Row] = {}

    def set_row(self, index: int, row: Row) -> None:
        self.rows[index] = row

    def state_of(self, index: int) -> SamplingState:
        return self.rows[index].state() if index in self.rows else SamplingState()

    def scrub(self, block_ids: list[int]) -> None:
        self.slots[block_ids] = 0

    def seen(self, arrays: KernelArrays, token_index: int) -> list[int]:
        """Everything that a token's row can see."""
        at = int(np.searchsorted(arrays.cu_seqlens, token_index, side="right")) - 1
        last = int(arrays.kv_lens[at]) - (int(arrays.cu_seqlens[at + 1]) - 1 - token_index)
        blocks = arrays.block_tables[at, : -(-last // self.block_size)]
        told: list[int] = self.slots[blocks].reshape(-1)[:last].tolist()
        return told

    def execute(self, batch: Batch, go_on: GoOn | None = None) -> Picks:
        evidence = batch.evidence
        arrays = KernelArrays(
            batch.token_ids,
            batch.positions,
            np.concatenate((batch.sampled_tokens, batch.scored_tokens)),
            batch.sampled_positions,
            batch.sampled_rows,
            evidence.cu_seqlens,
            evidence.kv_lens,
            evidence.block_tables,
            evidence.slot_mapping,
        )
        try:
            compute_layers(self.slots.reshape(-1), arrays.slot_mapping, go_on)
        except BrokenOffError as broken:
            broken.arrays = arrays
            raise
        self.slots.reshape(-1)[arrays.slot_mapping] = arrays.token_ids + 1 + VOCAB_SIZE * arrays.positions
        hidden = self.hidden(arrays)
        work = HeadWork(hidden, np.zeros(len(arrays.wanted), dtype=np.float32))
        picks = Picks(np.zeros(len(batch.sampled_rows), dtype=np.int64), {}, {}, arrays, work)
        logits = list(hidden @ HEAD.T)
        self.sample(picks, logits, arrays)
        places = iter(range(len(arrays.sampled_rows), len(logits)))
        for part in batch.scored:
            num_top, told = self.rows[part.row].sampling.prompt_logprobs, []
            for token_id, place in zip(part.next_token_ids, places, strict=False):
                told.append(scored(logits[place], token_id, num_top))
                work.logits[place] = logits[place][token_id]
            picks.scores[part.index] = tuple(one for one in told if one is not None)
        return picks

    def hidden(self, arrays: KernelArrays) -> NDArray[np.float32]:
        """Of the wanted places."""
        states = [hidden_of(tuple(self.seen(arrays, index))) for index in arrays.wanted.tolist()]
        return np.array(states, dtype=np.float32).reshape(-1, HEAD.shape[1])

    def sample(self, picks: Picks, logits: list[NDArray[np.float32]], arrays: KernelArrays) -> None:
        for place, position in enumerate(arrays.sampled_positions.tolist()):
            picked = pick(logits[place], self.rows[int(arrays.sampled_rows[place])], position)
            picks.token_ids[place] = picked.token_id
            if picks.head is not None:
                picks.head.logits[place] = picked.logit
            if picked.logprob is not None:
                picks.logprobs[place] = picked.logprob


@dataclass(frozen=True)
class Arrival:
    submit: Submit
    step: int
    abort_step: int = -1


def load(seed: int, num_arrivals: int = 14) -> list[Arrival]:
    """Three domains, two salts, beginnings that some share, every kind of sampling, aborts. Whatever two sequences
    could confuse differs between them."""
    random = Random(seed)
    arrivals = []
    for index in range(num_arrivals):
        prompt = ALIKE[: random.choice([0, 4, 8, 8])]
        prompt += [random.randrange(VOCAB_SIZE) for _ in range(random.randint(2, 9))]
        max_tokens = random.randint(4, 14)
        kind = random.choice([0, 1, 2, 3, 3, 4, 5, 6, 6])
        sampling = (
            SamplingParams(max_tokens, temperature=1.0, seed=random.randrange(1000), ignore_eos=True),
            SamplingParams(max_tokens, temperature=1.0, seed=index, frequency_penalty=1.5, ignore_eos=True),
            SamplingParams(max_tokens, temperature=0.0, logit_bias=((index + 1, 9.0),), ignore_eos=True),
            SamplingParams(max_tokens, temperature=0.0, grammar=random.choice(["even", "odd"]), ignore_eos=True),
            SamplingParams(max_tokens, temperature=0.0, logprobs=2, ignore_eos=True),
            SamplingParams(max_tokens, temperature=1.0, seed=index, logprobs=1, ignore_eos=True),
            SamplingParams(max_tokens, temperature=0.0, prompt_logprobs=1, ignore_eos=True),
        )[kind]
        salt = random.choice([b"", b"salt"])
        abort_step = random.choice([-1, -1, -1, -1, random.randint(2, 30)])
        submit = Submit(f"s{index}", random.choice("aabc"), salt, prompt, sampling)
        arrivals.append(Arrival(submit, random.choice([0, 0, 1, 4, 8, 12, 20]), abort_step))
    return arrivals


def with_forks(arrivals: list[Arrival], seed: int) -> list[Arrival]:
    """Some requests ask for several answers at once, and tiers differ."""
    random, more = Random(-1 - seed), []
    for one in arrivals:
        tier = random.choice([0, 0, *TIERS.values()])
        for choice in range(random.choice([1, 1, 2, 3])):
            sampling = replace(one.submit.sampling, seed=one.submit.sampling.seed + 1_000 * choice)
            name = one.submit.sequence_id + f".{choice}" * bool(choice)
            submit = replace(one.submit, sequence_id=name, sampling=sampling, priority=tier)
            more.append(Arrival(submit, one.step, one.abort_step if choice != 1 else -1))
    return more


@dataclass(frozen=True)
class Truth:
    """What a sequence says alone, without an engine."""

    token_ids: list[int]
    logprobs: list[TokenLogprob]
    scores: list[TokenLogprob]


def truth(submit: Submit) -> Truth:
    sampling, prompt = submit.sampling, submit.prompt_token_ids
    tokens, logprobs = list(prompt), []
    matcher = ParityMatcher(sampling.grammar) if sampling.grammar else None
    row = Row(sampling, tokens, len(tokens), (), matcher)
    for _ in range(sampling.max_tokens):
        picked = pick(logits_of(written(tokens)), row, len(tokens))
        tokens.append(picked.token_id)
        logprobs += [picked.logprob] if picked.logprob is not None else []
    scores = []
    if sampling.prompt_logprobs >= 0:
        told = (scored(logits_of(written(prompt[:end])), prompt[end], 1) for end in range(1, len(prompt)))
        scores = [one for one in told if one is not None]
    return Truth(tokens[len(prompt) :], logprobs, scores)


def same_numbers(sent: Iterable[TokenLogprob], own: list[TokenLogprob]) -> bool:
    return [(one.token_id, one.logprob, one.top) for one in sent] == [(o.token_id, o.logprob, o.top) for o in own]


@dataclass
class Received:
    """What has left of one sequence, compared with its truth."""

    submit: Submit
    truth: Truth
    num_tokens: int = 0
    num_logprobs: int = 0
    num_scores: int = 0
    text: str = ""

    def is_right(self, output: TokenOutput) -> bool:
        own, num_new = self.truth, len(output.token_ids)
        tokens = own.token_ids[self.num_tokens : self.num_tokens + num_new]
        logprobs = own.logprobs[self.num_logprobs : self.num_logprobs + len(output.logprobs)]
        scores = own.scores[self.num_scores : self.num_scores + len(output.prompt_logprobs)]
        self.num_tokens += num_new
        self.num_logprobs += len(output.logprobs)
        self.num_scores += len(output.prompt_logprobs)
        self.text += output.text
        whole = output.finish_reason != "length" or (self.num_tokens, self.num_logprobs, self.num_scores) == (
            len(own.token_ids),
            len(own.logprobs),
            len(own.scores),
        )
        said = decode(own.token_ids)
        if output.finish_reason:
            said = decode(own.token_ids[: self.num_tokens])
        return (
            list(output.token_ids) == tokens
            and whole
            and said.startswith(self.text)
            and (self.text == said or output.finish_reason is None or bool(output.error))
            and same_numbers(output.logprobs, logprobs)
            and same_numbers(output.prompt_logprobs, scores)
        )

    def counts_are_right(self, output: TokenOutput) -> bool:
        num_prompt = len(self.submit.prompt_token_ids)
        cached = output.num_cached_tokens
        wrong = bool(output.token_ids) and output.num_prompt_tokens != num_prompt
        wrong |= output.num_completion_tokens != self.num_tokens or cached % BLOCK_SIZE != 0 or cached >= num_prompt
        return bool(output.error) or not wrong


@dataclass
class Run:
    """What happened; steps are -1 where it never did."""

    core: EngineCore
    runner: PlainRunner
    own: EngineOwnRuns
    reached_step: int = -1
    wrong_output_step: int = -1
    wrong_count_step: int = -1
    wrong_sum_step: int = -1
    wrong_end: bool = False
    change_batch: Callable[[Batch], Batch] | None = None  # a fault in what the engine builds
    detected_step: int = -1
    detectors: list[str] = field(default_factory=list)
    num_steps: int = 0
    num_aborts: int = 0

    def reach(self) -> None:
        if self.reached_step < 0:
            self.reached_step = self.core.step_number

    def note(self, name: str, step: int) -> None:
        self.detectors.append(name)
        if self.detected_step < 0:
            self.detected_step = step

    def judge(self, output: TokenOutput, received: Received | None) -> None:
        step = self.core.step_number
        right = received is not None and received.is_right(output)
        if not right and self.wrong_output_step < 0:
            self.wrong_output_step = step
        if (received is None or not received.counts_are_right(output)) and self.wrong_count_step < 0:
            self.wrong_count_step = step


def encode(text: str) -> list[int]:
    return [ord(letter) % VOCAB_SIZE for letter in text[-24:]]


def prepare(audited: bool, *, replay_percent: int = 100, canaries: bool = False) -> Run:
    """Bytes are read of every slot at every step, and every sequence is run again when all have ended: what the worker
    samples is seen here for certain. ``canaries`` come by the count of steps."""
    runner = PlainRunner()
    cores: list[EngineCore] = []
    own = OwnRuns(
        OwnRunSettings(replay_percent=replay_percent, canary_interval_s=CANARY_INTERVAL_STEPS * canaries),
        encode=encode,
        clock=lambda: float(cores[0].step_number),
    )
    memory = (runner.slots.view(np.uint64)[None, :, :, None],)
    observer: Observer = NullObserver()
    if audited:
        observer = AuditObserver(
            NUM_BLOCKS,
            BLOCK_SIZE,
            memory=memory,
            spell=spell,
            head=HeadWitness(HEAD, is_bfloat16=False),
            slots_per_step=NUM_BLOCKS * BLOCK_SIZE * 5,
            own=own,
        )
    core = EngineCore(
        runner,
        decode=decode,
        eos_token_ids=frozenset(),
        context_max=96,
        vocab_size=VOCAB_SIZE,
        max_batched_tokens=16,
        max_num_seqs=5,
        max_waiting=100,
        break_off_percent=50,
        observer=observer,
        matchers=ParityMatcher,
    )
    cores.append(core)
    return Run(core, runner, EngineOwnRuns(core, idle_percent=100))


def _step(run: Run) -> list[TokenOutput]:
    result = run.core.step()
    run.num_steps += 1
    for incident in result.incidents:
        run.note(incident.kind, run.core.step_number)
    if result.failure:
        run.note("engine's own check", run.core.step_number)
    return result.outputs


def run_again(run: Run) -> None:
    """Idle time: whatever the auditor wants to be run alone, until it wants nothing more."""
    for _ in range(4 * NUM_STEPS_MAX):
        if not run.core.has_work:
            run.own.start(idle=True)
        if not run.core.has_work:
            return
        run.own.without(_step(run))


def perform(run: Run, arrivals: list[Arrival]) -> None:
    """Run the load to its end, comparing with the truth at every step."""
    received = {one.submit.sequence_id: Received(one.submit, truth(one.submit)) for one in arrivals}
    core = run.core
    last = max(max(one.step, one.abort_step) for one in arrivals)
    try:
        for step in range(NUM_STEPS_MAX):
            if not core.has_work and step > last:
                break
            outputs = []
            for one in arrivals:
                if one.step == step:
                    core.add(one.submit)
                if one.abort_step == step and (ending := core.abort(one.submit.sequence_id)) is not None:
                    outputs.append(ending)
                    run.num_aborts += 1
            if core.has_work:
                run.own.start(idle=False)
            for output in run.own.without([*outputs, *_step(run)]):
                run.judge(output, received.get(output.sequence_id))
            pool = core.pool
            total = pool.num_free + sum(pool.num_by_domain.values()) + pool.num_blocks - pool.num_usable
            if total != pool.num_blocks and run.wrong_sum_step < 0:
                run.wrong_sum_step = core.step_number
        if not run.detectors:
            run_again(run)
    except Exception as error:  # a check of the engine's own: the worker would end here
        run.note(f"engine's own check ({type(error).__name__})", core.step_number)
    run.wrong_end = bool(core.has_work or core.pool.num_by_domain or run.wrong_sum_step >= 0)
