"""A chat request's messages as chat templates want them: transformers' convention, in which tools, their calls and
their results have places of their own.

Not every template knows these places. What a template does with them is tried once: it must write a call so that
tool_reader.py reads the same call back. For a template that does not, the same is said in plain messages: the functions
in the system's, calls in the assistant's, results in the user's, all between the same tags.
"""

import json
from typing import Any

from engine.errors import TokenizerError
from engine.text.tokenizer import Tokenizer
from gateway.api import wire
from gateway.api.tool_reader import BEGIN, END, Arguments, CallBegins, ToolReader
from gateway.api.tools import ToolUse, check_past_calls

Messages = list[dict[str, Any]]

HOW_TO_CALL = (
    "You may call functions. Each line between <tools> and </tools> describes one:\n<tools>\n{tools}\n</tools>\n"
    "To call one, write its name and its arguments as a JSON object between tags, as here, once for each call:\n"
    f'{BEGIN}\n{{{{"name": "NAME", "arguments": {{{{}}}}}}}}\n{END}\n'
    "What it returns comes back between <tool_response> and </tool_response>."
)


def conversation(request: wire.ChatRequest) -> Messages:
    """Checked by wire.py; the role `developer` is `system` here."""
    names: dict[str, str] = {}
    told: Messages = []
    for index, message in enumerate(request.messages):
        one: dict[str, Any] = {
            "role": "system" if message.role == "developer" else message.role,
            "content": wire.content_text(message),
        }
        if message.tool_calls:
            one["tool_calls"] = check_past_calls(message.tool_calls, f"messages[{index}].tool_calls")
            names |= {call["id"]: call["function"]["name"] for call in one["tool_calls"]}
        if message.role == "tool":
            assert message.tool_call_id is not None
            one |= {"tool_call_id": message.tool_call_id, "name": names[message.tool_call_id]}
        told.append(one)
    return told


def plain(messages: Messages, use: ToolUse | None) -> Messages:
    """The same conversation for a template that knows nothing of tools."""
    told: Messages = []
    if use is not None:
        system = HOW_TO_CALL.format(tools="\n".join(_json(tool) for tool in use.told))
        if messages[0]["role"] == "system":
            system = f"{messages[0]['content']}\n\n{system}"
            messages = messages[1:]
        told.append({"role": "system", "content": system})
    after_result = False
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
            if after_result:
                told[-1]["content"] += "\n" + content
                continue
            role = "user"
        calls = [f"{BEGIN}\n{_json(_named(call))}\n{END}" for call in message.get("tool_calls", ())]
        told.append({"role": role, "content": "\n".join(([content] if content or not calls else []) + calls)})
        after_result = message["role"] == "tool"
    return told


def num_chars_of(messages: Messages, tools: Messages | None) -> int:
    """About how long the text will be: it decides where it is tokenized, no more."""
    num = sum(len(message["content"]) for message in messages)
    past = [message["tool_calls"] for message in messages if "tool_calls" in message]
    return num + (len(_json([tools, past])) if tools or past else 0)


def writes_calls(tokenizer: Tokenizer) -> bool:
    """Whether the model's template has places for tools, and writes calls as they are read here."""
    name, arguments, result = "probe_function", {"probe_argument": ["a", 1]}, "probe result"
    function = {"name": name, "description": "probe description", "parameters": {"type": "object", "properties": {}}}
    call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}
    messages: Messages = [
        {"role": "user", "content": "probe question"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": result, "tool_call_id": "call_1", "name": name},
    ]
    try:
        text = tokenizer.render_chat(messages, [{"type": "function", "function": function}])
    except TokenizerError:
        return False
    reader = ToolReader({name})
    events = reader.push(text)
    pieces = "".join(event.text for event in events if isinstance(event, Arguments))
    called = [event.name for event in events if isinstance(event, CallBegins)]
    same = called == [name] and reader.called and json.loads(pieces) == arguments
    return same and result in text and "probe description" in text


def _named(call: dict[str, Any]) -> dict[str, Any]:
    return {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
