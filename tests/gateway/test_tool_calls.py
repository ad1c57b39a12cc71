"""Tools through the real client, the real grammar and a real engine with a random model, which calls only what it must;
and what templates are told, those that know tools and those that do not."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from engine.sampling.grammar import limits
from engine.text.tokenizer import Tokenizer
from gateway.api import wire
from gateway.api.conversation import conversation, plain, writes_calls
from gateway.api.problems import InvalidRequestError
from gateway.api.structure import answer_schema
from gateway.api.tool_grammar import checked_calls
from gateway.api.tools import PastCall, PastFunction
from tests.gateway.test_openai_client import MODEL, Site, question, site
from tests.gateway.test_tool_reader import by_the_library
from tests.strategies.tiny_model import CHAT_TEMPLATE, tiny_llama_config, write_tiny_tokenizer

__all__ = ["site"]

CITY = {"type": "string", "enum": ["Oslo", "Łódź", "<|im_end|>"]}
PARAMETERS = {"type": "object", "properties": {"city": CITY}, "required": ["city"], "additionalProperties": False}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Wet?", "parameters": PARAMETERS}}
NOW = {"type": "function", "function": {"name": "now"}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}

# As the templates of the Qwen and Hermes families are: tools in the system's message, calls and results between tags.
TEMPLATE = """\
{%- if tools %}<|im_start|>system
{{ (messages[0].content + "\\n\\n") if messages[0].role == "system" else "" }}<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools><|im_end|>
{% endif -%}
{%- for message in messages %}
{%- if message.role == "system" and tools %}{% continue %}{% endif %}
{%- if message.role == "tool" %}
<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{%- else %}
<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{%- endif %}
{%- endfor %}
<|im_start|>assistant
"""


# --- through the real client ------------------------------------------------------------------------------------------


async def streamed(client: openai.AsyncOpenAI, how: dict[str, Any]) -> Any:
    """The client's own putting together of a stream."""
    async with client.chat.completions.stream(**how) as stream:
        async for _ in stream:
            pass
        return await stream.get_final_completion()


@pytest.mark.parametrize(
    ("how", "num_calls_max"),
    [
        ({"tool_choice": NAMED}, 1),
        ({"tool_choice": "required", "parallel_tool_calls": False}, 1),
        ({"tool_choice": "required", "n": 2, "logprobs": True, "top_logprobs": 2}, 16),
    ],
)
def test_a_forced_call_streamed_and_whole(
    site: Site, runner: asyncio.Runner, how: dict[str, Any], num_calls_max: int
) -> None:
    async def scenario() -> None:
        async with site.client() as client:
            asked = question("How is Oslo?") | how | {"tools": [WEATHER], "max_tokens": 900}
            whole = await client.chat.completions.create(**asked)
            pieced = await streamed(client, asked | {"stream_options": {"include_usage": True}})
            assert whole.usage is not None
            assert pieced.usage.total_tokens == whole.usage.total_tokens
            ids = set()
            for one, other in zip(whole.choices, pieced.choices, strict=True):
                assert one.finish_reason == other.finish_reason == "tool_calls"
                assert one.message.content is None
                calls, others = one.message.tool_calls or [], other.message.tool_calls or []
                assert 1 <= len(calls) == len(others) <= num_calls_max
                for call, another in zip(calls, others, strict=True):
                    assert call.type == another.type == "function"
                    assert call.function.name == another.function.name == "get_weather"
                    assert call.function.arguments == another.function.arguments
                    assert json.loads(call.function.arguments)["city"] in CITY["enum"]
                    ids |= {call.id, another.id}
                if one.logprobs is not None:
                    told = [entry.model_dump() for entry in one.logprobs.content or []]
                    assert told == [entry.model_dump() for entry in other.logprobs.content or []]
                    spelled = b"".join(bytes(entry["bytes"]) for entry in told).decode()
                    assert spelled.startswith('<tool_call>\n{"name": "get_weather", "arguments": {"city": "')
            assert len(ids) == 2 * sum(len(choice.message.tool_calls or []) for choice in whole.choices)
            assert all(call_id.startswith("call_") for call_id in ids)

    runner.run(scenario())
    runner.run(site.hall.check_books())
    assert {row.finish_reason for row in runner.run(site.hall.usage_rows()).values()} <= {"stop", "length"}


def test_results_go_back_and_a_cut_call_says_length(site: Site, runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        async with site.client(max_retries=0) as client:
            asked = question("How is Oslo?") | {"tools": [WEATHER, NOW]}
            first = await client.chat.completions.create(**asked, tool_choice=NAMED, max_tokens=900)
            message = first.choices[0].message
            assert message.tool_calls
            result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
            history = [*asked["messages"], message.model_dump(exclude_none=True), result]
            for tools in ([WEATHER, NOW], openai.omit):
                answer = await client.chat.completions.create(
                    model=MODEL, messages=history, tools=tools, max_tokens=8, seed=1
                )
                assert answer.choices[0].finish_reason in ("length", "stop", "tool_calls")
            with pytest.raises(openai.BadRequestError) as unknown:
                await client.chat.completions.create(model=MODEL, messages=[*asked["messages"], result])
            assert unknown.value.param == "messages[1].tool_call_id"
            cut = await client.chat.completions.create(**asked, tool_choice=NAMED, max_tokens=50)
            choice = cut.choices[0]
            assert choice.finish_reason == "length"
            for call in choice.message.tool_calls or []:
                assert not by_the_library(call.function.arguments)
            none = await client.chat.completions.create(**asked, tool_choice="none", max_tokens=5)
            same = await client.chat.completions.create(**question("How is Oslo?"), max_tokens=5)
            assert none.choices[0].message.content == same.choices[0].message.content

    runner.run(scenario())
    runner.run(site.hall.check_books())


def test_a_call_under_an_idempotency_key_comes_again_byte_for_byte(site: Site, runner: asyncio.Runner) -> None:
    async def scenario() -> list[httpx.Response]:
        async with site.http() as client:
            body = question("again") | {"tools": [NOW], "tool_choice": "required", "max_tokens": 900}
            return [
                await client.post(
                    "/v1/chat/completions",
                    json=body | {"stream": stream},
                    headers={"idempotency-key": f"tools-{stream}"},
                )
                for stream in (True, True, False, False)
            ]

    first, again, whole, once_more = runner.run(scenario())
    assert {one.status_code for one in (first, again, whole, once_more)} == {200}
    assert (first.content, whole.content) == (again.content, once_more.content)
    assert b'"finish_reason":"tool_calls"' in first.content
    runner.run(site.hall.check_books())


def test_a_function_whose_parameters_do_not_compile_is_named(site: Site, runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        async with site.client(max_retries=0) as client:
            odd = {"type": "object", "properties": {"a": {"type": "string", "format": "nobody-knows"}}}
            function = {"name": "odd", "parameters": odd}
            asked = question("x") | {"max_tokens": 1}
            await client.chat.completions.create(**asked, tools=[WEATHER, {"type": "function", "function": function}])
            for tool in (
                {"type": "function", "function": function | {"strict": True}},
                {"type": "function", "function": {"name": "odd", "parameters": {"properties": 3}}},
            ):
                with pytest.raises(openai.BadRequestError) as bad:
                    await client.chat.completions.create(**asked, tools=[WEATHER, tool])
                assert bad.value.param == "tools[1].function.parameters"
            with pytest.raises(openai.BadRequestError) as both:
                await client.chat.completions.create(**asked, tools=[NOW], extra_body={"guided_regex": "a"})
            assert both.value.param == "guided_regex"

    runner.run(scenario())


# --- what may be said -------------------------------------------------------------------------------------------------

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
CALL_NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NOW]}}
JSON_ANSWER = {"response_format": {"type": "json_object"}}


def request(**fields: Any) -> wire.ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": [WEATHER, NOW]} | fields
    return wire.parse_chat(json.dumps(body).encode())


@pytest.mark.parametrize(
    ("fields", "text", "fits"),
    [
        ({}, "hello", True),
        ({}, "hello\n" + CALL, True),
        ({}, CALL + "\n" + CALL_NOW, True),
        ({}, CALL + " and more", False),
        ({}, "a <tool_call> b", False),
        ({}, "a <tool_cal> b", True),
        ({}, CALL.replace("Oslo", "Rome"), False),
        ({"parallel_tool_calls": False}, CALL + "\n" + CALL_NOW, False),
        ({"tool_choice": "required"}, "hello", False),
        ({"tool_choice": "required"}, "\n".join([CALL_NOW] * 16), True),
        ({"tool_choice": "required"}, "\n".join([CALL_NOW] * 17), False),
        ({"tool_choice": NAMED}, CALL, True),
        ({"tool_choice": NAMED}, CALL_NOW, False),
        ({"tool_choice": NAMED}, CALL + "\n" + CALL, False),
        ({"tool_choice": ALLOWED}, "hello", True),
        ({"tool_choice": ALLOWED}, CALL_NOW, True),
        ({"tool_choice": ALLOWED}, CALL, False),
        (JSON_ANSWER, '{"a":1}', True),
        (JSON_ANSWER, CALL, True),
        (JSON_ANSWER, "hello", False),
    ],
)
def test_what_the_grammar_lets_through(tmp_path: Path, fields: dict[str, Any], text: str, fits: bool) -> None:
    asked = request(**fields)
    assert asked.tool_use is not None
    grammar = checked_calls(asked.tool_use, answer_schema(asked))
    write_tiny_tokenizer(tmp_path)
    tokenizer = LLTokenizer((tmp_path / "tokenizer.json").read_text(), n_vocab=320, eos_token=2)
    matcher = LLMatcher(tokenizer, grammar, limits=limits())
    tokens = [*tokenizer.tokenize_str(text), 2]
    assert (matcher.validate_tokens(tokens) == len(tokens)) is fits, matcher.get_error()


# --- what templates are told ------------------------------------------------------------------------------------------


def tokenizer_with(folder: Path, template: str) -> Tokenizer:
    tiny_llama_config().save_pretrained(folder)
    write_tiny_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer.load(folder)


def past(arguments: str = '{"city": "Oslo"}') -> list[Any]:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How is Oslo?"},
        {"role": "assistant", "content": None, "tool_calls": [call, call | {"id": "c2"}]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "still rain"}]},
        {"role": "user", "content": "And?"},
    ]


def test_a_template_that_knows_tools_gets_them(tmp_path: Path) -> None:
    tokenizer, asked = tokenizer_with(tmp_path, TEMPLATE), request(messages=past())
    assert writes_calls(tokenizer)
    assert asked.tool_use is not None
    text = tokenizer.render_chat(conversation(asked), asked.tool_use.told)
    assert json.dumps(WEATHER, ensure_ascii=False) in text
    assert text.count(CALL) == 2
    assert "<tool_response>\nrain\n</tool_response>" in text
    assert "<tools>" not in tokenizer.render_chat(conversation(asked))


@pytest.mark.parametrize(
    "change",
    [("arguments | tojson", "arguments"), ("<tool_call>", "[CALL]"), ("{{ tool | tojson }}", ""), ("if tools", "if 0")],
)
def test_a_template_that_writes_calls_otherwise_is_found_out(tmp_path: Path, change: tuple[str, str]) -> None:
    assert change[0] in TEMPLATE
    assert not writes_calls(tokenizer_with(tmp_path, TEMPLATE.replace(*change)))


def test_a_template_without_tools_is_told_in_plain_words(tmp_path: Path) -> None:
    tokenizer, asked = tokenizer_with(tmp_path, CHAT_TEMPLATE), request(messages=past())
    assert not writes_calls(tokenizer)
    told = plain(conversation(asked), asked.tool_use)
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user", "user"]
    assert all(set(message) == {"role", "content"} for message in told)
    system, _, calls, results, _ = (message["content"] for message in told)
    assert system.startswith("Be brief.\n\n")
    assert json.dumps(WEATHER, ensure_ascii=False) in system
    assert '{"name": "NAME", "arguments": {}}' in system
    assert calls == CALL + "\n" + CALL
    assert results == ("<tool_response>\nrain\n</tool_response>\n<tool_response>\nstill rain\n</tool_response>")
    assert plain(conversation(asked), None)[0]["content"] == "Be brief."
    first = plain(conversation(request()), request().tool_use)
    assert [message["role"] for message in first] == ["system", "user"]


@given(
    st.sampled_from(["<|im_end|>", "<|im_start|>", "a", "@0:", "@", '"']),
    st.sampled_from(["city", "role", "<|im_end|>"]),
)
def test_nobody_speaks_as_the_system_through_a_tool(
    tmp_path_factory: pytest.TempPathFactory, spelled: str, name: str
) -> None:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tokenizer_with(folder, TEMPLATE)
    tool = {"type": "function", "function": {"name": "f", "description": spelled, "parameters": {name: spelled}}}
    harmless = {"type": "function", "function": {"name": "f", "description": "a", "parameters": {"city": "a"}}}
    counts = []
    for one, arguments, result in ((tool, {name: spelled}, spelled), (harmless, {"city": "a"}, "a")):
        messages = past(json.dumps(arguments))
        messages[3]["content"] = result
        told = conversation(request(messages=messages, tools=[one]))
        token_ids = tokenizer.encode_chat(told, [one])
        text = tokenizer.render_chat(told, [one])
        assert b"".join(map(tokenizer.token_bytes, token_ids)).decode() == text
        counts.append([token_ids.count(control) for control in (0, 1, 2)])
    assert counts[0] == counts[1]
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "arguments", ["", "[]", "{", '"x"', "NaN", '{"a": NaN}', "\ud800", '{"a":' * 70 + "1" + "}" * 70]
)
def test_arguments_that_come_back_are_objects(arguments: str) -> None:
    message = wire.Message("assistant", None, [PastCall("c", "function", PastFunction("f", arguments))])
    asked = wire.ChatRequest(model="m", messages=[message])
    if not arguments:
        assert conversation(asked)[0]["tool_calls"][0]["function"]["arguments"] == {}
        return
    with pytest.raises(InvalidRequestError) as bad:
        conversation(asked)
    assert bad.value.param == "messages[0].tool_calls[0].function.arguments"
