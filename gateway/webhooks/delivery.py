"""The two rounds behind webhooks: new entries of the log become deliveries; deliveries that are due are sent."""

import asyncio
import ssl

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from audit.transparency.entry import Entry
from audit.transparency.outbox import append
from gateway import __version__
from gateway.services import Services
from gateway.webhooks.events import new_events, payload
from gateway.webhooks.post import POST_TIMEOUT_S, PostError, post
from gateway.webhooks.signature import endpoint_secret, signature
from tenancy.webhooks import (
    GONE,
    NUM_ATTEMPTS_MAX,
    SECOND,
    Delivery,
    Endpoint,
    claim_due,
    end_endpoint,
    endpoints,
    enqueue,
    forget_deliveries,
    record_attempt,
)

BATCH_MAX = 32  # sent in one round
AT_ONCE_MAX = 8
KEPT_NS = 30 * 24 * 3_600 * SECOND  # how long a delivery that has ended can be looked at and resent

log = structlog.get_logger(__name__)


class Webhooks:
    """``tls`` None trusts what the system trusts."""

    def __init__(
        self, services: Services, tls: ssl.SSLContext | None = None, post_timeout_s: float = POST_TIMEOUT_S
    ) -> None:
        self._services = services
        self._post_timeout_s = post_timeout_s
        self._tls = tls or ssl.create_default_context()
        self._slots = asyncio.Semaphore(AT_ONCE_MAX)

    async def round(self) -> None:
        await self.collect()
        await self.send_due()

    async def collect(self) -> None:
        services = self._services
        async with services.database.read() as conn:
            found = [(endpoint, await new_events(conn, endpoint)) for endpoint in await endpoints(conn)]
        for endpoint, (events, next_leaf_index) in found:
            if next_leaf_index == endpoint.next_leaf_index:
                continue
            async with services.database.transaction() as conn:
                await enqueue(
                    conn,
                    endpoint,
                    events,
                    next_leaf_index=next_leaf_index,
                    entropy=services.world.entropy,
                    now_ns=services.world.now_ns(),
                )

    async def send_due(self) -> None:
        services = self._services
        async with services.database.transaction() as conn:
            claimed = await claim_due(conn, services.world.now_ns(), BATCH_MAX)
        await asyncio.gather(*(self._send(endpoint, delivery) for endpoint, delivery in claimed))

    async def forget(self) -> None:
        async with self._services.database.transaction() as conn:
            await forget_deliveries(conn, self._services.world.now_ns() - KEPT_NS)

    async def _send(self, endpoint: Endpoint, delivery: Delivery) -> None:
        services, world = self._services, self._services.world
        status: int | None = None
        async with self._slots:
            async with services.database.read() as conn:
                body = await payload(conn, endpoint, delivery.leaf_index)
            if body is None:
                status, error = GONE, "the entry was erased from the log"
            else:
                try:
                    status = await self._post(endpoint, delivery, body)
                    error = f"the receiver answered {status}"
                except PostError as failure:
                    error = str(failure)
        async with services.database.transaction() as conn:
            jitter = int.from_bytes(world.entropy(4)) / 2**32
            now_ns = world.now_ns()
            after = await record_attempt(conn, delivery, status=status, error=error, jitter=jitter, now_ns=now_ns)
            if after.state == "dead":
                await self._given_up(conn, endpoint, after, body is not None and status == GONE)
        services.metrics.webhook_attempt(after.state if after.state != "pending" else "failed")
        if after.state != "delivered":
            log.warning("webhook.not_delivered", endpoint_id=endpoint.endpoint_id, error=error, state=after.state)

    async def _post(self, endpoint: Endpoint, delivery: Delivery, body: bytes) -> int:
        services = self._services
        event_id, timestamp_s = f"evt_{delivery.leaf_index}", services.world.now_ns() // SECOND
        secret = endpoint_secret(services.secrets, endpoint.endpoint_id)
        headers = {
            "content-type": "application/json",
            "user-agent": f"Bulkhead/{__version__}",
            "webhook-id": event_id,
            "webhook-timestamp": str(timestamp_s),
            "webhook-signature": signature(secret, event_id, timestamp_s, body),
        }
        allowed = services.settings.webhook_private
        return await post(
            endpoint.url, body, headers, private_allowed=allowed, tls=self._tls, timeout_s=self._post_timeout_s
        )

    async def _given_up(self, conn: AsyncConnection, endpoint: Endpoint, delivery: Delivery, gone: bool) -> None:
        """Logged, and the endpoint ended where its receiver wants no more."""
        now_ns = self._services.world.now_ns()
        entry = Entry(
            "webhook.given_up",
            endpoint.tenant_id,
            now_ns,
            {
                "endpoint_id": endpoint.endpoint_id,
                "delivery_id": delivery.delivery_id,
                "event_kind": delivery.kind,
                "log_index": delivery.leaf_index,
                "num_attempts": min(delivery.num_attempts, NUM_ATTEMPTS_MAX),
                "reason": delivery.last_error,
            },
        )
        await append(conn, entry, entropy=self._services.world.entropy)
        if gone and not endpoint.end_reason:
            await end_endpoint(conn, endpoint.endpoint_id, "the receiver answered 410", now_ns=now_ns)
