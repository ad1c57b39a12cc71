"""The grammar of an answer that may, or must, call functions: what tool_reader.py reads is all that can be said.

    must call    call, or up to so many of them
    may call     any text, and when `<tool_call>` is written, a call has to follow; the answer ends with its calls

So a call is never half right: its function exists and its arguments keep to the parameters. Words of a schema that are
not understood are an error where the function says `strict`, else they do not hold.
"""

import json
from typing import Any

from engine.errors import GrammarError
from engine.sampling import grammar
from gateway.api.problems import InvalidRequestError
from gateway.api.tool_reader import BEGIN, END
from gateway.api.tools import Function, ToolUse, parameters_of

# As models are used to write arguments; no free white space (engine/sampling/grammar.py).
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ANSWER_STYLE = {"whitespace_flexible": False, "lenient": False}


def grammar_of_calls(use: ToolUse, answer: dict[str, Any] | None = None) -> str:
    """``answer``: the schema that an answer without a call must keep to; None for any text."""
    functions = [function for function in use.functions if function.name in use.callable]
    more = f' ("\\n" call){{0,{use.num_calls_max - 1}}}' if use.num_calls_max > 1 else ""
    rules = [f"call: {_text(BEGIN)} body", f"body: {_text(chr(10))} object {_text(chr(10) + END)}"]
    if use.must_call:
        rules.insert(0, f"start: call{more}")
    elif answer is not None:
        rules.insert(0, f"start: answer | call{more}")
        rules.append(f"answer: %json {json.dumps(answer | {'x-guidance': _ANSWER_STYLE})}")
    else:
        rules.insert(0, f"start: TEXT | lead body{more}")
        rules += ["TEXT: /(.|\\n)*/", f"lead[lazy]: TEXT {_text(BEGIN)}"]
    rules.append("object: " + " | ".join(f"object{index}" for index in range(len(functions))))
    rules += [f"object{index}: {_object(function)}" for index, function in enumerate(functions)]
    return grammar.of_lark("\n".join(rules) + "\n")


def checked_calls(use: ToolUse, answer: dict[str, Any] | None) -> str:
    """The grammar, if it compiles. Takes milliseconds. Raises InvalidRequestError naming the function at fault."""
    text = grammar_of_calls(use, answer)
    try:
        grammar.check(text)
    except GrammarError as error:
        for index, function in enumerate(use.functions):
            try:
                grammar.check(grammar.of_lark(f"start: {_object(function)}\n"))
            except GrammarError as own:
                path = f"tools[{index}].function.parameters"
                raise InvalidRequestError(f"{path} does not compile: {own}", path) from own
        raise InvalidRequestError(f"the functions together do not compile: {error}", "tools") from error
    return text


def _object(function: Function) -> str:
    head = f'{{"name": "{function.name}", "arguments": '
    schema = parameters_of(function) | {"x-guidance": _STYLE | {"lenient": not function.strict}}
    return f"{_text(head)} %json {json.dumps(schema)} {_text('}')}"


def _text(text: str) -> str:
    """A text as Lark writes it."""
    return json.dumps(text)
