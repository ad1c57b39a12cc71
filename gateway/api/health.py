"""GET /healthz: this process answers. GET /readyz: a request would be served, and under which isolation.

Both are open to anyone who can connect: they name states and counts, never tenants, addresses or error texts.
"""

import asyncio
from collections.abc import Awaitable, Callable

import structlog
from sqlalchemy import func, select, text
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from audit.transparency.tables import outbox
from gateway.api.shapes import Json
from gateway.services import Services

CHECK_TIMEOUT_S = 2.0
OUTBOX_LAG_MAX_S = 60  # the log's promise: an entry is in a signed checkpoint within this time

log = structlog.get_logger("gateway.api.health")


async def healthz(_: Request) -> Response:
    return JSONResponse({"status": "ok"})


class Readiness:
    def __init__(self, services: Services) -> None:
        self._services = services

    async def answer(self, _: Request) -> Response:
        database, redis, audit = await asyncio.gather(
            _checked("database", self._database), _checked("redis", self._redis), _checked("audit", self._audit)
        )
        checks = {"database": database, "redis": redis, "audit": audit, "engine": self._engine()}
        ready = all(check["ok"] for check in checks.values())
        body = {"status": "ready" if ready else "not_ready", "checks": checks}
        headers = {} if ready else {"retry-after": "2"}
        return JSONResponse(body, 200 if ready else 503, headers)

    async def _database(self) -> Json:
        async with self._services.database.read() as conn:
            await conn.execute(text("SELECT 1"))
        found: Json = {"ok": True}
        if (seen := self._services.standing.seen) is not None:
            found |= {"append_only": seen.append_only, "row_security": seen.row_security}
        return found

    async def _redis(self) -> Json:
        return {"ok": await self._services.allowance.is_there()}

    async def _audit(self) -> Json:
        async with self._services.database.read() as conn:
            row = (await conn.execute(select(func.count(), func.min(outbox.c.at_ns)).select_from(outbox))).one()
        num_waiting, oldest_ns = row
        lag_s = 0
        if oldest_ns is not None:
            lag_s = max(0, self._services.world.now_ns() - int(oldest_ns)) // 1_000_000_000
        return {"ok": lag_s <= OUTBOX_LAG_MAX_S, "num_waiting": int(num_waiting), "lag_s": lag_s}

    def _engine(self) -> Json:
        status = self._services.engine.status
        found: Json = {"ok": status.state == "ready", "state": status.state, "num_restarts": status.num_restarts}
        if status.ready is not None:
            ready = status.ready
            found |= {
                "isolation": ready.isolation,
                "kernels": ready.kernels,
                "epoch": ready.epoch,
                "model": ready.model_id,
                "model_digest": ready.model_digest,
            }
        if status.stats is not None:
            audit = status.stats.audit
            blind = audit.get("num_self_tests_failed", 0) > 0
            head = "witnessed" if audit.get("head_is_witnessed") else "not witnessed"
            found |= {"closed": status.stats.closed, "audit_blind": blind, "head": head}
            found["ok"] = found["ok"] and not (status.stats.closed or blind)
            found |= {"num_running": status.stats.num_running, "num_waiting": status.stats.num_waiting}
        return found


async def _checked(name: str, check: Callable[[], Awaitable[Json]]) -> Json:
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            return await check()
    except Exception as error:  # whatever it is, the answer is "not ready"; the log has the reason
        log.warning("readiness.failed", check=name, error=f"{type(error).__name__}: {error}")
        return {"ok": False}
