"""Who gets what from each route: every route of the application, every kind of caller, own, another's and absent."""

import asyncio
from typing import Any

from starlette.routing import Route

from gateway.clerk import Clerk
from gateway.secrets import metrics_token
from tenancy.access.key_rules import read_rules
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
OFFICES = ("usage", "audit", "admin")  # keys with this one scope
CALLERS = (*UNKNOWN, *OFFICES, "acme")

ORGANIZATION = "/v1/organization"
PROJECT = ORGANIZATION + "/projects/{project_id}"
# (method, path) -> whose key is answered with 200; the other known ones get 403. A new route fails until it is here.
OPEN_TO = {
    ("POST", "/v1/chat/completions"): {"acme"},
    ("POST", "/v1/completions"): {"acme"},
    ("GET", "/v1/models"): {"acme"},
    ("GET", "/v1/models/{model_id:path}"): {"acme"},
    ("GET", f"{ORGANIZATION}/usage/completions"): {"usage"},
    ("GET", f"{ORGANIZATION}/costs"): {"usage"},
    ("GET", f"{ORGANIZATION}/audit_logs"): {"audit"},
    ("GET", f"{ORGANIZATION}/projects"): {"admin"},
    ("POST", f"{ORGANIZATION}/projects"): {"admin"},
    ("GET", PROJECT): {"admin"},
    ("GET", f"{PROJECT}/api_keys"): {"admin"},
    ("GET", f"{PROJECT}/api_keys/{{key_id}}"): {"admin"},
    ("DELETE", f"{PROJECT}/api_keys/{{key_id}}"): {"admin"},
    ("POST", f"{PROJECT}/service_accounts"): {"admin"},
    ("GET", f"{PROJECT}/rate_limits"): {"admin"},
    ("POST", f"{PROJECT}/rate_limits/{{rate_limit_id}}"): {"admin"},
}
OPEN_TO_EVERYBODY = {("GET", "/healthz"), ("GET", "/readyz")}
OPEN_TO_SCRAPERS = {("GET", "/metrics")}
QUERIES = {f"{ORGANIZATION}/usage/completions": "?start_time=1", f"{ORGANIZATION}/costs": "?start_time=1"}
BODIES = {
    ("POST", "/v1/chat/completions"): chat_body("integer", max_tokens=1),
    ("POST", "/v1/completions"): {"model": "integer", "prompt": "x", "max_tokens": 1, "seed": 5},
    ("POST", f"{ORGANIZATION}/projects"): {"name": "another"},
    ("POST", f"{PROJECT}/service_accounts"): {"name": "another"},
    ("POST", f"{PROJECT}/rate_limits/{{rate_limit_id}}"): {"max_requests_per_1_minute": 60_000},
}


def expected_status(method: str, path: str, caller: str) -> int:
    if (method, path) in OPEN_TO_EVERYBODY:
        return 200
    if (method, path) in OPEN_TO_SCRAPERS:
        return 200 if caller == "scraper" else 401
    if caller in UNKNOWN:
        return 401
    return 200 if caller in OPEN_TO[method, path] else 403


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
    offices = {name: (await key(scopes=frozenset({name})))[1] for name in OFFICES}
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
        **{name: {"authorization": f"Bearer {secret}"} for name, secret in offices.items()},
        "acme": {"authorization": f"Bearer {account.secret}"},
    }


async def spare_key(hall: Hall) -> str:
    services, account = hall.services, hall.accounts["acme"]
    async with hall.database.transaction() as conn:
        clerk = Clerk(conn, services.world.entropy, services.world.now_ns())
        made = await clerk.create_key(account.tenant_id, account.project_id, "spare", services.secrets.key_pepper)
    return made.key_id


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
        assert routes == {*OPEN_TO, *OPEN_TO_EVERYBODY, *OPEN_TO_SCRAPERS}
        account = hall.accounts["acme"]
        for method, path in sorted(routes):
            asked = (
                path.replace("{model_id:path}", "integer")
                .replace("{project_id}", account.project_id)
                .replace("{key_id}", await spare_key(hall))
                .replace("{rate_limit_id}", f"rl_{account.project_id}")
            )
            refused: dict[bytes, list[str]] = {}
            for caller in CALLERS:
                answer = await hall.call(
                    method,
                    asked + QUERIES.get(path, ""),
                    BODIES.get((method, path)),
                    tenant=None,
                    headers=headers[caller],
                )
                assert answer.status == expected_status(method, path, caller), (caller, method, path, answer.body)
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
