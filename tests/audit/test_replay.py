"""What left is said again alone: whatever was asked for, the same bits; and whatever one bit is wrong, it shows."""

import struct
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from audit.runtime.launch import Logprob
from audit.runtime.released_tokens import Output
from audit.runtime.replay import OWN, RECORD_BYTES, TRIES_MAX, Replays
from engine.build import build
from engine.config import WorkerConfig
from engine.events import NullObserver, Observer
from engine.own_runs import OwnRuns as EngineOwnRuns
from engine.protocol import SamplingParams, Submit
from engine.sampling.grammar import of_regex
from gateway.audit_observer import AuditObserver
from gateway.audit_observer import observer_of as observer_for
from gateway.own_runs import OwnRuns, OwnRunSettings
from tests.faults.catalogue import FAULTS
from tests.faults.stage import BLOCK_SIZE, VOCAB_SIZE, Run, prepare, run_again
from tests.strategies.engine_traces import Act, World, perform, traces
from tests.strategies.tiny_model import write_tiny_model

RUN = OWN + "replay/1"


def observer_of(run: Run) -> AuditObserver:
    observer: Observer = run.core.observer
    assert isinstance(observer, AuditObserver)
    return observer


def chunk(name: str, tokens: list[int], ending: str = "", num_before: int = 0, **changes: Any) -> Output:
    logprobs = [Logprob(token, -0.5 - token, ((token, -0.5 - token), (1, -9.0))) for token in tokens]
    fields: dict[str, Any] = {"logprobs": logprobs, "finish_reason": ending} | changes
    return Output(name, tuple(tokens), 3, 0, num_before + len(tokens), ending == "error", "", **fields)


def recorded(said: list[Output], **changes: Any) -> Replays:
    replays = Replays(**{"percent": 100} | changes)
    replays.begins("s", "a", lambda: (100, "recipe"))
    for output in said:
        replays.sends(output)
    return replays


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(0, 9), st.integers(0, 9))
def test_the_same_again_is_no_difference_however_it_is_cut(tokens: list[int], cut: int, other_cut: int) -> None:
    replays = recorded([chunk("s", tokens[:cut]), chunk("s", tokens[cut:], "length", len(tokens[:cut]))])
    record = replays.next(RUN)
    assert record is not None
    assert record.recipe == "recipe"
    assert replays.hears(chunk(RUN, tokens[:other_cut])) is None
    assert replays.hears(chunk(RUN, tokens[other_cut:], "length")) is None
    assert (replays.num_compared, replays.num_differing, replays.num_bytes, replays.num_sequences) == (1, 0, 0, 1)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.data())
def test_whatever_differs_shows_and_no_token_is_told(tokens: list[int], data: st.DataObject) -> None:
    right = chunk(RUN, tokens, "length", prompt_logprobs=[Logprob(1, -1.0, (), 1), Logprob(2, -2.0, (), 2)])
    at = data.draw(st.integers(0, len(tokens) - 1))
    one = right.logprobs[at]
    bit = struct.unpack(
        "<d", (struct.unpack("<q", struct.pack("<d", one.logprob))[0] ^ 1).to_bytes(8, "little", signed=True)
    )
    wrong = data.draw(
        st.sampled_from(
            [
                {"token_ids": (*tokens[:at], 10, *tokens[at + 1 :])},
                {"token_ids": tuple(tokens[:-1])},
                {"token_ids": (*tokens, 1)},
                {"logprobs": [*right.logprobs[:at], one._replace(logprob=bit[0]), *right.logprobs[at + 1 :]]},
                {"logprobs": [*right.logprobs[:at], one._replace(top=one.top[::-1]), *right.logprobs[at + 1 :]]},
                {"logprobs": right.logprobs[:-1]},
                {"prompt_logprobs": right.prompt_logprobs[::-1]},
                {"prompt_logprobs": right.prompt_logprobs[:1]},
                {"finish_reason": "stop"},
            ]
        )
    )
    replays = recorded([right._replace(sequence_id="s")])
    assert replays.next(RUN) is not None
    difference = replays.hears(right._replace(**wrong))
    if tokens[:-1] == [] and wrong == {"token_ids": ()}:
        assert difference is not None
    assert difference is not None, wrong
    assert (difference.record.sequence_id, difference.record.domain) == ("s", "a")
    assert (replays.num_compared, replays.num_differing, replays.num_bytes) == (1, 1, 0)
    assert "-0.0" not in difference.detail
    if "token_ids" in wrong and len(wrong["token_ids"]) == len(tokens):
        assert difference.detail.count("#") == 2, "two digests, no token"


def test_minus_zero_is_not_zero() -> None:
    replays = recorded([chunk("s", [5], "stop", logprobs=[Logprob(5, 0.0)])])
    replays.next(RUN)
    difference = replays.hears(chunk(RUN, [5], "stop", logprobs=[Logprob(5, -0.0)]))
    assert difference is not None
    assert difference.detail == "log probability 0 of 1: 0x0.0p+0 left, -0x0.0p+0 when run alone"


def test_an_aborted_one_is_compared_as_far_as_it_came() -> None:
    replays = recorded([chunk("s", [4, 5], ""), chunk("s", [], "abort", 2)])
    replays.next(RUN)
    assert replays.hears(chunk(RUN, [4, 5], "length")) is None
    assert replays.num_compared == 1
    for again in ([4, 6], [4]):
        replays = recorded([chunk("s", [4, 5], ""), chunk("s", [], "abort", 2)])
        replays.next(RUN)
        assert replays.hears(chunk(RUN, again, "length")) is not None
    replays = recorded([chunk("s", [], "abort")])
    assert replays.next(RUN) is None, "it has said nothing"
    assert (replays.num_bytes, replays.num_sequences) == (0, 0)


def test_a_run_that_is_broken_off_comes_again_behind_the_others_and_not_for_ever() -> None:
    replays = recorded([chunk("s", [4, 5], "stop")])
    replays.begins("t", "a", lambda: (1, "other"))
    replays.sends(chunk("t", [6], "stop"))
    first, second = replays.next(RUN), None
    assert replays.next("audit/replay/2") is None, "one at a time"
    replays.hears(chunk(RUN, [4], ""))
    replays.hears(chunk(RUN, [], "abort"))
    second = replays.next(RUN)
    assert first is not None
    assert second is not None
    assert (first.sequence_id, second.sequence_id) == ("s", "t")
    replays.hears(chunk(RUN, [6], "stop"))
    for _ in range(TRIES_MAX - 1):
        assert replays.next(RUN) is first
        replays.hears(chunk(RUN, [], "abort"))
    assert replays.next(RUN) is None
    counts = replays.num_compared, replays.num_broken_off, replays.num_dropped, replays.num_bytes
    assert counts == (1, TRIES_MAX - 1, 1, 0)


def test_what_is_wrong_shows_though_the_run_is_broken_off() -> None:
    replays = recorded([chunk("s", [4, 5, 6], "stop")])
    replays.next(RUN)
    replays.hears(chunk(RUN, [4, 7], ""))
    assert replays.hears(chunk(RUN, [], "abort")) is not None


def test_errors_are_no_answers() -> None:
    replays = recorded([chunk("s", [4], ""), chunk("s", [], "error", 1)])
    assert (replays.next(RUN), replays.num_bytes, replays.num_sequences) == (None, 0, 0)
    replays = recorded([chunk("s", [4], "stop")])
    replays.next(RUN)
    assert replays.hears(chunk(RUN, [], "error")) is None
    assert (replays.num_compared, replays.num_dropped, replays.num_bytes) == (0, 1, 0)


def test_what_may_not_be_trusted_is_forgotten_wherever_it_is() -> None:
    replays = recorded([chunk("s", [4])])
    replays.forget("s")
    assert (replays.num_bytes, replays.next(RUN)) == (0, None)
    replays = recorded([chunk("s", [4], "stop")])
    replays.begins("t", "a", lambda: (1, "other"))
    replays.sends(chunk("t", [6], "stop"))
    assert replays.next(RUN) is not None
    replays.forget(RUN)
    assert replays.num_dropped == 1
    assert replays.next("audit/replay/2") is not None, "the line goes on"


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 60), st.booleans()), max_size=60), st.integers(0, 9))
def test_memory_never_passes_its_bound_and_all_of_it_comes_back(work: list[tuple[int, int, bool]], seed: int) -> None:
    bound = 4 * RECORD_BYTES
    replays = Replays(60, bound, seed)
    for number, num_tokens, ends in work:
        replays.begins(f"s{number}", "a", partial(lambda size: (size, None), 10 * num_tokens))
        replays.sends(chunk(f"s{number}", [1] * num_tokens, "stop" if ends else ""))
        assert 0 <= replays.num_bytes <= bound
    for number in range(6):
        replays.sends(chunk(f"s{number}", [1], "stop"))
    while replays.next(RUN) is not None:
        replays.hears(chunk(RUN, [], "error"))
    assert replays.num_bytes == 0


@pytest.mark.parametrize(("percent", "least", "most"), [(0, 0, 0), (30, 240, 360), (100, 1_000, 1_000)])
def test_the_rate_is_the_settings(percent: int, least: int, most: int) -> None:
    replays = Replays(percent, bytes_max=2**40)
    for number in range(1_000):
        replays.begins(f"s{number}", "a", lambda: (1, None))
        replays.sends(chunk(f"s{number}", [1], "stop"))
    assert least <= replays.num_waiting <= most
    assert replays.num_sequences == 1_000


# ---------------------------------------------------------------- the real engine


@settings(max_examples=25, deadline=None)
@given(traces())
def test_everything_that_can_be_asked_for_is_said_again(trace: list[Act]) -> None:
    """Seeds, penalties, forms, biases, log probabilities of answers and prompts, forks, hits, preemption, aborts."""
    world = World()
    perform(trace, world)
    counters = observer_of(world.run).counters()
    assert counters["num_replays"] == counters["num_sequences"]
    assert counters["num_replays_differing"] == counters["num_replays_dropped"] == counters["replays_waiting"] == 0
    assert world.run.core.pool.num_published == counted(world.run), "nothing of the runs is left in the prefix cache"


def counted(run: Run) -> int:
    return sum(1 for prefix in run.core.pool._published._prefix_of.values() if not prefix.domain.startswith(OWN))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 60), st.integers(1, 8), st.booleans())
def test_stop_texts_and_half_characters_are_said_again(seed: int, min_tokens: int, include: bool) -> None:
    run = prepare(audited=True)
    for index in range(5):
        bias = tuple((token, 6.0) for token in range(64 - 8 * index, VOCAB_SIZE, 3))
        sampling = SamplingParams(
            9, seed=seed, stop=(chr(0x100 + seed % 32), "\u0103\u0104"), include_stop=include, min_tokens=min_tokens,
            logit_bias=bias, logprobs=index - 1,
        )  # fmt: skip
        run.core.add(Submit(f"s{index}", "abc"[index % 3], b"", [seed, index], sampling))
    while run.core.has_work:
        run.core.step()
    run_again(run)
    counters = observer_of(run).counters()
    assert (counters["num_replays"], counters["num_replays_differing"]) == (5, 0)
    assert not run.detectors


def test_a_replay_never_finds_what_the_first_run_has_left() -> None:
    """Or a block with wrong numbers would give the same wrong answer twice."""
    run = prepare(audited=True)
    for name in ("first", "second"):
        run.core.add(Submit(name, "a", b"", list(range(20)), SamplingParams(4, temperature=0.0, ignore_eos=True)))
        while run.core.has_work:
            run.core.step()
    cached = []
    step = run.core.step

    def listening() -> Any:
        result = step()
        cached.extend(output.num_cached_tokens for output in result.outputs)
        return result

    run.core.step = listening  # type: ignore[method-assign]
    run_again(run)
    assert len(cached) == 8
    assert not any(cached)


def test_a_fault_inside_a_launch_is_found_when_the_answer_is_run_again() -> None:
    """K12: an alarm after the release, with the sequence and its domain; what its domain has cached is forgotten."""
    plant = next(fault.plant for fault in FAULTS if fault.fault_id == "K12")
    run = prepare(audited=True)
    plant(run)
    run.core.step_number = 10  # the plant acts from some step on
    for name in ("a", "b"):
        sampling = SamplingParams(6, temperature=0.0, logprobs=1, ignore_eos=True)
        run.core.add(Submit(name, f"tenant {name}", b"", [*range(9), ord(name) % 60], sampling))
    incidents = []
    while run.core.has_work:
        incidents += run.core.step().incidents
    assert run.reached_step > 0
    assert incidents == []
    published = run.core.pool.num_published
    while True:
        run.own.start(idle=True)
        if not run.core.has_work:
            break
        result = run.core.step()
        run.own.without(result.outputs)
        incidents += result.incidents
    assert [(one.kind, one.sequence_ids, one.domains) for one in incidents] == [
        ("replay_differs", ["a"], ["tenant a"]),
        ("replay_differs", ["b"], ["tenant b"]),
    ]
    assert published > 0
    assert run.core.pool.num_published == 0
    counters = observer_of(run).counters()
    assert (counters["num_replays"], counters["num_replays_differing"], counters["num_violations"]) == (2, 2, 2)


def asked(vocab_size: int) -> list[Submit]:
    """Two tenants whose prompts begin alike, and what can be asked for."""
    kinds = [
        SamplingParams(9, temperature=0.0, logprobs=2, ignore_eos=True),
        SamplingParams(9, temperature=0.9, seed=5, top_p=0.9, logprobs=0, ignore_eos=True),
        SamplingParams(9, temperature=0.8, seed=6, frequency_penalty=1.0, repetition_penalty=1.3, logprobs=1),
        SamplingParams(9, temperature=0.0, prompt_logprobs=2, logprobs=0, ignore_eos=True),
        SamplingParams(30, temperature=1.0, seed=7, stop=("e", "a"), logprobs=0),
        SamplingParams(12, temperature=1.0, seed=8, grammar=of_regex("[ab]{3,9}"), logprobs=0),
        SamplingParams(9, temperature=0.0, logit_bias=((40, 5.0),), min_tokens=4, logprobs=0),
    ]
    head = [(7 * place) % vocab_size for place in range(3, 43)]
    return [
        Submit(f"s{index}.{domain}", domain, b"", [*head, index + 5, len(domain)], sampling)
        for index, sampling in enumerate(kinds)
        for domain in ("a", "bb")
    ]


@pytest.mark.parametrize("crossed", [False, True])
def test_a_real_models_answers_are_said_again_unless_rows_change_places(tmp_path: Path, crossed: bool) -> None:
    write_tiny_model(tmp_path)
    observe = partial(observer_for, own=OwnRunSettings(replay_percent=100))
    config = WorkerConfig(model_dir=tmp_path, socket_path=Path(), journal_dir=Path(), num_blocks=200, num_threads=1)
    core, ready = build(config, observe)
    if ready.isolation != "bitwise":
        pytest.skip("this machine has no exact kernels")
    runner: Any = core._runner
    logits, shown, launched, done = runner.logits, runner._show, [], []

    def noted(batch: Any, go_on: Any) -> Any:
        launched.append(batch)
        return logits(batch, go_on)

    def swapped(hidden: Any) -> None:
        """Before the head, which is then given what is shown."""
        if crossed and not done and len(launched[-1].sampled_index) > 4:
            hidden[[0, 4]] = hidden[[4, 0]]
            done.append(launched[-1])
        shown(hidden)

    runner.logits, runner._show = noted, swapped
    for submit in asked(ready.vocab_size):
        assert core.add(submit) is None
    while core.has_work:
        result = core.step()
        assert (result.incidents, result.failure) == ([], "")
        if core.step_number == 6:
            core.abort("s0.bb")
    incidents, runs = [], EngineOwnRuns(core, idle_percent=100)
    runs.start(idle=True)
    while core.has_work:
        result = core.step()
        incidents += [(one.kind, *one.sequence_ids) for one in result.incidents]
        runs.without(result.outputs)
        runs.start(idle=True)
    counters = core.observer.counters()
    assert counters["num_replays"] == counters["num_sequences"] == 14
    if crossed:
        names = [f"{batch.evidence.sequence_ids[batch.sampled_index[at]]}" for batch in done for at in (0, 4)]
        assert sorted(incidents) == sorted(("replay_differs", name) for name in names)
        assert counters["num_replay_bits_differing"] > 0
    else:
        assert incidents == []
        assert counters["num_replays_differing"] == counters["num_replay_bits_differing"] == 0


def test_a_run_that_breaks_a_rule_itself_does_not_stop_the_line() -> None:
    """Its ending is the engine's own and is heard by nobody."""
    run = prepare(audited=True)
    for name in ("s", "t"):
        run.core.add(
            Submit(name, "a", b"", [1, 2, ord(name) % 60], SamplingParams(3, temperature=0.0, ignore_eos=True))
        )
    while run.core.has_work:
        run.core.step()
    output_of = run.core._output

    def wrong(sequence: Any, *arguments: Any) -> Any:
        output = output_of(sequence, *arguments)
        if output.sequence_id == RUN and output.token_ids:
            return replace(output, token_ids=(output.token_ids[0] ^ 1,))
        return output

    run.core._output = wrong  # type: ignore[method-assign]
    run_again(run)
    assert "foreign_output" in run.detectors
    counters = observer_of(run).counters()
    assert (counters["num_replays"], counters["num_replays_dropped"], counters["replays_waiting"]) == (1, 1, 0)
    assert counters["replay_bytes"] == 0


def test_of_a_tenant_that_has_left_nothing_is_kept() -> None:
    """Neither its answers nor the blocks in which they were run again, finished or not."""
    run = prepare(audited=True)
    for name, domain in (("s", "leaver"), ("t", "stays"), ("u", "leaver"), ("v", "leaver")):
        sampling = SamplingParams(40 if name == "v" else 4, temperature=0.0, ignore_eos=True)
        run.core.add(Submit(name, domain, b"", [*range(9), ord(name) % 60], sampling))
    for _ in range(10):
        run.core.step()
    assert run.core.abort("v") is not None
    run.own.start(idle=True)
    for _ in range(3):
        run.own.without(run.core.step().outputs)
    outputs, _ = run.core.erase_domain("leaver")
    assert outputs == []
    num_blocks = run.own.erase("leaver")
    assert num_blocks > 0
    assert not any(block.content_domain.endswith("leaver") for block in run.core.pool.blocks)
    run_again(run)
    counters = observer_of(run).counters()
    assert not run.detectors
    assert (counters["num_replays"], counters["replays_waiting"], counters["replay_bytes"]) == (1, 0, 0)
    held = run.runner.slots.reshape(-1)
    assert {block.content_domain for block in run.core.pool.blocks} <= {"", "stays", "audit/replay/stays"}
    clean = [block.block_id for block in run.core.pool.blocks if not block.content_domain]
    assert not held.reshape(-1, BLOCK_SIZE)[clean].any()


def test_where_answers_depend_on_their_company_nothing_is_run_again() -> None:
    own = OwnRuns(OwnRunSettings(replay_percent=100), exact=False)
    assert own.counters()["replay_percent"] == 0
    observer = AuditObserver(8, 4, own=own)
    assert observer.counters()["replay_percent"] == 0
    assert NullObserver().next_run(idle=True) is None
