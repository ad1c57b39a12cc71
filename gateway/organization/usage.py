"""GET /v1/organization/usage/completions and /v1/organization/costs: a tenant's own usage in buckets of time."""

import base64
import binascii
from decimal import Decimal
from typing import Any

import msgspec
from starlette.requests import Request

from gateway.api.auth import Caller
from gateway.api.problems import InvalidRequestError
from gateway.organization.desk import NS, Desk
from gateway.organization.query import SECONDS_MAX, Query
from tenancy.accounts.posting import currency_of
from tenancy.usage.usage_buckets import GROUPS, BucketSums, Filter, GroupBy, usage_buckets

WIDTHS_S = {"1m": 60, "1h": 3_600, "1d": 86_400}
# bucket width -> buckets of a page: by default, and at most
PAGES = {"1m": (60, 1_440), "1h": (24, 168), "1d": (7, 31)}
COST_PAGE = (7, 180)
COST_GROUPS: dict[str, GroupBy] = {"project_id": "project_id", "api_key_id": "api_key_id", "line_item": "model"}


class UsageDesk(Desk):
    async def completions(self, request: Request, caller: Caller) -> Any:
        query = Query(request.query_params)
        width = query.text("bucket_width", WIDTHS_S) or "1d"
        group_by = query.texts("group_by", GROUPS)
        only = Filter(query.texts("project_ids"), query.texts("api_key_ids"), query.texts("models"))
        return await self._page(query, caller, WIDTHS_S[width], PAGES[width], group_by, only, _usage_result)

    async def costs(self, request: Request, caller: Caller) -> Any:
        query = Query(request.query_params)
        query.text("bucket_width", ("1d",))
        group_by = [COST_GROUPS[name] for name in query.texts("group_by", COST_GROUPS)]
        only = Filter(query.texts("project_ids"), query.texts("api_key_ids"), query.texts("line_items"))
        return await self._page(query, caller, WIDTHS_S["1d"], COST_PAGE, group_by, only, _cost_result)

    async def _page(
        self,
        query: Query,
        caller: Caller,
        width_s: int,
        page: tuple[int, int],
        group_by: Any,
        only: Filter,
        result: Any,
    ) -> Any:
        """Buckets are whole: they begin at multiples of their width, UTC. The last one ends where the query does."""
        start_s = query.number("start_time", -1, 0, SECONDS_MAX)
        if start_s < 0:
            raise InvalidRequestError("start_time is missing: seconds since the epoch", "start_time")
        now_s = self.services.world.now_ns() // NS
        end_s = query.number("end_time", now_s + 1, 0, SECONDS_MAX)
        limit = query.number("limit", page[0], 1, page[1])
        cursor = query.text("page")
        query.end()
        first_s = _read_cursor(cursor) if cursor else start_s - start_s % width_s
        if cursor and (first_s % width_s or first_s < start_s - width_s):
            raise InvalidRequestError("page is not a next_page of this query", "page")
        last_s = min(end_s, first_s + limit * width_s)
        async with self.services.database.read(caller.principal.tenant_id) as conn:
            sums = await usage_buckets(
                conn,
                caller.principal.tenant_id,
                since_ns=first_s * NS,
                until_ns=max(first_s, last_s) * NS,
                width_ns=width_s * NS,
                group_by=group_by,
                only=only,
            )
            currency = (await currency_of(conn, caller.principal.tenant_id)).lower()
        by_start: dict[int, list[Any]] = {}
        for one in sums:
            by_start.setdefault(one.start_ns // NS, []).append(result(one, currency))
        buckets = [
            {
                "object": "bucket",
                "start_time": at_s,
                "end_time": min(end_s, at_s + width_s),
                "results": by_start.get(at_s, []),
            }
            for at_s in range(first_s, last_s, width_s)
        ]
        more = last_s < end_s
        return {
            "object": "page",
            "data": buckets,
            "has_more": more,
            "next_page": _write_cursor(last_s) if more else None,
        }


def _usage_result(sums: BucketSums, _currency: str) -> dict[str, Any]:
    return {
        "object": "organization.usage.completions.result",
        "input_tokens": sums.num_prompt_tokens,
        "input_cached_tokens": sums.num_cached_tokens,
        "input_uncached_tokens": sums.num_prompt_tokens - sums.num_cached_tokens,
        "output_tokens": sums.num_completion_tokens,
        "num_model_requests": sums.num_requests,
        "project_id": sums.group.get("project_id"),
        "api_key_id": sums.group.get("api_key_id"),
        "model": sums.group.get("model"),
        "user_id": None,
        "batch": None,
    }


def _cost_result(sums: BucketSums, currency: str) -> dict[str, Any]:
    """``value`` is written with all its digits, as no float could be; ``amount_nano_usd`` is the integer itself."""
    return {
        "object": "organization.costs.result",
        "amount": {
            "value": msgspec.Raw(f"{Decimal(sums.amount_nano_usd).scaleb(-9):f}".encode()),
            "currency": currency,
        },
        "amount_nano_usd": str(sums.amount_nano_usd),
        "project_id": sums.group.get("project_id"),
        "api_key_id": sums.group.get("api_key_id"),
        "line_item": sums.group.get("model"),
    }


def _write_cursor(at_s: int) -> str:
    return "page_" + base64.urlsafe_b64encode(str(at_s).encode()).decode().rstrip("=")


def _read_cursor(text: str) -> int:
    """Raises InvalidRequestError."""
    inner = text.removeprefix("page_")
    try:
        digits = base64.urlsafe_b64decode(inner + "=" * (-len(inner) % 4)).decode("ascii")
    except (binascii.Error, UnicodeDecodeError, ValueError):
        digits = ""
    if not digits.isdigit() or int(digits) > SECONDS_MAX:
        raise InvalidRequestError("page is not a next_page of this query", "page")
    return int(digits)
