"""POST /v1/completions: one prompt as text or token ids."""

from dataclasses import dataclass

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from gateway import wire
from gateway.auth import authenticated
from gateway.exchange import serve
from gateway.services import Services
from gateway.settlement import Settler
from gateway.shapes import Frame, Json, fingerprint, usage_json
from gateway.translation import Translator
from tenancy.meter import Usage


class Completions:
    """The route as an ASGI app, so that one try/finally spans the whole answer."""

    def __init__(self, services: Services, settler: Settler, translator: Translator) -> None:
        self._services = services
        self._settler = settler
        self._translator = translator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        services = self._services
        caller = await authenticated(services, scope)
        request = wire.parse_completion(await Request(scope, receive).body())
        client = services.engine.client()
        work = await self._translator.completion(request, client.ready)
        request_id: str = scope["state"]["request_id"]
        frame = Frame(
            id="cmpl-" + request_id.removeprefix("req_"),
            created=services.world.now_ns() // 1_000_000_000,
            model=work.model,
            fingerprint=fingerprint(client.ready),
            include_usage=work.include_usage,
        )
        await serve(services, self._settler, client, caller, work, CompletionShape(frame), scope, receive, send)


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
