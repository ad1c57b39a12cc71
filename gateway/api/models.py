"""GET /v1/models and /v1/models/{id}: what is served here."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.api.admission import show_limits
from gateway.api.auth import Caller, authenticated
from gateway.api.problems import ModelNotFoundError
from gateway.api.shapes import Json
from gateway.services import Services


class Models:
    def __init__(self, services: Services) -> None:
        self._services = services
        # OpenAI's `created`, seconds: when this server began to offer the model.
        self._created = services.world.now_ns() // 1_000_000_000

    async def list(self, request: Request) -> Response:
        caller = await self._known_caller(request)
        allowed = caller.principal.rules.allows_model(self._services.tokenizer.model_id)
        return JSONResponse({"object": "list", "data": [self._model()] if allowed else []})

    async def one(self, request: Request) -> Response:
        caller = await self._known_caller(request)
        model_id = request.path_params["model_id"]
        if model_id != self._services.tokenizer.model_id or not caller.principal.rules.allows_model(model_id):
            raise ModelNotFoundError(model_id[:256])
        return JSONResponse(self._model())

    async def _known_caller(self, request: Request) -> Caller:
        caller = await authenticated(self._services, request.scope)
        await show_limits(self._services, caller, request.scope["state"])
        return caller

    def _model(self) -> Json:
        tokenizer = self._services.tokenizer
        return {
            "id": tokenizer.model_id,
            "object": "model",
            "created": self._created,
            "owned_by": "bulkhead",
            "context_max": tokenizer.context_max,
        }
