"""What a chat request says about tools: the functions, whether one has to be called, and the calls of earlier turns.

Bounded and checked here, so that what follows can trust it: names are plain, parameters and arguments are JSON objects
of a bounded depth, and every result belongs to a call.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta, Struct

from gateway.api.problems import InvalidRequestError

TOOLS_MAX = 128  # OpenAI's
CALLS_MAX = 16  # of one answer
PAST_CALLS_MAX = 128  # of one message
DESCRIPTION_CHARS_MAX = 16_384
ARGUMENTS_CHARS_MAX = 262_144
DEPTH_MAX = 64  # of parameters and arguments
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
CallId = Annotated[str, Meta(min_length=1, max_length=128)]


class Function(Struct, frozen=True):
    name: str
    description: Annotated[str, Meta(max_length=DESCRIPTION_CHARS_MAX)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct, frozen=True):
    type: str
    function: Function | None = None


class Named(Struct, frozen=True):
    name: str


class ToolName(Struct, frozen=True):
    type: str
    function: Named | None = None


class Allowed(Struct, frozen=True):
    mode: str
    tools: Annotated[list[ToolName], Meta(min_length=1, max_length=TOOLS_MAX)]


class Choice(Struct, frozen=True):
    type: str
    function: Named | None = None
    allowed_tools: Allowed | None = None


class PastFunction(Struct, frozen=True):
    name: str
    arguments: Annotated[str, Meta(max_length=ARGUMENTS_CHARS_MAX)]


class PastCall(Struct, frozen=True):
    """A call that an earlier answer made, as the client sends it back."""

    id: CallId
    type: str
    function: PastFunction | None = None


PastCalls = Annotated[list[PastCall], Meta(max_length=PAST_CALLS_MAX)]


Tools = Annotated[list[Tool], Meta(max_length=TOOLS_MAX)]


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The functions of a request whose answer may call them."""

    functions: tuple[Function, ...]  # all that the model is told of
    callable: frozenset[str]  # the names that it may call
    must_call: bool
    num_calls_max: int

    @property
    def told(self) -> list[dict[str, Any]]:
        """As chat templates want them: OpenAI's shape."""
        return [{"type": "function", "function": _told(function)} for function in self.functions]


def tool_use(tools: list[Tool] | None, tool_choice: str | Choice | None, parallel: bool | None) -> ToolUse | None:
    """None where no tool may be called: then the model is not told of any. Raises InvalidRequestError naming the
    field."""
    functions = tuple(_function(tool, f"tools[{index}]") for index, tool in enumerate(tools or ()))
    names = [function.name for function in functions]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidRequestError(f"two tools are called {name!r}", f"tools[{index}].function.name")
    mode, chosen = _choice(tool_choice)
    if not functions:
        if mode == "required" or chosen:
            raise InvalidRequestError("tool_choice needs tools", "tool_choice")
        return None
    for name in chosen:
        if name not in names:
            raise InvalidRequestError(f"tool_choice names {name[:64]!r}, which is not in tools", "tool_choice")
    if mode == "none":
        return None
    named = isinstance(tool_choice, Choice) and tool_choice.type == "function"
    num_calls_max = 1 if named or parallel is False else CALLS_MAX  # a named one is called once
    return ToolUse(functions, frozenset(chosen or names), mode == "required", num_calls_max)


def _function(tool: Tool, path: str) -> Function:
    if tool.type != "function":
        raise InvalidRequestError(
            f"tool type {tool.type[:32]!r} is not supported: only function is", f"{path}.type", "unsupported_value"
        )
    function = tool.function
    if function is None:
        raise InvalidRequestError(f"{path}.function is required", f"{path}.function", "missing_required_parameter")
    if not NAME.fullmatch(function.name):
        raise InvalidRequestError("a name has 1 to 64 of A-Z a-z 0-9 _ -", f"{path}.function.name")
    parameters = function.parameters
    if parameters is not None:
        where = f"{path}.function.parameters"
        if parameters.get("type", "object") != "object":
            raise InvalidRequestError('parameters must be a schema of type "object"', where)
        require_depth(parameters, where)
    return function


def _choice(asked: str | Choice | None) -> tuple[str, list[str]]:
    """The mode, and the only names that may be called; none for all."""
    if asked is None:
        return "auto", []
    if isinstance(asked, str):
        if asked not in ("none", "auto", "required"):
            raise InvalidRequestError(
                f"tool_choice {asked[:32]!r} is not supported: use none, auto, required or a function", "tool_choice"
            )
        return asked, []
    if asked.type == "function" and asked.function is not None:
        return "required", [asked.function.name]
    if asked.type == "allowed_tools" and asked.allowed_tools is not None:
        mode, tools = asked.allowed_tools.mode, asked.allowed_tools.tools
        if mode not in ("auto", "required"):
            raise InvalidRequestError("mode must be auto or required", "tool_choice.allowed_tools.mode")
        if any(tool.type != "function" or tool.function is None for tool in tools):
            raise InvalidRequestError("every tool must name a function", "tool_choice.allowed_tools.tools")
        return mode, [tool.function.name for tool in tools if tool.function is not None]
    raise InvalidRequestError(
        'tool_choice must be a text, {"type": "function", "function": {"name": ...}} or allowed_tools', "tool_choice"
    )


def _told(function: Function) -> dict[str, Any]:
    told: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        told["description"] = function.description
    return told | {"parameters": parameters_of(function)}


def parameters_of(function: Function) -> dict[str, Any]:
    """The schema of its arguments, always one of an object; a function without parameters takes none."""
    if function.parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object"} | function.parameters


def check_past_calls(calls: list[PastCall], path: str) -> list[dict[str, Any]]:
    """Earlier calls as chat templates want them: arguments as an object. Raises InvalidRequestError naming the
    field."""
    return [_past(call, f"{path}[{index}]") for index, call in enumerate(calls)]


def _past(call: PastCall, path: str) -> dict[str, Any]:
    if call.type != "function" or call.function is None:
        raise InvalidRequestError("only calls of functions are supported", f"{path}.type", "unsupported_value")
    if not NAME.fullmatch(call.function.name):
        raise InvalidRequestError("a name has 1 to 64 of A-Z a-z 0-9 _ -", f"{path}.function.name")
    where = f"{path}.function.arguments"
    try:
        arguments = json.loads(call.function.arguments or "{}", parse_constant=_no_constant)
        json.dumps(arguments, ensure_ascii=False).encode()  # a lone surrogate has no encoding
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError("arguments must be the text of a JSON object", where) from error
    if not isinstance(arguments, dict):
        raise InvalidRequestError("arguments must be the text of a JSON object", where)
    require_depth(arguments, where)
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def require_depth(value: Any, path: str) -> None:
    """Raises InvalidRequestError where the JSON value is nested more than DEPTH_MAX deep."""
    level: list[Any] = [value]
    for _ in range(DEPTH_MAX):
        level = [inner for one in level for inner in _inside(one)]
        if not level:
            return
    raise InvalidRequestError(f"it is nested more than {DEPTH_MAX} deep", path)


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
