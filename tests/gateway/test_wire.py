"""What the wire refuses names its field; what it accepts changes nothing; no JSON whatever is a fault of ours."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api import wire
from gateway.api.problems import InvalidRequestError

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "hi"}


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f"} | fields}


def nested(depth: int) -> dict[str, Any]:
    return {"type": "object"} | ({"properties": nested(depth - 1)} if depth else {})


def allowed(mode: str, name: str = "f") -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [function(name=name)]}}


TOOL = function(parameters={"type": "object", "properties": {}})
CALLED: list[Any] = [{"role": "assistant", "tool_calls": [{"id": "c"} | function(arguments="{}")]}]
RESULT = {"role": "tool", "content": "x", "tool_call_id": "c"}


def refused(parse: Any, body: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        parse(body if isinstance(body, bytes) else json.dumps(body).encode())
    return caught.value


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": None}, "model"),
        ({"model": ""}, "model"),
        ({"model": 3}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [3]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]}, "messages[0].tool_call_id"),
        ({"messages": [*CALLED, RESULT | {"tool_call_id": "c2"}]}, "messages[1].tool_call_id"),
        ({"messages": [*CALLED, CHAT["messages"][0], RESULT]}, "messages[2].tool_call_id"),
        ({"messages": [CALLED[0] | {"role": "user"}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "content": "x", "audio": {"id": "a"}}]}, "messages[0].audio"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [CHAT["messages"][0], {"role": "user", "content": None}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id"),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages[0].content"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
        ({"n": 9}, "n"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"n": "1"}, "n"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
        ({"tools": [function(name="a b")]}, "tools[0].function.name"),
        ({"tools": [function(name="x" * 65)]}, "tools[0].function.name"),
        ({"tools": [function(parameters={"type": "string"})]}, "tools[0].function.parameters"),
        ({"tools": [function(parameters=[])]}, "tools[0].function.parameters"),
        ({"tools": [function(parameters=nested(70))]}, "tools[0].function.parameters"),
        ({"tools": [function(name=f"f{n}") for n in range(129)]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": allowed("none")}, "tool_choice.allowed_tools.mode"),
        ({"tools": [TOOL], "tool_choice": allowed("auto", "g")}, "tool_choice"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"verbosity": "low"}, "verbosity"),
        ({"functions": [{}]}, "functions"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"prompt_logprobs": 6}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"echo": True}, "echo"),
        ({"response_format": "text"}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"guided_choice": [""]}, "guided_choice[0]"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_grammar": "start: x"}, "guided_grammar"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 101}, "repetition_penalty"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {"-5": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 1, "05": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {str(n): 1 for n in range(wire.LOGIT_BIAS_MAX + 1)}}, "logit_bias"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": list(range(wire.STOP_TOKEN_IDS_MAX + 1))}, "stop_token_ids"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"include_stop_str_in_output": "yes"}, "include_stop_str_in_output"),
        ({"bad_words": ["a"]}, "bad_words"),
        ({"allowed_token_ids": [1]}, "allowed_token_ids"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"service_tier": "scale"}, "service_tier"),
        ({"store": True}, "store"),
    ],
)
def test_a_bad_chat_request_names_its_field(change: dict[str, Any], param: str) -> None:
    error = refused(wire.parse_chat, CHAT | change)
    assert error.param == param
    assert error.message


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [[1], [2]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": [[1, "a"]]}, "prompt[0][1]"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"echo": "yes"}, "echo"),
        ({"max_tokens": 0, "echo": True}, "max_tokens"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
    ],
)
def test_a_bad_completion_request_names_its_field(change: dict[str, Any], param: str) -> None:
    assert refused(wire.parse_completion, COMPLETION | change).param == param


@pytest.mark.parametrize("name", ["model", "messages"])
def test_a_missing_field_is_named(name: str) -> None:
    error = refused(wire.parse_chat, {k: v for k, v in CHAT.items() if k != name})
    assert (error.param, error.code) == (name, "missing_required_parameter")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"\xff\xfe{\x00}\x00",
        b"\xef\xbb\xbf{}",
        b'{"model": "a", "model": "b", "messages": []}',
        b'{"model": "m", "messages": [{"role": "user", "role": "system", "content": "x"}]}',
        b'{"temperature": NaN}',
        b'{"temperature": -Infinity}',
        b'{"model": "\\ud800", "messages": []}',
        b'{"x": ' + b"9" * 5_000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"{} trailing",
    ],
)
def test_broken_json_is_the_callers_fault(body: bytes) -> None:
    error = refused(wire.parse_chat, body)
    assert (error.param, error.code) == (None, "invalid_json")


@pytest.mark.parametrize("body", [b"[]", b"3", b'"x"', b"null"])
def test_the_body_is_an_object(body: bytes) -> None:
    assert refused(wire.parse_chat, body).code == "invalid_type"


def test_values_that_change_nothing_and_unknown_fields_are_accepted() -> None:
    quiet = {
        "n": 1,
        "tools": [],
        "tool_choice": "auto",
        "logprobs": False,
        "response_format": {"type": "text"},
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "service_tier": "auto",
        "store": False,
        "user": "somebody",
        "metadata": {"a": "b"},
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "prediction": {"type": "content", "content": "x"},
        "verbosity": "medium",
        "reasoning_effort": "none",
        "parallel_tool_calls": True,
        "a_field_of_next_year": [1, 2],
        "max_tokens": 5,
        "max_completion_tokens": 5,
    }
    assert wire.parse_chat(json.dumps(CHAT | quiet).encode()).max_new_tokens == 5


@pytest.mark.parametrize("row", wire.UNSUPPORTED + wire.UNSUPPORTED_IN_CHAT, ids=lambda row: str(row[0]))
def test_null_always_means_not_given(row: tuple[str, Any, str]) -> None:
    wire.parse_chat(json.dumps(CHAT | {row[0]: None}).encode())


def test_a_pair_of_surrogates_is_a_character() -> None:
    body = b'{"model": "m", "prompt": "\\ud83d\\ude00"}'
    assert wire.parse_completion(body).prompt == "\N{GRINNING FACE}"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", "a"), (["a"], "a"), ([1, 2], [1, 2]), ([[1, 2]], [1, 2]), ([7], [7])],
)
def test_every_spelling_of_one_prompt(prompt: Any, expected: Any) -> None:
    assert wire.prompt_of(wire.parse_completion(json.dumps(COMPLETION | {"prompt": prompt}).encode())) == expected


def test_content_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = CHAT | {"messages": [{"role": "user", "content": parts}]}
    assert wire.content_text(wire.parse_chat(json.dumps(body).encode()).messages[0]) == "ab"


NAMES = sorted(
    {
        "response_format",
        "structured_outputs",
        "guided_json",
        "logit_bias",
        "n",
        "top_k",
        "messages",
        "prompt",
        "stop",
        "seed",
        "stream",
        "stream_options",
        "tools",
        "tool_choice",
        "max_tokens",
        "top_p",
    }
) + [row[0] for row in wire.UNSUPPORTED]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES) | st.text(), inner, max_size=6),
    max_leaves=16,
)


@given(JSON | st.fixed_dictionaries({"model": st.just("m")}, optional=dict.fromkeys(NAMES, JSON)))
def test_any_json_parses_or_is_refused(value: Any) -> None:
    body = json.dumps(value).encode("utf-8", "surrogatepass")
    for parse in (wire.parse_chat, wire.parse_completion):
        with suppress(InvalidRequestError):
            parse(body)


@given(st.binary(max_size=64))
def test_any_bytes_parse_or_are_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        wire.parse_chat(body)
