"""Every sampling parameter through the whole engine: preempted, chunked, cached or in company, a sequence gives what it
gives alone. Alone is a plain loop that knows no engine."""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from engine.protocol import SamplingParams, Submit, TokenLogprob, TokenOutput
from engine.sampling.row import Row
from engine.sampling.sampler import pick, scored
from engine.text.answer import Answer
from tests.engine.test_core_properties import Load, fits, loads
from tests.strategies.integer_model import (
    EOS_TOKEN_ID,
    VOCAB_SIZE,
    LogitsRunner,
    Watcher,
    decode,
    integer_core,
    logits_of,
    submit,
)

TOKEN_IDS = st.integers(0, VOCAB_SIZE - 1)


@dataclass
class Told:
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprob]
    finish_reason: str | None
    prompt: list[TokenLogprob] = field(default_factory=list)


def alone(prompt: list[int], sampling: SamplingParams) -> Told:
    """The answer, token by token, with a new row for each."""
    token_ids, answer = list(prompt), Answer(decode, sampling)
    told = Told([], "", [], None, prompt_alone(prompt, sampling.prompt_logprobs))
    while told.finish_reason is None:
        row = Row(sampling, token_ids, len(prompt), [EOS_TOKEN_ID])
        picked = pick(logits_of(token_ids), row, len(token_ids))
        token_ids.append(picked.token_id)
        told.token_ids.append(picked.token_id)
        ends = {EOS_TOKEN_ID} if not sampling.ignore_eos else set()
        pieces = []
        if picked.token_id in ends | set(sampling.stop_token_ids):
            told.finish_reason = "stop"
        else:
            pieces.append(answer.push(picked.token_id, picked.logprob))
            if answer.stopped:
                told.finish_reason = "stop"
            elif len(told.token_ids) == sampling.max_tokens:
                told.finish_reason = "length"
        if told.finish_reason:
            pieces.append(answer.finish())
        for piece in pieces:
            told.text += piece.text
            told.logprobs += piece.logprobs
    return told


def prompt_alone(prompt: list[int], num_top: int) -> list[TokenLogprob]:
    if num_top < 0:
        return []
    told = [scored(logits_of(prompt[:place]), prompt[place], num_top) for place in range(1, len(prompt))]
    return [one for one in told if one is not None]


@st.composite
def samplings(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        max_tokens=1,
        temperature=draw(st.sampled_from([0.0, 0.7, 1.5])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        seed=draw(st.integers(0, 5)),
        stop=tuple(draw(st.lists(st.lists(TOKEN_IDS, min_size=1, max_size=2).map(decode), max_size=2))),
        ignore_eos=draw(st.booleans()),
        top_k=draw(st.sampled_from([0, 1, 9])),
        min_p=draw(st.sampled_from([0.0, 0.2])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.8])),
        presence_penalty=draw(st.sampled_from([0.0, 0.6])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.4, -0.4])),
        logit_bias=tuple(draw(st.dictionaries(TOKEN_IDS, st.sampled_from([-100.0, 0.7, 3.0]), max_size=2)).items()),
        stop_token_ids=tuple(draw(st.lists(TOKEN_IDS, max_size=2))),
        min_tokens=draw(st.sampled_from([0, 0, 2, 5])),
        include_stop=draw(st.booleans()),
        logprobs=draw(st.sampled_from([-1, 0, 3])),
        prompt_logprobs=draw(st.sampled_from([-1, 0, 2])),
    )


@given(loads(), st.lists(samplings(), min_size=10, max_size=10))
def test_company_and_preemption_change_nothing(load: Load, chosen: list[SamplingParams]) -> None:
    core, _ = integer_core(
        num_blocks=load.num_blocks,
        block_size=load.block_size,
        max_batched_tokens=load.max_batched_tokens,
        max_num_seqs=load.max_num_seqs,
        scheduling=load.scheduling,
        observer=Watcher(load.max_batched_tokens, load.max_num_seqs, load.block_size),
        runner_class=LogitsRunner,
    )
    expected, received = {}, {}
    for index, (arrival, sampling) in enumerate(zip(load.arrivals, chosen, strict=False)):
        if fits(load, arrival):
            own = replace(sampling, max_tokens=arrival.max_tokens)
            assert core.add(Submit(f"s{index}", arrival.domain, b"salt", arrival.prompt, own)) is None
            expected[f"s{index}"] = alone(arrival.prompt, own)
            received[f"s{index}"] = Told([], "", [], None)
    while core.has_work:
        result = core.step()
        assert result.failure == ""
        for output in result.outputs:
            take(received[output.sequence_id], output)
    assert received == expected


def take(told: Told, output: TokenOutput) -> None:
    told.token_ids += output.token_ids
    told.text += output.text
    told.logprobs += output.logprobs
    assert not (output.prompt_logprobs and told.token_ids[:-1]), "the prompt comes before the answer"
    told.prompt += output.prompt_logprobs
    told.finish_reason = output.finish_reason


def test_the_load_does_preempt() -> None:
    """So that the property above is about preemption, too: penalties of preempted rows count from the beginning."""
    core, _ = integer_core(num_blocks=6, block_size=2, max_num_seqs=4, runner_class=LogitsRunner)
    sampling = SamplingParams(max_tokens=8, temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.5)
    # Two tokens are wanted so much that only the penalties for what is there already let others come.
    sampling = replace(sampling, ignore_eos=True, frequency_penalty=2.0, logit_bias=((5, 7.0), (6, 6.5)))
    received = {f"s{index}": Told([], "", [], None) for index in range(3)}
    for index, name in enumerate(received):
        core.add(Submit(name, "a", b"salt", [index + 1] * 3, sampling))
    while core.has_work:
        for output in core.step().outputs:
            take(received[output.sequence_id], output)
    assert core.stats().num_preemptions > 0
    assert list(received.values()) == [alone([index + 1] * 3, sampling) for index in range(3)]


def test_a_stop_token_ends_the_answer_without_text_and_without_a_log_probability() -> None:
    sampling = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True, logprobs=0)
    free = alone([7], sampling)
    assert len(free.token_ids) == len(free.text) == len(free.logprobs) == 9
    at = free.token_ids[4]
    first = free.token_ids.index(at)
    told = alone([7], replace(sampling, stop_token_ids=(at,)))
    assert (told.token_ids, told.finish_reason) == (free.token_ids[: first + 1], "stop")
    assert (told.text, told.logprobs) == (free.text[:first], free.logprobs[:first])
    assert [logprob.offset for logprob in free.logprobs] == list(range(9))


def test_a_parameter_that_names_a_token_outside_the_vocabulary_is_refused() -> None:
    core, _ = integer_core()
    for change in ({"logit_bias": ((VOCAB_SIZE, 1.0),)}, {"stop_token_ids": (VOCAB_SIZE,)}, {"stop_token_ids": (-1,)}):
        own = submit("s", [1], 2)
        refused = core.add(replace(own, sampling=replace(own.sampling, **change)))
        assert refused is not None
        assert refused.error == "invalid_input"
