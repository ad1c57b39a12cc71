"""Who gets what from each route: every route of the application, every kind of caller, own, another's and absent."""

import asyncio
from typing import Any

from starlette.routing import Route

from gateway.clerk import Clerk
from gateway.secrets import metrics_token
from tenancy.key_rules import read_rules
from tests.fakes.asgi import Answer
from tests.fakes.hall import Hall, chat_body
from tests.gateway.conftest import Stage

SECOND_NS = 10**9

# The callers that nobody knows: all of them must get the same bytes.
UNKNOWN = (
    "nobody",
    "no key of ours",
    "two headers",
    "basic",
    "revoked",
    "expired",
    "elsewhere",
    "suspended",
    "scraper",
    "operator",
)
CALLERS = (*UNKNOWN, "without inference", "acme")

# (method, path) -> status for (the unknown, a key without the scope, a good key). A new route fails until it is here.
EXPECTED = {
    ("POST", "/v1/chat/completions"): (401, 403, 200),
    ("POST", "/v1/completions"): (401, 403, 200),
    ("GET", "/v1/models"): (401, 403, 200),
    ("GET", "/v1/models/{model_id:path}"): (401, 403, 200),
    ("GET", "/healthz"): (200, 200, 200),
    ("GET", "/readyz"): (200, 200, 200),
    ("GET", "/metrics"): (401, 401, 401),
}
BODIES = {
    "/v1/chat/completions": chat_body("integer", max_tokens=1),
    "/v1/completions": {"model": "integer", "prompt": "x", "max_tokens": 1, "seed": 5},
}


async def headers_of_callers(hall: Hall) -> dict[str, dict[str, str]]:
    services, account = hall.services, hall.accounts["acme"]

    async def key(**how: Any) -> tuple[str, str]:
        now_ns = services.world.now_ns() - 2 * SECOND_NS
        async with hall.database.transaction() as conn:
            clerk = Clerk(conn, services.world.entropy, now_ns)
            made = await clerk.create_key(
                account.tenant_id, account.project_id, "k", services.secrets.key_pepper, **how
            )
        return made.key_id, made.secret_text

    revoked_id, revoked = await key()
    async with hall.database.transaction() as conn:
        clerk = Clerk(conn, services.world.entropy, services.world.now_ns())
        await clerk.revoke_key(account.tenant_id, revoked_id, "t")
        await clerk.set_tenant_status(hall.accounts["globex"].tenant_id, "suspended", "t")
    _, expired = await key(expires_ns=services.world.now_ns() - SECOND_NS)
    _, elsewhere = await key(rules=read_rules(networks=["192.0.2.0/24"]))
    _, usage = await key(scopes=frozenset({"usage", "audit", "admin"}))
    return {
        "nobody": {},
        "no key of ours": {"authorization": f"Bearer {account.secret[:-1]}"},
        "two headers": {"authorization": f"Bearer {account.secret}", "Authorization": f"Bearer {account.secret}"},
        "basic": {"authorization": f"Basic {account.secret}"},
        "revoked": {"authorization": f"Bearer {revoked}"},
        "expired": {"authorization": f"Bearer {expired}"},
        "elsewhere": {"authorization": f"Bearer {elsewhere}"},
        "suspended": {"authorization": f"Bearer {hall.accounts['globex'].secret}"},
        "scraper": {"authorization": f"Bearer {metrics_token(services.secrets)}"},
        "operator": {"cookie": "__Host-bulkhead=" + "A" * 43},
        "without inference": {"authorization": f"Bearer {usage}"},
        "acme": {"authorization": f"Bearer {account.secret}"},
    }


def test_every_route_for_every_caller(stage: Stage, runner: asyncio.Runner) -> None:
    hall, worker = stage.make()

    async def scenario() -> None:
        headers = await headers_of_callers(hall)
        assert set(headers) == set(CALLERS)
        routes = {
            (method, route.path)
            for route in hall.app.routes
            if isinstance(route, Route)
            for method in route.methods or ()
            if method != "HEAD"
        }
        assert routes == set(EXPECTED)
        for (method, path), (unknown, scopeless, good) in EXPECTED.items():
            asked = path.replace("{model_id:path}", "integer")
            refused: dict[bytes, list[str]] = {}
            for caller in CALLERS:
                answer = await hall.call(method, asked, BODIES.get(path), tenant=None, headers=headers[caller])
                wanted = {"without inference": scopeless, "acme": good}.get(caller, unknown)
                if (caller, path) == ("scraper", "/metrics"):
                    assert answer.status == 200
                    continue
                assert answer.status == wanted, (caller, method, path)
                if caller in UNKNOWN and answer.status == 401:
                    refused.setdefault(answer.body, []).append(caller)
            assert len(refused) <= 1, refused
        assert len(worker.submits) == 2  # the two of the good key
        await hall.check_books()

    runner.run(scenario())


def test_what_belongs_to_others_looks_like_what_is_not_there(stage: Stage, runner: asyncio.Runner) -> None:
    """A model that the key may not use and one that does not exist: the same answer but for the name asked for."""
    hall, worker = stage.make()

    async def scenario() -> None:
        services, account = hall.services, hall.accounts["acme"]
        async with hall.database.transaction() as conn:
            clerk = Clerk(conn, services.world.entropy, services.world.now_ns())
            rules = read_rules(models=["another"])
            made = await clerk.create_key(
                account.tenant_id, account.project_id, "k", services.secrets.key_pepper, rules=rules
            )
        headers = {"authorization": f"Bearer {made.secret_text}"}

        async def ask(model: str) -> list[Answer]:
            chat = chat_body(model, max_tokens=1)
            text = {"model": model, "prompt": "x"}
            return [
                await hall.call("GET", f"/v1/models/{model}", tenant=None, headers=headers),
                await hall.call("POST", "/v1/chat/completions", chat, tenant=None, headers=headers),
                await hall.call("POST", "/v1/completions", text, tenant=None, headers=headers),
            ]

        others, absent = await ask("integer"), await ask("nowhere")
        for one, other in zip(others, absent, strict=True):
            assert one.status == other.status == 404
            assert one.body == other.body.replace(b"nowhere", b"integer")
            assert one.headers.keys() == other.headers.keys()
        assert worker.submits == []

    runner.run(scenario())
