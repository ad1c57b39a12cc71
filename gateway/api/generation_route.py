"""What the two completion routes share: authenticate, read, translate, answer.

An ASGI app rather than a function that returns a response, so that one try/finally spans the whole answer.
"""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Generic, TypeVar

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from engine.protocol import Ready
from gateway.api.admission import show_limits
from gateway.api.auth import Caller, authenticated, look_again
from gateway.api.exchange import serve
from gateway.api.idempotency import idempotency_key, serve_once
from gateway.api.problems import ModelNotFoundError, TierNotAllowedError
from gateway.api.settlement import Settler
from gateway.api.shapes import Frame, Shape, fingerprint
from gateway.api.translation import Work
from gateway.api.wire import Common
from gateway.services import Services
from gateway.stages import passed
from tenancy.idempotency import IdempotencyKey

RequestT = TypeVar("RequestT", bound=Common)


class GenerationRoute(Generic[RequestT]):
    def __init__(
        self,
        services: Services,
        settler: Settler,
        *,
        id_prefix: str,
        parse: Callable[[bytes], RequestT],
        translate: Callable[[RequestT, Ready], Awaitable[Work]],
        shape: Callable[[Frame], Shape],
    ) -> None:
        self._services = services
        self._settler = settler
        self._id_prefix = id_prefix
        self._parse = parse
        self._translate = translate
        self._shape = shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        services = self._services
        caller = await authenticated(services, scope, may_remember=True)  # before a byte of the body is read
        passed(scope["state"], "authenticate")
        try:
            body = await Request(scope, receive).body()
            key = idempotency_key(scope, caller.principal.tenant_id, body)
            request = self._parse(body)
            if not caller.principal.rules.allows_model(request.model):
                raise ModelNotFoundError(request.model)
            tier = self._tier(request, caller)
            client = services.engine.client()  # before anything is reserved
            work = replace(await self._translate(request, client.ready), tier=tier)
        except Exception:
            await show_limits(services, caller, scope["state"])
            raise
        passed(scope["state"], "read")
        request_id: str = scope["state"]["request_id"]
        frame = Frame(
            id=self._id_prefix + request_id.removeprefix("req_"),
            created=services.world.now_ns() // 1_000_000_000,
            fingerprint=fingerprint(client.ready),
            work=work,
            token_bytes=services.tokenizer.token_bytes,
        )
        shape = self._shape(frame)

        async def run(receive: Receive, send: Send, key: IdempotencyKey | None = None) -> bool:
            return await serve(services, self._settler, client, caller, work, shape, scope, receive, send, key)

        if key is None:
            await run(receive, send)
        else:
            await serve_once(services, caller, key, run, scope, receive, send)
        passed(scope["state"], "answer")
        await look_again(services, scope, caller)

    def _tier(self, request: RequestT, caller: Caller) -> str:
        """The service tier that serves it. Raises TierNotAllowedError where key or tenant may not use that one."""
        principal = caller.principal
        tier = principal.rules.tier_for(request.service_tier)
        if tier is None:
            raise TierNotAllowedError("auto" if request.service_tier is None else request.service_tier)
        if tier == "priority" and not self._services.settings.may_use_priority(principal.tenant_name):
            raise TierNotAllowedError(tier)
        return tier
