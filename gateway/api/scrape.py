"""GET /metrics: for a scraper that holds the metrics token, and for nobody else, since it names tenants."""

import hmac

from starlette.requests import Request
from starlette.responses import Response

from gateway.secrets import metrics_token
from gateway.services import Services
from tenancy.access.keys import InvalidApiKeyError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Scrape:
    def __init__(self, services: Services) -> None:
        self._metrics = services.metrics
        self._expected = b"Bearer " + metrics_token(services.secrets).encode()

    async def answer(self, request: Request) -> Response:
        """Raises InvalidApiKeyError: a wrong token is told what a wrong key is told."""
        presented = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(presented, self._expected):
            raise InvalidApiKeyError
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE})
