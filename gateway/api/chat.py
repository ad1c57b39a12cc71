"""POST /v1/chat/completions."""

from dataclasses import dataclass

from gateway.api.generation_route import GenerationRoute
from gateway.api.logprobs import chat_logprobs
from gateway.api.settlement import Settler
from gateway.api.shapes import Choice, Frame, Json, Logprobs, usage_json
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

    def opening(self, prompt: Logprobs) -> list[Json]:
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, delta, None, None) for index in range(self.frame.work.n)]

    def delta(self, index: int, text: str, logprobs: Logprobs) -> Json:
        return self._chunk(index, {"content": text}, self._logprobs(logprobs), None)

    def closing(self, index: int, finish_reason: str) -> Json:
        return self._chunk(index, {}, None, finish_reason)

    def usage_chunk(self, usage: Usage) -> Json:
        return self.frame.whole("chat.completion.chunk", []) | {"usage": usage_json(usage)}

    def whole(self, choices: list[Choice], prompt: Logprobs, usage: Usage) -> Json:
        told = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._logprobs(choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ]
        prompt_field = self.frame.vllm_prompt_logprobs(prompt)
        return self.frame.whole("chat.completion", told) | {"usage": usage_json(usage)} | prompt_field

    def _logprobs(self, logprobs: Logprobs) -> Json | None:
        return chat_logprobs(logprobs, self.frame.token_bytes) if self.frame.tells_logprobs else None

    def _chunk(self, index: int, delta: Json, logprobs: Json | None, finish_reason: str | None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self.frame.chunk("chat.completion.chunk", [choice])
