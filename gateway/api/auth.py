"""Who is asking: the bearer key of a request, turned into a Principal and the limits that apply to it.

One read of the database for each request, so a revoked key is refused at once on every replica. Whatever is wrong with
a key, the client gets the same answer after the same work.
"""

from dataclasses import dataclass

from starlette.types import Scope

from gateway.api.problems import MissingScopeError
from gateway.services import Services
from tenancy.keys import Principal, authenticate
from tenancy.limits import ScopeLimits, load_scopes

INFERENCE_SCOPE = "inference"
KEY_CHARS_MAX = 512


@dataclass(frozen=True, slots=True)
class Caller:
    principal: Principal
    limits: tuple[ScopeLimits, ...]


async def authenticated(services: Services, scope: Scope, required: str = INFERENCE_SCOPE) -> Caller:
    """The caller, whose key has the scope `required` of the route.

    Raises InvalidApiKeyError (401), MissingScopeError (403), DatabaseUnavailableError (503)."""
    presented = bearer_key(scope)
    now_ns = services.world.now_ns()
    async with services.database.read() as conn:
        principal = await authenticate(
            conn, presented, pepper=services.secrets.key_pepper, now_ns=now_ns, peer=peer_address(scope)
        )
        limits = await load_scopes(conn, principal)
    services.key_uses.note(principal.key_id, now_ns)
    if required not in principal.scopes:
        raise MissingScopeError(required)
    return Caller(principal, tuple(limits))


def peer_address(scope: Scope) -> str | None:
    """The address at the other end of the connection; no header is believed (host/https.py)."""
    client = scope.get("client")
    return None if client is None else str(client[0])


def bearer_key(scope: Scope) -> str:
    """The presented key, or "" (which is never valid) when it is missing, given twice or not a bearer key."""
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(values) != 1:
        return ""
    scheme, _, key = values[0].decode("latin-1").partition(" ")
    key = key.strip()
    return key if scheme.lower() == "bearer" and len(key) <= KEY_CHARS_MAX else ""
