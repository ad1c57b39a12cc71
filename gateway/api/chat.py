"""POST /v1/chat/completions."""

import hashlib

from gateway.api.generation_route import GenerationRoute
from gateway.api.logprobs import chat_logprobs
from gateway.api.settlement import Settler
from gateway.api.shapes import Choice, Frame, Json, Logprobs, usage_json
from gateway.api.tool_reader import Arguments, CallBegins, Event, Text, ToolReader
from gateway.api.translation import Translator
from gateway.api.wire import ChatRequest, parse_chat
from gateway.services import Services
from tenancy.usage.meter import Usage


def chat_route(services: Services, settler: Settler, translator: Translator) -> GenerationRoute[ChatRequest]:
    return GenerationRoute(
        services, settler, id_prefix="chatcmpl-", parse=parse_chat, translate=translator.chat, shape=ChatShape
    )


class ChatShape:
    """Where the answer may call tools, its text is read for calls as it comes (tool_reader.py); an answer that only
    calls has no content."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self._readers = [ToolReader(frame.work.callable) for _ in range(frame.work.n)] if frame.work.callable else []

    def opening(self, prompt: Logprobs) -> list[Json]:
        delta = {"role": "assistant", "content": None if self._readers else ""}
        return [self._chunk(index, delta) for index in range(self.frame.work.n)]

    def delta(self, index: int, text: str, logprobs: Logprobs) -> list[Json]:
        deltas = self._deltas(index, self._readers[index].push(text)) if self._readers else [{"content": text}]
        if logprobs and not deltas:
            deltas.append({})
        chunks = [self._chunk(index, delta) for delta in deltas]
        if chunks:  # log probabilities come with the first of what their tokens gave
            chunks[0] = self._chunk(index, deltas[0], self._logprobs(logprobs))
        return chunks

    def closing(self, index: int, finish_reason: str) -> list[Json]:
        deltas = self._deltas(index, self._readers[index].finish()) if self._readers else []
        if self._readers and finish_reason == "stop" and self._readers[index].called:
            finish_reason = "tool_calls"
        return [*(self._chunk(index, delta) for delta in deltas), self._chunk(index, {}, None, finish_reason)]

    def usage_chunk(self, usage: Usage) -> Json:
        return self.frame.whole("chat.completion.chunk", []) | {"usage": usage_json(usage)}

    def whole(self, choices: list[Choice], prompt: Logprobs, usage: Usage) -> Json:
        told = [self._choice(index, choice) for index, choice in enumerate(choices)]
        prompt_field = self.frame.vllm_prompt_logprobs(prompt)
        return self.frame.whole("chat.completion", told) | {"usage": usage_json(usage)} | prompt_field

    def _choice(self, index: int, choice: Choice) -> Json:
        message: Json = {"role": "assistant", "content": choice.text, "refusal": None}
        finish_reason = choice.finish_reason
        if self._readers:
            reader = self._readers[index]
            events = reader.push(choice.text) + reader.finish()
            message["content"] = "".join(event.text for event in events if isinstance(event, Text)) or None
            calls = [
                self._call(index, event.index, event.name, _arguments_of(event.index, events))
                for event in events
                if isinstance(event, CallBegins)
            ]
            if calls:
                message["tool_calls"] = calls
            if reader.called and finish_reason == "stop":
                finish_reason = "tool_calls"
        logprobs = self._logprobs(choice.logprobs)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}

    def _deltas(self, index: int, events: list[Event]) -> list[Json]:
        """In OpenAI's way: a call's id and name first, then its arguments in pieces."""
        deltas: list[Json] = []
        for event in events:
            if isinstance(event, Text):
                deltas.append({"content": event.text})
                continue
            if isinstance(event, CallBegins):
                call = self._call(index, event.index, event.name, "")
            else:
                call = {"function": {"arguments": event.text}}
            deltas.append({"tool_calls": [{"index": event.index} | call]})
        return deltas

    def _call(self, index: int, call_index: int, name: str, arguments: str) -> Json:
        """Its id is our own: of the request, the answer and the call."""
        name_of_call = f"{self.frame.id}/{index}/{call_index}".encode()
        call_id = "call_" + hashlib.sha256(b"bulkhead/call/v1\0" + name_of_call).hexdigest()[:24]
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}

    def _logprobs(self, logprobs: Logprobs) -> Json | None:
        return chat_logprobs(logprobs, self.frame.token_bytes) if self.frame.tells_logprobs else None

    def _chunk(self, index: int, delta: Json, logprobs: Json | None = None, finish_reason: str | None = None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self.frame.chunk("chat.completion.chunk", [choice])


def _arguments_of(call_index: int, events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Arguments) and event.index == call_index)
