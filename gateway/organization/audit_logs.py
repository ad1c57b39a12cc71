"""GET /v1/organization/audit_logs: a tenant's own entries of the transparency log, the newest first.

The shape is OpenAI's; ``type`` is the entry's kind, ``details`` its fields, and ``log_index`` the leaf under which
anybody who holds the log can check it.
"""

import json
import re
from typing import Any

from sqlalchemy import or_, select
from starlette.requests import Request

from audit.transparency.entry import KINDS
from audit.transparency.tables import log_leaf, log_opening
from gateway.api.auth import Caller
from gateway.api.problems import NotThereError
from gateway.organization.desk import NS, PAGE_DEFAULT, PAGE_MAX, Desk, listing
from gateway.organization.query import SECONDS_MAX, Query
from gateway.webhooks.events import VIOLATION, concerns_tenant, told_to_tenant

BATCH = 500
ID = re.compile(r"evt_([0-9]{1,18})")
BOUNDS = {"gt": 1, "gte": 0, "lt": 0, "lte": 1}  # what to add to whole seconds for a half-open interval


class AuditLogDesk(Desk):
    async def page(self, request: Request, caller: Caller) -> Any:
        query = Query(request.query_params)
        kinds = query.texts("event_types", KINDS)
        limit = query.number("limit", PAGE_DEFAULT, 1, PAGE_MAX)
        after = query.text("after")
        bounds = {name: query.number(f"effective_at[{name}]", -1, 0, SECONDS_MAX) for name in BOUNDS}
        query.end()
        before_index: int | None = None
        if after:
            match = ID.fullmatch(after)
            if match is None:
                raise NotThereError("cursor", after)
            before_index = int(match[1])
        found = await self._entries(caller.principal.tenant_id, kinds, bounds, before_index, limit + 1)
        return listing(found[:limit], len(found) > limit)

    async def _entries(
        self, tenant_id: str, kinds: tuple[str, ...], bounds: dict[str, int], before_index: int | None, limit: int
    ) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while len(found) < limit:
            rows = await self._rows(tenant_id, kinds, bounds, before_index)
            for row in rows:
                if concerns_tenant(tenant_id, row.kind, row.tenant_id, row.body):
                    found.append(_entry(tenant_id, row))
            if len(rows) < BATCH:
                break
            before_index = rows[-1].leaf_index
        return found[:limit]

    async def _rows(
        self, tenant_id: str, kinds: tuple[str, ...], bounds: dict[str, int], before_index: int | None
    ) -> Any:
        query = (
            select(
                log_leaf.c.leaf_index, log_leaf.c.kind, log_leaf.c.at_ns, log_opening.c.tenant_id, log_opening.c.body
            )
            .join(log_opening, log_opening.c.leaf_index == log_leaf.c.leaf_index)
            .where(or_(log_opening.c.tenant_id == tenant_id, log_leaf.c.kind == VIOLATION))
            .order_by(log_leaf.c.leaf_index.desc())
            .limit(BATCH)
        )
        if kinds:
            query = query.where(log_leaf.c.kind.in_(kinds))
        if before_index is not None:
            query = query.where(log_leaf.c.leaf_index < before_index)
        for name, bound_s in bounds.items():
            if bound_s >= 0:
                bound_ns = (bound_s + BOUNDS[name]) * NS
                query = query.where(
                    log_leaf.c.at_ns >= bound_ns if name.startswith("g") else log_leaf.c.at_ns < bound_ns
                )
        async with self.services.database.read(tenant_id) as conn:
            return (await conn.execute(query)).all()


def _entry(tenant_id: str, row: Any) -> dict[str, Any]:
    return {
        "object": "organization.audit_log",
        "id": f"evt_{row.leaf_index}",
        "type": row.kind,
        "effective_at": row.at_ns // NS,
        "log_index": row.leaf_index,
        "details": told_to_tenant(row.kind, json.loads(row.body)),
    }
