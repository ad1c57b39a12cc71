"""Log probabilities of the prompt: each told once, whatever the cache holds and whoever makes way, and only so many a
step."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from engine.batch import Batch
from engine.models.llama import LlamaModel
from engine.protocol import SamplingParams, Submit, TokenLogprob
from engine.sampling.sampler import Picks, scored
from engine.scheduling.break_off import GoOn
from engine.scheduling.schedule import SCORED_TOKENS_MAX
from engine.sequence import Sequence
from tests.engine.test_bitwise import ALONE, TIERS_IN_TURN, Schedule, load, needs_native, play
from tests.engine.test_rows_in_company import Told, alone, prompt_alone, take
from tests.kernels.native import isas
from tests.strategies.integer_model import VOCAB_SIZE, LogitsRunner, integer_core, submit

SCORING = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, prompt_logprobs=2)


class Counting(LogitsRunner):
    """Notes how many places of each step were looked at."""

    def execute(self, batch: Batch, go_on: GoOn | None = None) -> Picks:
        self.num_scored = [*getattr(self, "num_scored", []), len(batch.scored_tokens)]
        self.num_rows = [*getattr(self, "num_rows", []), len(batch.evidence.sequence_ids)]
        return super().execute(batch, go_on)


def test_a_prompt_that_is_in_the_cache_is_read_again_and_published_as_always() -> None:
    core, _ = integer_core(block_size=2, num_blocks=32, runner_class=LogitsRunner)
    prompt = [5, 3, 8, 5, 1, 2, 6]
    told = {}
    for name, sampling in (("first", SCORING), ("again", SCORING), ("plain", replace(SCORING, prompt_logprobs=-1))):
        assert core.add(Submit(name, "a", b"salt", prompt, sampling)) is None
        told[name] = Told([], "", [], None)
        while core.has_work:
            for output in core.step().outputs:
                take(told[name], output)
                num_cached = output.num_cached_tokens
        assert told[name] == alone(prompt, sampling)
        assert num_cached == (6 if name == "plain" else 0)
    assert told["again"].prompt == prompt_alone(prompt, 2)


def test_after_a_preemption_nothing_is_lost_or_told_twice() -> None:
    """The low one has told a part of its prompt when a higher one takes its blocks."""
    core, _ = integer_core(block_size=2, num_blocks=16, max_batched_tokens=8, runner_class=LogitsRunner)
    prompt = [index % VOCAB_SIZE for index in range(1, 25)]
    told = {"low": Told([], "", [], None), "high": Told([], "", [], None)}
    assert core.add(replace(submit("low", prompt, 4, tier="flex"), sampling=SCORING)) is None
    first, second = core.step().outputs + core.step().outputs
    take(told["low"], first)
    take(told["low"], second)
    assert 0 < len(told["low"].prompt) < len(prompt) - 1
    assert core.add(replace(submit("high", prompt[::-1], 4, tier="priority"), sampling=SCORING)) is None
    while core.has_work:
        for output in core.step().outputs:
            take(told[output.sequence_id], output)
    assert core.stats().num_preemptions > core.stats().num_preemptions_kept, "it must have lost its blocks"
    assert told == {"low": alone(prompt, SCORING), "high": alone(prompt[::-1], SCORING)}


def test_what_was_told_may_be_found_in_the_cache() -> None:
    sequence = Sequence("s", "a", b"", [1, 2, 3, 4, 5], SCORING, arrival=0)
    shareable = []
    for sequence.num_scored_tokens in range(5):
        shareable.append((sequence.num_unscored, sequence.num_tokens_shareable))
    assert shareable == [(4, 0), (3, 1), (2, 2), (1, 3), (0, 4)]
    assert Sequence("s", "a", b"", [1, 2, 3], replace(SCORING, prompt_logprobs=-1), arrival=0).num_tokens_shareable == 2


def test_a_step_looks_at_so_many_places_and_one_of_each_row() -> None:
    core, runner = integer_core(
        block_size=8, num_blocks=200, max_batched_tokens=400, max_num_seqs=8, runner_class=Counting
    )
    assert isinstance(runner, Counting)
    prompt = [index % VOCAB_SIZE for index in range(200)]
    for index in range(4):
        assert core.add(Submit(f"s{index}", "a", b"salt", [index, *prompt], SCORING)) is None
    assert core.add(Submit("plain", "b", b"salt", prompt, replace(SCORING, prompt_logprobs=-1))) is None
    answered = None
    while core.has_work:
        for output in core.step().outputs:
            if output.sequence_id == "plain" and output.token_ids and answered is None:
                answered = core.step_number
    assert max(runner.num_scored) > SCORED_TOKENS_MAX - 8, "the limit must be reached"
    assert all(
        scored <= SCORED_TOKENS_MAX + rows for scored, rows in zip(runner.num_scored, runner.num_rows, strict=True)
    )
    assert sum(runner.num_scored) == 4 * 200, "each place once"
    assert answered == 1, "who scores nothing does not wait"


@pytest.mark.parametrize("step", [1, 2, 3])
def test_broken_numbers_of_a_prompt_end_its_sequence_alone(step: int) -> None:
    core, runner = integer_core(max_batched_tokens=4, runner_class=LogitsRunner)
    for name in ("bad", "good"):
        assert core.add(Submit(name, "a", b"salt", [1, 2, 3, 4, 5, 6, 7], SCORING)) is None
    good = Told([], "", [], None)
    while core.has_work:
        if core.step_number + 1 == step:
            runner.broken_rows.add(0)
        for output in core.step().outputs:
            if output.sequence_id == "good":
                take(good, output)
            elif output.finish_reason:
                runner.broken_rows.clear()
                assert (output.error, output.prompt_logprobs) == ("engine_failure", ())
    assert good == alone([1, 2, 3, 4, 5, 6, 7], SCORING)
    assert core.stats().num_blocks_free == core.pool.num_blocks


def test_scored_against_plain_arithmetic() -> None:
    logits = np.array([0.5, -1.0, 2.0, 0.5], dtype=np.float32)
    total = np.log(np.exp(logits.astype(np.float64)).sum())
    told = scored(logits, 3, 3)
    assert told is not None
    assert told.logprob == pytest.approx(0.5 - total, abs=1e-12)
    assert (told.rank, [token_id for token_id, _ in told.top]) == (2, [2, 0, 3]), "equals share a rank"
    for bad in (np.nan, np.inf, -np.inf):
        assert scored(np.array([0.5, bad], dtype=np.float32), 0, 1) is None


@needs_native
def test_an_answer_as_a_prompt_has_the_same_bits(tiny_model_dir: Path) -> None:
    """Greedy answers tell the log probabilities of the model's own distribution, and so do prompts: alone, and in a
    company that chunks and preempts."""
    model = load(tiny_model_dir, "bfloat16", isas()[0])
    prompts = [[7 + index, 3, 9 * index + 1] for index in range(4)]
    asked = SamplingParams(max_tokens=70, temperature=0.0, ignore_eos=True, logprobs=3)
    answers: dict[str, list[TokenLogprob]] = {}
    work = []
    for index, prompt in enumerate(prompts):
        name = f"s{index}"
        submit = Submit(name, "d", b"", prompt, asked)
        tokens, _, _ = play(
            model, [submit], ALONE, note=lambda output: heard(answers, output.sequence_id, output.logprobs)
        )
        scoring = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True, prompt_logprobs=3)
        work.append(Submit(name, "d", b"", prompt + tokens[name], scoring, priority=TIERS_IN_TURN[index]))
    tight = Schedule(block_size=7, num_blocks=23, max_batched_tokens=17, max_num_seqs=3, num_threads=2, seed=4)
    for schedule in (ALONE, tight):
        told, preemptions = prompts_told(model, work, schedule)
        assert schedule is ALONE or sum(preemptions) > 0
        for submit in work:
            own = told[submit.sequence_id]
            assert [one.token_id for one in own] == submit.prompt_token_ids[1:]
            answered = [replace(one, offset=0, rank=0) for one in answers[submit.sequence_id]]
            assert [replace(one, rank=0) for one in own[2:]] == answered
            assert all((one.rank == 1) == (one.top[0][1] == one.logprob) for one in own)
    assert len(list(itertools.chain(*answers.values()))) == 4 * 70


def prompts_told(
    model: LlamaModel, work: list[Submit], schedule: Schedule
) -> tuple[dict[str, list[TokenLogprob]], tuple[int, int]]:
    told: dict[str, list[TokenLogprob]] = {}
    _, _, preemptions = play(
        model, work, schedule, note=lambda output: heard(told, output.sequence_id, output.prompt_logprobs)
    )
    return told, preemptions


def heard(told: dict[str, list[TokenLogprob]], name: str, logprobs: tuple[TokenLogprob, ...]) -> None:
    told.setdefault(name, []).extend(logprobs)
