"""POST /v1/completions: one prompt as text or token ids."""

from dataclasses import dataclass

from gateway.api.generation_route import GenerationRoute
from gateway.api.settlement import Settler
from gateway.api.shapes import Frame, Json, usage_json
from gateway.api.translation import Translator
from gateway.api.wire import CompletionRequest, parse_completion
from gateway.services import Services
from tenancy.meter import Usage


def completions_route(
    services: Services, settler: Settler, translator: Translator
) -> GenerationRoute[CompletionRequest]:
    return GenerationRoute(
        services,
        settler,
        id_prefix="cmpl-",
        parse=parse_completion,
        translate=translator.completion,
        shape=CompletionShape,
    )


@dataclass(frozen=True, slots=True)
class CompletionShape:
    """Chunks and whole answers are the same object, `text_completion`."""

    frame: Frame

    def opening(self) -> list[Json]:
        return []

    def delta(self, text: str) -> Json:
        return self.frame.chunk("text_completion", [_choice(text, None)])

    def closing(self, finish_reason: str) -> Json:
        return self.frame.chunk("text_completion", [_choice("", finish_reason)])

    def usage_chunk(self, usage: Usage) -> Json:
        return self.frame.whole("text_completion", []) | {"usage": usage_json(usage)}

    def whole(self, text: str, finish_reason: str, usage: Usage) -> Json:
        return self.frame.whole("text_completion", [_choice(text, finish_reason)]) | {"usage": usage_json(usage)}


def _choice(text: str, finish_reason: str | None) -> Json:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
