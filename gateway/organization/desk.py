"""What all routes below /v1/organization share: whose key it is, what it may do, and how lists are cut into pages.

OpenAI's organisation is what we call a tenant: a key sees its own tenant and nothing else. What belongs to another
tenant and what does not exist are one answer.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.requests import Request
from starlette.responses import Response

from gateway.api.admission import show_limits
from gateway.api.auth import Caller, authenticated
from gateway.api.problems import InvalidRequestError, NotThereError
from gateway.clerk import Clerk
from gateway.services import Services

PAGE_MAX = 100
PAGE_DEFAULT = 20
NS = 1_000_000_000

Item = TypeVar("Item")
Body = TypeVar("Body", bound=msgspec.Struct)
Answer = Callable[[Request, Caller], Awaitable[Any]]


class Desk:
    """One of the folder's nouns: its routes answer through `open_to`."""

    def __init__(self, services: Services) -> None:
        self.services = services

    def open_to(self, scope: str, answer: Answer) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint for keys that have ``scope``; ``answer`` gives what JSON can hold, or a file."""

        async def endpoint(request: Request) -> Response:
            caller = await authenticated(self.services, request.scope, scope)
            await show_limits(self.services, caller, request.scope["state"])
            found = await answer(request, caller)
            if isinstance(found, Response):
                return found
            return Response(msgspec.json.encode(found), media_type="application/json")

        return endpoint

    def clerk(self, conn: AsyncConnection) -> Clerk:
        return Clerk(conn, self.services.world.entropy, self.services.world.now_ns())


async def body_of(request: Request, kind: type[Body]) -> Body:
    """Raises InvalidRequestError."""
    try:
        return msgspec.json.decode(await request.body(), type=kind)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(str(error)) from error
    except msgspec.DecodeError as error:
        raise InvalidRequestError("The body is not valid JSON.") from error


def page_of(items: Sequence[Item], id_of: Callable[[Item], str], after: str, limit: int) -> tuple[list[Item], bool]:
    """What follows the item ``after`` ("": from the first), and whether there is more. Raises NotThereError: a cursor
    is an id of the caller's own list."""
    first = 0
    if after:
        ids = [id_of(item) for item in items]
        if after not in ids:
            raise NotThereError("cursor", after)
        first = ids.index(after) + 1
    return list(items[first : first + limit]), len(items) > first + limit


def listing(data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """OpenAI's list object, of items that have an `id`."""
    return listed(data, [item["id"] for item in data], has_more)


def listed(data: Sequence[dict[str, Any]], ids: Sequence[str], has_more: bool) -> dict[str, Any]:
    """The same, of any items; `ids` are what `after` takes."""
    return {
        "object": "list",
        "data": list(data),
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
        "has_more": has_more,
    }
