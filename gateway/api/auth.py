"""Who is asking: the bearer key of a request, turned into a Principal and the limits that apply to it.

One read of the database; on PostgreSQL none for less than a second after it where T1 looks at the key again
(gateway/remembered.py). So a revoked key is refused at once on every replica. Whatever is wrong with a key, the client
gets the same answer after the same work.
"""

from dataclasses import dataclass, replace

from starlette.types import Scope

from gateway.api.problems import MissingScopeError
from gateway.database import DatabaseUnavailableError
from gateway.services import Services
from tenancy.access.callers import identify
from tenancy.access.keys import InvalidApiKeyError, PresentedKey, Principal
from tenancy.quotas.limits import ScopeLimits

INFERENCE_SCOPE = "inference"
KEY_CHARS_MAX = 512


@dataclass(frozen=True, slots=True)
class Caller:
    principal: Principal
    limits: tuple[ScopeLimits, ...]
    remembered: bool = False  # as of a moment ago: whoever admits it looks at its key again


async def authenticated(
    services: Services, scope: Scope, required: str = INFERENCE_SCOPE, *, may_remember: bool = False
) -> Caller:
    """The caller, whose key has the scope `required` of the route. `may_remember`: its key is looked at again.

    Raises InvalidApiKeyError (401), MissingScopeError (403), DatabaseUnavailableError (503)."""
    now_ns, peer = services.world.now_ns(), peer_address(scope)
    key = PresentedKey.of(bearer_key(scope), services.secrets.key_pepper)
    may_remember = may_remember and not services.database.is_sqlite
    caller = services.remembered.caller(services.world, key, peer) if may_remember else None
    if caller is None:
        caller = await _looked_up(services, key, peer, keep=may_remember)
    services.key_uses.note(caller.principal.key_id, now_ns)
    if required not in caller.principal.scopes:
        raise MissingScopeError(required)
    return caller


async def look_again(services: Services, scope: Scope, caller: Caller) -> None:
    """After an answer: look a remembered caller up before it is forgotten."""
    if not caller.remembered:
        return
    key = PresentedKey.of(bearer_key(scope), services.secrets.key_pepper)
    if services.remembered.take_ageing(services.world, key):
        try:
            await _looked_up(services, key, peer_address(scope), keep=True)
        except (InvalidApiKeyError, DatabaseUnavailableError):  # the next request is told
            services.remembered.given_up(key)
        except BaseException:
            services.remembered.given_up(key)
            raise


async def _looked_up(services: Services, key: PresentedKey, peer: str | None, *, keep: bool) -> Caller:
    now_ns, asked_ns = services.world.now_ns(), services.world.monotonic_ns()
    async with services.database.glance() as conn:
        caller = Caller(*await identify(conn, key, now_ns=now_ns, peer=peer))
    if keep:
        services.remembered.keep_caller(key, replace(caller, remembered=True), asked_ns)
    return caller


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
