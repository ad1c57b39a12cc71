"""GET below /v1/organization: a tenant's own credit, budgets, issued invoices and payments, for reading.

The objects are those that operators and commands see. Drafts are not there: their figures are nobody's yet.
"""

from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.requests import Request
from starlette.responses import Response

from gateway.api.auth import Caller
from gateway.api.problems import NotThereError
from gateway.billing.press import MEDIA_TYPES, Press
from gateway.organization.desk import PAGE_DEFAULT, PAGE_MAX, Desk, listed, page_of
from gateway.organization.query import Query
from gateway.records.invoices import FILE_KINDS, file_of, invoice_record, payments_record
from gateway.records.money import budget_records, credit_records, line_record
from gateway.records.plain import record
from gateway.services import Services
from tenancy.accounts.credit_line import get_line
from tenancy.accounts.ledger import balance
from tenancy.accounts.posting import currency_of
from tenancy.invoicing.invoices import Invoice, InvoiceError, get_invoice, list_invoices


class MoneyDesk(Desk):
    def __init__(self, services: Services) -> None:
        super().__init__(services)
        self._press = Press()

    async def balance(self, request: Request, caller: Caller) -> Any:
        """What is left, what requests in flight hold, what was billed in all; and a post-paid tenant's line."""
        Query(request.query_params).end()
        tenant_id = caller.principal.tenant_id
        async with self.services.database.read(tenant_id) as conn:
            line = await get_line(conn, tenant_id)
            currency = await currency_of(conn, tenant_id)
            return (
                {"tenant_id": tenant_id, "currency": currency}
                | record(await balance(conn, tenant_id))
                | {"credit_line": None if line is None else line_record(tenant_id, line, currency)}
            )

    async def credits(self, request: Request, caller: Caller) -> Any:
        after, limit = _page(request)
        async with self.services.database.read(caller.principal.tenant_id) as conn:
            found = await credit_records(conn, caller.principal.tenant_id, self.services.world.now_ns())
        page, more = page_of(found, lambda one: str(one["credit_id"]), after, limit)
        return listed(page, [one["credit_id"] for one in page], more)

    async def budgets(self, request: Request, caller: Caller) -> Any:
        after, limit = _page(request)
        async with self.services.database.read(caller.principal.tenant_id) as conn:
            found = await budget_records(conn, caller.principal.tenant_id, self.services.world.now_ns())
        page, more = page_of(found, lambda one: str(one["budget"]["budget_id"]), after, limit)
        return listed(page, [one["budget"]["budget_id"] for one in page], more)

    async def invoices(self, request: Request, caller: Caller) -> Any:
        """The newest first."""
        after, limit = _page(request)
        principal = caller.principal
        async with self.services.database.read(principal.tenant_id) as conn:
            before = await _own(conn, caller, after, "cursor") if after else None
            found = await list_invoices(conn, principal.tenant_id, before=before, limit=limit + 1, issued=True)
            page = [await invoice_record(conn, one, principal.tenant_name) for one in found[:limit]]
        return listed(page, [one["invoice_id"] for one in page], len(found) > limit)

    async def invoice(self, request: Request, caller: Caller) -> Any:
        Query(request.query_params).end()
        async with self.services.database.read(caller.principal.tenant_id) as conn:
            one = await _own(conn, caller, request.path_params["invoice_id"])
            return await invoice_record(conn, one, caller.principal.tenant_name)

    async def file(self, request: Request, caller: Caller) -> Any:
        """As ``format``: pdf (the default), csv or json; the same bytes each time."""
        query = Query(request.query_params)
        asked = query.text("format", FILE_KINDS) or "pdf"
        query.end()
        kind = next(one for one in FILE_KINDS if one == asked)
        async with self.services.database.read(caller.principal.tenant_id) as conn:
            one = await _own(conn, caller, request.path_params["invoice_id"])
            made_from = await file_of(conn, one)
        headers = {"content-disposition": f'attachment; filename="{one.invoice_id}.{kind}"'}
        return Response(await self._press.make(made_from, kind), media_type=MEDIA_TYPES[kind], headers=headers)

    async def payments(self, request: Request, caller: Caller) -> Any:
        Query(request.query_params).end()
        async with self.services.database.read(caller.principal.tenant_id) as conn:
            one = await _own(conn, caller, request.path_params["invoice_id"])
            return await payments_record(conn, one.invoice_id)


def _page(request: Request) -> tuple[str, int]:
    query = Query(request.query_params)
    after, limit = query.text("after"), query.number("limit", PAGE_DEFAULT, 1, PAGE_MAX)
    query.end()
    return after, limit


async def _own(conn: AsyncConnection, caller: Caller, invoice_id: str, what: str = "invoice") -> Invoice:
    """Raises NotThereError, also for a draft: its figures are not final."""
    if "\0" in invoice_id:
        raise NotThereError(what, invoice_id)
    try:
        found = await get_invoice(conn, invoice_id)
    except InvoiceError as error:
        raise NotThereError(what, invoice_id) from error
    if found.tenant_id != caller.principal.tenant_id or found.issued_ns is None:
        raise NotThereError(what, invoice_id)
    return found
