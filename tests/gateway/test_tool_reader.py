"""Calls in an answer's text: the same in whatever pieces it comes, nothing lost; JSON as the standard library says."""

import json
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.api.json_object import JsonObject
from gateway.api.tool_reader import Arguments, CallBegins, Event, Text, ToolReader

NAMES = {"now", "get_weather"}
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=5), JSON, max_size=3)
PLAIN = st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"]), max_size=12)
PIECES = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        "<tool",
        '{"name"',
        '"now"',
        '"nope"',
        ": ",
        ", ",
        '"arguments"',
        "{",
        "}",
        "<",
        "é",
        *["\n", " ", '"', "1", CALL, CALL[:-3], CALL[:30], '{"a": [1, "<tool_call>"]}', "🌲", "\\", "[", "-"],
    ]
)


def read(text: str, cuts: list[int] | None = None) -> tuple[list[Event], ToolReader]:
    """The events of the text in pieces, neighbouring ones put together."""
    reader = ToolReader(NAMES)
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts or ())})
    events: list[Event] = []
    for start, end in pairwise(places):
        events += reader.push(text[start:end])
    events += reader.finish()
    merged: list[Event] = []
    for event in events:
        last = merged[-1] if merged else None
        if isinstance(last, Text) and isinstance(event, Text):
            merged[-1] = Text(last.text + event.text)
        elif isinstance(last, Arguments) and isinstance(event, Arguments):
            merged[-1] = Arguments(event.index, last.text + event.text)
        else:
            merged.append(event)
    return merged, reader


@given(st.lists(PIECES, max_size=14).map("".join) | st.text(max_size=30), st.lists(st.integers(0, 500), max_size=12))
@example(CALL + " " + CALL, list(range(200)))
def test_any_pieces_give_the_same_calls(text: str, cuts: list[int]) -> None:
    whole, reader = read(text)
    pieces, other = read(text, cuts)
    letters, _ = read(text, list(range(len(text))))
    assert whole == pieces == letters
    assert (reader.num_calls, reader.called) == (other.num_calls, other.called)


def dense(text: str) -> str:
    return "".join(character for character in text if character not in " \t\n\r")


@given(st.lists(PIECES, max_size=14).map("".join) | st.text(max_size=30))
@example("a <tool_call>\n")
@example('<tool_call>{"name": "now", "arguments": {"a": 1,}}</tool_call>')
@example('<tool_call>{"name": "now", "arguments": {}, "x": 1}</tool_call>')
def test_nothing_is_lost_but_frames(text: str) -> None:
    """Written down again in their order, texts, heads and arguments are the answer; only whole tails are missing."""
    rest = dense(text)
    for event in read(text)[0]:
        written = event.text if not isinstance(event, CallBegins) else ""
        if isinstance(event, CallBegins):
            written = f'<tool_call>{{"name":"{event.name}","arguments":'
        if not rest.startswith(dense(written)):
            rest = rest.removeprefix("}</tool_call>")
        assert rest.startswith(dense(written)), (text, event, rest)
        rest = rest.removeprefix(dense(written))
    assert "}</tool_call>".startswith(rest)


@given(
    PLAIN, st.lists(st.tuples(st.sampled_from(sorted(NAMES)), OBJECTS), max_size=4), st.sampled_from(["", "\n", " "])
)
def test_what_is_written_is_read(text: str, calls: list[tuple[str, dict[str, Any]]], white: str) -> None:
    def written(name: str, arguments: dict[str, Any]) -> str:
        shown = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        return f"<tool_call>{white}{shown}{white}</tool_call>"

    events, reader = read(text + "\n".join(written(*call) for call in calls))
    if calls:
        text = text.rstrip(" \t\n\r")
    assert "".join(event.text for event in events if isinstance(event, Text)) == text
    begun = [event for event in events if isinstance(event, CallBegins)]
    assert [(event.index, event.name) for event in begun] == [(index, call[0]) for index, call in enumerate(calls)]
    told = {event.index: event.text for event in events if isinstance(event, Arguments)}
    assert [json.loads(told[index]) for index in range(len(calls))] == [arguments for _, arguments in calls]
    assert reader.called == bool(calls)


@pytest.mark.parametrize(
    ("text", "content", "calls", "called"),
    [
        ("plain \n", "plain \n", [], False),
        ("a < b <tool", "a < b <tool", [], False),
        (f"Let me see.\n{CALL}\n", "Let me see.", [("now", "{}")], True),
        (CALL + CALL, "", [("now", "{}")] * 2, True),
        (CALL + " and", " and", [("now", "{}")], True),
        (CALL.replace("now", "later"), CALL.replace("now", "later"), [], False),
        (CALL.replace("{}", "[]"), CALL.replace("{}", "[]"), [], False),
        (CALL.replace("{}", '{"a": tr'), '"}\n</tool_call>'[1:], [("now", '{"a": tr')], False),
        ('<tool_call>\n{"name": "now", "arguments": {"a": "b', "", [("now", '{"a": "b')], False),
        ('<tool_call>\n{"name": "now", "arg', '<tool_call>\n{"name": "now", "arg', [], False),
        (CALL[:-4], "", [("now", "{}")], True),
        ("<tool_call><tool_call>" + CALL[11:], "<tool_call>", [("now", "{}")], True),
    ],
)
def test_examples(text: str, content: str, calls: list[tuple[str, str]], called: bool) -> None:
    events, reader = read(text)
    assert "".join(event.text for event in events if isinstance(event, Text)) == content
    names = {event.index: event.name for event in events if isinstance(event, CallBegins)}
    told = {event.index: event.text for event in events if isinstance(event, Arguments)}
    assert [(names[index], told.get(index, "")) for index in sorted(names)] == calls
    assert reader.called is called


def accepted(text: str) -> bool:
    scanner = JsonObject()
    return all(not scanner.complete and scanner.push(character) for character in text) and scanner.complete


def by_the_library(text: str) -> bool:
    with suppress(ValueError, RecursionError):
        return isinstance(json.loads(text, parse_constant=lambda _: 1 / 0), dict) and text[:1] + text[-1:] == "{}"
    return False


@given(OBJECTS.map(json.dumps) | OBJECTS.map(lambda value: json.dumps(value, ensure_ascii=False, indent=1)))
def test_an_object_is_accepted(text: str) -> None:
    assert accepted(text)


SCRAPS = [
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    '"',
    '"a"',
    '"b":',
    "1",
    "0",
    "-",
    ".",
    "e",
    "E+",
    "true",
    "nul",
    "null",
    " ",
    "\n",
]
SCRAPS += ["\\", "\\u00e", "9", "\\n", "\t", "\x01", "é"]


@given(OBJECTS.map(json.dumps), st.data())
def test_json_is_what_the_standard_library_says(text: str, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(1, 3))):
        at, drop = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 2))
        text = text[:at] + data.draw(st.sampled_from(SCRAPS)) + text[at + drop :]
    try:
        expected = by_the_library(text)
    except ZeroDivisionError:
        expected = False
    assert accepted(text) == expected, text


def test_depth_is_bounded() -> None:
    deep = '{"a":' * 200 + "1" + "}" * 200
    assert not accepted(deep)
    assert accepted('{"a":' * 100 + "1" + "}" * 100)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": "\x01"}',
        '{"a": "\n"}',
        '{"a": "\\x"}',
        '{"a": "\\u00g0"}',
        '{"a": 01}',
        '{"a": 1.}',
        '{"a": +1}',
        '{"a": 1,}',
        "{,}",
        '{"a" 1}',
        '{"a": [1,]}',
        '{"a": [}',
        '{"a": -}',
        '{"a": 1e}',
        '{"a": nulL}',
        "[]",
        " {}",
    ],
)
def test_what_is_no_object_is_refused(text: str) -> None:
    assert not accepted(text)
    assert accepted('{"a": ["\\u00e9\\n", -0.5e+3, 10, 0, true, null, {}, []] }')
