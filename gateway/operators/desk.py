"""What all routes below /operator/v1 share: whose token it is, whether it may write, one transaction, one answer.

A request goes through these, in this order:

1. the token (401), and for a route that changes something whether it may write (403), before a byte of the body is read
2. the body, read and checked (400) before a transaction is open: a slow client holds no lock
3. one transaction: the token once more, so that a revoked one changes nothing; the change by the same clerk as the
   command's; the entry `operator.request`, which names the token. All of it or nothing
4. the answer. Reading routes have a snapshot instead of a transaction, and files are made after it is closed
"""

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.requests import Request
from starlette.responses import Response

from audit.transparency.entry import Entry
from audit.transparency.outbox import append
from gateway.api.auth import bearer_key, peer_address
from gateway.api.problems import InvalidRequestError, NotThereError, ReadOnlyTokenError, RefusedError
from gateway.billing.bookkeeper import Bookkeeper
from gateway.billing.press import Press
from gateway.clerk import Clerk
from gateway.operators.refusals import told
from gateway.operators.tries import Tries
from gateway.organization.desk import PAGE_DEFAULT, PAGE_MAX, body_of, page_of
from gateway.organization.query import Query
from gateway.price_clerk import PriceClerk
from gateway.services import Services
from tenancy.access.directory import Tenant, get_tenant
from tenancy.access.operator_tokens import (
    Bearer,
    InvalidTokenError,
    PresentedToken,
    authenticate_token,
    require_token_alive,
)

ROOT = "/operator/v1"
ID = re.compile(r"[!-~]{1,128}")
NS_MAX = 2**62  # in the year 2116
NANO_MAX = 10**18  # a billion: far above any amount, far below overflow
_TEXT = r"\A[^\x00]*\Z"  # PostgreSQL stores no NUL

Text = Annotated[str, Meta(max_length=500, pattern=_TEXT)]
Name = Annotated[str, Meta(min_length=1, max_length=100, pattern=_TEXT)]
Id = Annotated[str, Meta(min_length=1, max_length=100, pattern=r"\A[ -~]+\Z")]
Nano = Annotated[int, Meta(ge=0, le=NANO_MAX)]
Ns = Annotated[int, Meta(ge=0, le=NS_MAX)]

Body = TypeVar("Body", bound=msgspec.Struct)


class Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a request that says all in its path: {}, or empty, as every body may be that needs no field."""


class Why(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    reason: Text = ""


@dataclass(frozen=True, slots=True)
class FileAnswer:
    """Bytes that are made after the snapshot is closed."""

    make: Callable[[], Awaitable[bytes]]
    media_type: str
    name: str


@dataclass(frozen=True, slots=True)
class Ask:
    """One request in its transaction or snapshot `conn`, at `now_ns`."""

    services: Services
    conn: AsyncConnection
    bearer: Bearer
    now_ns: int
    path: Mapping[str, str]
    query: Query
    press: Press

    @property
    def clerk(self) -> Clerk:
        return Clerk(self.conn, self.services.world.entropy, self.now_ns)

    @property
    def price_clerk(self) -> PriceClerk:
        return PriceClerk(self.conn, self.services.world.entropy, self.now_ns)

    @property
    def bookkeeper(self) -> Bookkeeper:
        return Bookkeeper(self.conn, self.services.world.entropy, self.now_ns)

    async def tenant(self, tenant_id: str = "") -> Tenant:
        """The path's tenant, or the one that is named. Raises RefusedError."""
        asked = tenant_id or self.path["tenant_id"]
        found = await get_tenant(self.conn, asked)
        if found is None:
            raise RefusedError(404, f"there is no tenant {asked!r}")
        return found

    def future_ns(self, at_ns: int | None, name: str) -> int | None:
        """Raises InvalidRequestError."""
        if at_ns is not None and at_ns <= self.now_ns:
            raise InvalidRequestError(f"{name} is not in the future", name)
        return at_ns

    def id_of(self, name: str) -> str:
        """Of the query; "" where it is not there. Raises InvalidRequestError."""
        value = self.query.text(name)
        if value and not ID.fullmatch(value):
            raise InvalidRequestError(f"{name} is not an id", name)
        return value

    def page(self, items: Sequence[Any], id_of: Callable[[Any], str]) -> tuple[list[Any], bool]:
        """The page that the query asks for, and whether there is more. Raises InvalidRequestError or NotThereError."""
        after, limit = self.query.text("after"), self.query.number("limit", PAGE_DEFAULT, 1, PAGE_MAX)
        self.query.end()
        return page_of(items, id_of, after, limit)


class Door:
    """Lets operators' tokens in, and nothing else."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self._press = Press()
        self._tries = Tries(services.redis, services.secrets.session_key)

    def reads(self, answer: Callable[[Ask], Awaitable[Any]]) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint for every token; ``answer`` gives what JSON can hold, or a FileAnswer."""

        async def endpoint(request: Request) -> Response:
            bearer = await self._bearer(request)
            path, query = _path_of(request), Query(request.query_params)
            now_ns = self.services.world.now_ns()
            async with self.services.database.read() as conn:
                with told():
                    found = await answer(Ask(self.services, conn, bearer, now_ns, path, query, self._press))
            if isinstance(found, FileAnswer):
                headers = {"content-disposition": f'attachment; filename="{found.name}"'}
                return Response(await found.make(), media_type=found.media_type, headers=headers)
            return _json(found)

        endpoint.__qualname__ = f"operators.{answer.__qualname__}"  # what the request's log line names
        return endpoint

    def writes(
        self, kind: type[Body], answer: Callable[[Ask, Body], Awaitable[Any]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint for tokens that may write, whose bodies are of ``kind``."""

        may_be_empty = not any(one.required for one in msgspec.structs.fields(kind))

        async def endpoint(request: Request) -> Response:
            bearer = await self._bearer(request)
            if bearer.read_only:
                raise ReadOnlyTokenError
            path, query = _path_of(request), Query(request.query_params)
            is_empty = may_be_empty and not await request.body()
            body = kind() if is_empty else await body_of(request, kind)
            async with self.services.database.transaction() as conn:
                now_ns = self.services.world.now_ns()  # where a writer had to wait, after that
                await require_token_alive(conn, bearer.token_id, now_ns)
                ask = Ask(self.services, conn, bearer, now_ns, path, query, self._press)
                with told():
                    found = await answer(ask, body)
                query.end()
                await append(conn, _entry(request, ask), entropy=self.services.world.entropy)
            return _json(found)

        endpoint.__qualname__ = f"operators.{answer.__qualname__}"
        return endpoint

    async def _bearer(self, request: Request) -> Bearer:
        """Raises InvalidTokenError, TooManyTriesError or DatabaseUnavailableError."""
        services, address = self.services, peer_address(request.scope) or ""
        token = PresentedToken.of(bearer_key(request.scope), services.secrets.key_pepper)
        public_id = token.public_id if token.is_one else ""
        if public_id:
            await self._tries.check(public_id, address)
        now_ns = services.world.now_ns()
        try:
            async with services.database.glance() as conn:
                bearer = await authenticate_token(conn, token, now_ns=now_ns)
        except InvalidTokenError:
            await self._tries.note(public_id, address)
            raise
        services.token_uses.note(bearer.token_id, now_ns)
        return bearer


def _path_of(request: Request) -> dict[str, str]:
    """Raises NotThereError for what no id looks like."""
    for name, value in request.path_params.items():
        if not ID.fullmatch(value):
            raise NotThereError(name.removesuffix("_id").replace("_", " "), value)
    return dict(request.path_params)


def _entry(request: Request, ask: Ask) -> Entry:
    route = request.scope["route"].path
    body = {
        "operator": ask.bearer.operator_name,
        "token_id": ask.bearer.token_id,
        "request_id": request.scope["state"]["request_id"],
        "route": f"{request.method} {route}",
        "subject": " ".join(ask.path.values()),
    }
    return Entry("operator.request", "", ask.now_ns, body)


def _json(found: Any) -> Response:
    return Response(msgspec.json.encode(found), media_type="application/json")
