"""Forms of answers: what compiles, what a matcher lets through, and that nothing is sampled without a mask."""

import json
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from numpy.typing import NDArray

from engine.core import EngineCore
from engine.errors import GrammarError
from engine.protocol import SamplingParams
from engine.sampling import grammar
from engine.sampling.matcher import Matcher, Matchers
from engine.sampling.row import Row
from engine.sampling.sampler import NOT_FINITE, pick
from engine.text.tokenizer import Tokenizer
from tests.strategies.integer_model import VOCAB_SIZE as INTEGERS
from tests.strategies.integer_model import LogitsRunner, Watcher, decode, integer_core, submit
from tests.strategies.tiny_model import EOS_TOKEN_ID

VOCAB_SIZE = 320


@pytest.fixture(scope="module")
def matchers(tiny_model_dir: Path) -> Matchers:
    return Matchers(tiny_model_dir, VOCAB_SIZE, {EOS_TOKEN_ID})


def write(
    tokenizer: Tokenizer, matchers: Matchers, form: str, seed: int, max_tokens: int = 60
) -> tuple[str, list[int]]:
    """An answer of noise in this form, one row from the first token to the last."""
    token_ids = [7]
    row = Row(SamplingParams(max_tokens=1, seed=seed, grammar=form), token_ids, 1, [EOS_TOKEN_ID], matchers(form))
    while not row.form_complete and len(token_ids) <= max_tokens:
        picked = pick(noise(seed, len(token_ids)), row, len(token_ids))
        assert picked.token_id != NOT_FINITE
        again = Row(row.sampling, list(token_ids), 1, [EOS_TOKEN_ID], matchers(form))  # as after a preemption
        assert pick(noise(seed, len(token_ids)), again, len(token_ids)) == picked
        token_ids.append(picked.token_id)
    return tokenizer.decode(token_ids[1:]), token_ids[1:]


def noise(seed: int, position: int) -> NDArray[np.float32]:
    return np.random.default_rng([seed, position]).standard_normal(VOCAB_SIZE).astype(np.float32) * 4


@pytest.mark.parametrize("regex", ["[a-c]{2,5}x", "(yes|no)!", "é+🌲", r"\d{4}-\d{2}"])
def test_noise_takes_the_form_of_a_regex(tiny_model_dir: Path, matchers: Matchers, regex: str) -> None:
    tokenizer = Tokenizer.load(tiny_model_dir)
    form = grammar.of_regex(regex)
    grammar.check(form)
    num_complete = 0
    for seed in range(8):
        text, token_ids = write(tokenizer, matchers, form, seed)
        if len(token_ids) < 60:
            num_complete += 1
            assert re.fullmatch(regex, text)
    assert num_complete


@given(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=4))
def test_a_choice_is_one_of_the_choices(tiny_model_dir: Path, choices: list[str]) -> None:
    tokenizer, matchers = Tokenizer.load(tiny_model_dir), Matchers(tiny_model_dir, VOCAB_SIZE, {EOS_TOKEN_ID})
    form = grammar.of_choice(choices)
    grammar.check(form)
    text, _ = write(tokenizer, matchers, form, 3)
    assert text in choices


def test_noise_takes_the_form_of_a_schema(tiny_model_dir: Path, matchers: Matchers) -> None:
    tokenizer = Tokenizer.load(tiny_model_dir)
    form = grammar.of_schema(
        {"type": "object", "properties": {"a": {"enum": ["x", 3]}, "b": {"type": "boolean"}}, "required": ["a", "b"]}
        | {"additionalProperties": False}
    )
    for seed in range(5):
        value = json.loads(write(tokenizer, matchers, form, seed)[0])
        assert value["a"] in ("x", 3)
        assert isinstance(value["b"], bool)


@pytest.mark.parametrize(
    "form",
    [
        grammar.of_regex("[a-"),
        grammar.of_regex("(?=a)b"),
        grammar.of_lark("start: missing"),
        grammar.of_schema({"type": "objekt"}),
        grammar.of_schema({"$ref": "http://127.0.0.1/x"}),
        grammar.of_schema({"not": {}}),
        "nonsense",
        grammar.of_regex("a" * (grammar.GRAMMAR_CHARS_MAX + 1)),
    ],
)
def test_what_does_not_compile_is_refused(form: str) -> None:
    with pytest.raises(GrammarError):
        grammar.check(form)


@pytest.mark.parametrize(
    "form",
    [
        grammar.of_regex("(a{1,2000}){1,2000}"),
        grammar.of_regex("(a|b)*a" + "(a|b)" * 5_000),
        grammar.of_regex(".*".join("abcdefgh" * 200)),
        grammar.of_schema({"anyOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{n}}}"} for n in range(200)]}),
    ],
)
def test_compiling_takes_a_bounded_time(form: str) -> None:
    began = time.monotonic()
    with suppress(GrammarError):
        grammar.check(form)
    assert time.monotonic() - began < 5


class Blind:
    """A matcher that lost its mask, or has one of the wrong size, after the second token."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.grammar = "any"
        self.consumed: list[int] = []

    def allowed(self, output_token_ids: list[int]) -> NDArray[np.bool_] | None:
        if len(output_token_ids) < 2:
            return np.ones(INTEGERS, dtype=np.bool_)
        return np.ones(self.size, dtype=np.bool_) if self.size else None

    def complete(self, output_token_ids: list[int]) -> bool:
        return False


@pytest.mark.parametrize("size", [0, INTEGERS - 1, INTEGERS + 1])
def test_without_a_mask_nothing_is_sampled(size: int) -> None:
    core = _core(Blind(size))
    own = submit("formed", [1, 2], 6)
    own = replace(own, sampling=replace(own.sampling, grammar="any", ignore_eos=True))
    assert core.add(own) is None
    assert core.add(submit("free", [3, 4], 6)) is None
    outputs = []
    while core.has_work:
        outputs += core.step().outputs
    last = [output for output in outputs if output.sequence_id == "formed"][-1]
    assert (last.finish_reason, last.error, last.num_completion_tokens) == ("error", "engine_failure", 2)
    assert {output.error for output in outputs if output.sequence_id == "free"} == {""}


def test_a_matcher_that_met_a_wrong_token_gives_no_mask(matchers: Matchers, tiny_model_dir: Path) -> None:
    matcher = matchers(grammar.of_regex("[0-9]+"))
    assert matcher.allowed([]) is not None
    assert matcher.allowed(Tokenizer.load(tiny_model_dir).encode("x")) is None
    assert not matcher.complete([5])
    with pytest.raises(GrammarError):
        matchers("nonsense")


def test_a_form_that_nobody_can_keep_is_refused() -> None:
    core, _ = integer_core()
    own = submit("s", [1], 2)
    refused = core.add(replace(own, sampling=replace(own.sampling, grammar="any")))
    assert refused is not None
    assert refused.error == "invalid_input"


def _core(matcher: Matcher) -> EngineCore:
    how: dict[str, Any] = {"eos_token_ids": frozenset(), "context_max": 1000, "vocab_size": INTEGERS}
    how |= {"max_batched_tokens": 8, "max_num_seqs": 4, "max_waiting": 9, "observer": Watcher(8, 4, 2)}
    return EngineCore(LogitsRunner(16, 2), decode=decode, matchers=lambda _: matcher, **how)
