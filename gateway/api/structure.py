"""From the fields that ask for a form of the answer to one grammar: OpenAI's response_format, vLLM's structured_outputs
and its older guided_* names. At most one of them may be given."""

import json
from typing import Annotated, Any

from msgspec import Meta, Struct

from engine.errors import GrammarError
from engine.sampling import grammar
from gateway.api.problems import InvalidRequestError

CHOICES_MAX = 1_024
ChoiceText = Annotated[str, Meta(min_length=1)]
Choices = Annotated[list[ChoiceText], Meta(min_length=1, max_length=CHOICES_MAX)]
Text = Annotated[str, Meta(min_length=1, max_length=grammar.GRAMMAR_CHARS_MAX)]


class JsonSchema(Struct, frozen=True):
    schema: dict[str, Any] | None = None
    name: str | None = None
    strict: bool | None = None  # the answer keeps to the schema in any case


class ResponseFormat(Struct, frozen=True):
    type: str
    json_schema: JsonSchema | None = None


class StructuredOutputs(Struct, frozen=True, forbid_unknown_fields=True):
    json: dict[str, Any] | Text | None = None
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    json_object: bool | None = None


class Structured(Struct, frozen=True, kw_only=True):
    """The fields of a request."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | Text | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None


def grammar_of(request: Structured) -> tuple[str, str]:
    """The grammar and the field that asks for it; two empty texts where none does.

    Raises InvalidRequestError naming the field; whether the grammar compiles is not known yet.
    """
    asked = _response_format(request.response_format)
    inner = request.structured_outputs or StructuredOutputs()
    for value, make, name in (
        (inner.json, _json, "structured_outputs.json"),
        (inner.regex, grammar.of_regex, "structured_outputs.regex"),
        (inner.choice, grammar.of_choice, "structured_outputs.choice"),
        (inner.grammar, grammar.of_lark, "structured_outputs.grammar"),
        (inner.json_object or None, lambda _: grammar.of_schema(ANY_OBJECT), "structured_outputs.json_object"),
        (request.guided_json, _json, "guided_json"),
        (request.guided_regex, grammar.of_regex, "guided_regex"),
        (request.guided_choice, grammar.of_choice, "guided_choice"),
    ):
        if value is not None:
            asked.append((_made(make, value, name), name))
    if len(asked) > 1:
        names = " and ".join(name for _, name in asked)
        raise InvalidRequestError(f"{names} both ask for a form of the answer: send one of them", asked[1][1])
    return asked[0] if asked else ("", "")


def answer_schema(request: Structured) -> dict[str, Any] | None:
    """The JSON schema that an answer in words must keep to where it may call tools instead; None for any.

    Raises InvalidRequestError where another form is asked for: only OpenAI's response_format goes with tools.
    """
    _, name = grammar_of(request)
    if not name:
        return None
    asked = request.response_format
    if asked is None or not name.startswith("response_format"):
        raise InvalidRequestError(f"{name} does not go with tools: use response_format, or leave out tools", name)
    return asked.json_schema.schema if asked.json_schema is not None else ANY_OBJECT


def checked(text: str, name: str) -> str:
    """The grammar, if it compiles. Takes milliseconds. Raises InvalidRequestError naming the field."""
    try:
        grammar.check(text)
    except GrammarError as error:
        raise InvalidRequestError(f"{name} does not compile: {error}", name) from error
    return text


ANY_OBJECT: dict[str, Any] = {"type": "object"}


def _response_format(asked: ResponseFormat | None) -> list[tuple[str, str]]:
    if asked is None or asked.type == "text":
        return []
    if asked.type == "json_object":
        return [(grammar.of_schema(ANY_OBJECT), "response_format")]
    if asked.type != "json_schema":
        known = "text, json_object or json_schema"
        raise InvalidRequestError(f"type {asked.type[:32]!r} is not supported: use {known}", "response_format.type")
    if asked.json_schema is None or asked.json_schema.schema is None:
        name = "response_format.json_schema.schema"
        raise InvalidRequestError(f"{name} is required", name, "missing_required_parameter")
    return [(grammar.of_schema(asked.json_schema.schema), "response_format")]


def _json(value: dict[str, Any] | str) -> str:
    if isinstance(value, dict):
        return grammar.of_schema(value)
    schema = json.loads(value)
    if not isinstance(schema, dict):
        raise ValueError("it must be a JSON object")
    return grammar.of_schema(schema)


def _made(make: Any, value: Any, name: str) -> str:
    try:
        text: str = make(value)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{name}: {error}", name) from error
    return text
