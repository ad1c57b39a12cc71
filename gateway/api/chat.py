"""POST /v1/chat/completions."""

from dataclasses import dataclass

from gateway.api.generation_route import GenerationRoute
from gateway.api.settlement import Settler
from gateway.api.shapes import Frame, Json, usage_json
from gateway.api.translation import Translator
from gateway.api.wire import ChatRequest, parse_chat
from gateway.services import Services
from tenancy.meter import Usage


def chat_route(services: Services, settler: Settler, translator: Translator) -> GenerationRoute[ChatRequest]:
    return GenerationRoute(
        services, settler, id_prefix="chatcmpl-", parse=parse_chat, translate=translator.chat, shape=ChatShape
    )


@dataclass(frozen=True, slots=True)
class ChatShape:
    frame: Frame

    def opening(self) -> list[Json]:
        return [self._chunk({"role": "assistant", "content": ""}, None)]

    def delta(self, text: str) -> Json:
        return self._chunk({"content": text}, None)

    def closing(self, finish_reason: str) -> Json:
        return self._chunk({}, finish_reason)

    def usage_chunk(self, usage: Usage) -> Json:
        return self.frame.whole("chat.completion.chunk", []) | {"usage": usage_json(usage)}

    def whole(self, text: str, finish_reason: str, usage: Usage) -> Json:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        return self.frame.whole("chat.completion", [choice]) | {"usage": usage_json(usage)}

    def _chunk(self, delta: Json, finish_reason: str | None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self.frame.chunk("chat.completion.chunk", [choice])
