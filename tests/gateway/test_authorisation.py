"""Who gets what from each route: every route of the application, every kind of caller, own, another's and absent."""

import asyncio
from typing import Any

from sqlalchemy import update
from starlette.routing import Route

from gateway.clerk import Clerk
from gateway.operators.desk import ROOT
from gateway.secrets import metrics_token
from gateway.token_clerk import TokenClerk
from tenancy import tables
from tenancy.access.key_rules import read_rules
from tenancy.accounts.ledger import pending_holds
from tenancy.accounts.ledger_check import check_ledger
from tests.fakes.asgi import Answer
from tests.fakes.hall import Hall, chat_body
from tests.fakes.operators import forget_tries, furnish, hire, program_of
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
TOKENS = ("token", "reading token", "revoked token", "expired token", "token of nobody")  # operators' programs
CALLERS = (*UNKNOWN, *OFFICES, "acme", *TOKENS)

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
    ("GET", f"{ORGANIZATION}/balance"): {"usage"},
    ("GET", f"{ORGANIZATION}/credits"): {"usage"},
    ("GET", f"{ORGANIZATION}/budgets"): {"usage"},
    ("GET", f"{ORGANIZATION}/invoices"): {"usage"},
    ("GET", f"{ORGANIZATION}/invoices/{{invoice_id}}"): {"usage"},
    ("GET", f"{ORGANIZATION}/invoices/{{invoice_id}}/file"): {"usage"},
    ("GET", f"{ORGANIZATION}/invoices/{{invoice_id}}/payments"): {"usage"},
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
# The operators' routes: (method, path below /operator/v1) -> query or body, and what stands for the path's parameters
# where that is not what `furnish` calls so. GET is for every token, the others for those that may write.
TENANT = "/tenants/{tenant_id}"
OPERATED: dict[tuple[str, str], tuple[Any, dict[str, str]]] = {
    ("GET", "/tenants"): ("", {}),
    ("GET", TENANT): ("", {}),
    ("GET", f"{TENANT}/projects"): ("", {}),
    ("GET", f"{TENANT}/keys"): ("", {}),
    ("GET", f"{TENANT}/policy"): ("", {}),
    ("GET", f"{TENANT}/credits"): ("", {}),
    ("GET", f"{TENANT}/credit_line"): ("", {}),
    ("GET", f"{TENANT}/buyer"): ("", {}),
    ("GET", "/limits/{scope_kind}/{scope_id}"): ("", {}),
    ("GET", "/prices"): ("", {}),
    ("GET", "/requests/{request_id}"): ("", {}),
    ("GET", "/budgets"): ("", {}),
    ("GET", "/issuers/{number_prefix}"): ("", {}),
    ("GET", "/invoices"): ("", {}),
    ("GET", "/invoices/{invoice_id}"): ("", {"invoice_id": "issued_invoice"}),
    ("GET", "/invoices/{invoice_id}/file"): ("?format=csv", {"invoice_id": "issued_invoice"}),
    ("GET", "/invoices/{invoice_id}/payments"): ("", {"invoice_id": "issued_invoice"}),
    ("GET", "/books/reconciliation"): ("", {}),
    ("GET", "/books/focus"): ("?since_ns=1&until_ns=2", {}),
    ("GET", "/books/margin"): ("?since_ns=1&until_ns=2&cost_per_hour_nano_usd=1", {}),
    ("GET", "/webhooks"): ("", {}),
    ("GET", "/deliveries"): ("", {}),
    ("POST", "/tenants"): ({"name": "another tenant"}, {}),
    ("POST", f"{TENANT}/suspend"): ({"reason": "t"}, {"tenant_id": "spare_tenant"}),
    ("POST", f"{TENANT}/resume"): (None, {"tenant_id": "spare_tenant"}),
    ("POST", f"{TENANT}/delete"): (None, {"tenant_id": "spare_tenant"}),
    ("POST", f"{TENANT}/projects"): ({"name": "another project"}, {}),
    ("POST", f"{TENANT}/keys"): ({"name": "another key"}, {}),
    ("POST", "/keys/{key_id}/rotate"): (None, {}),
    ("POST", "/keys/{key_id}/revoke"): (None, {}),
    ("PUT", "/limits/{scope_kind}/{scope_id}"): ({"requests_per_minute": 9}, {}),
    ("PUT", f"{TENANT}/policy"): ({"mode": "lease"}, {}),
    ("POST", "/prices"): ({"model": "m", "input_pico_usd": 1, "output_pico_usd": 1}, {}),
    ("POST", "/prices/{price_id}/withdraw"): (None, {}),
    ("POST", "/price_drafts"): ({"model": "m", "input_pico_usd": 1, "output_pico_usd": 1}, {}),
    ("POST", "/price_drafts/{draft_id}/schedule"): (None, {}),
    ("POST", "/price_drafts/{draft_id}/discard"): (None, {"draft_id": "second_draft"}),
    ("POST", f"{TENANT}/credits"): ({"transfer_id": "a grant", "amount_nano_usd": 5}, {}),
    ("PUT", f"{TENANT}/credit_line"): ({"limit_nano_usd": 5}, {}),
    ("POST", f"{TENANT}/adjustments"): ({"transfer_id": "an end", "amount_nano_usd": -5, "reason": "t"}, {}),
    ("POST", "/requests/{request_id}/refunds"): ({"transfer_id": "r", "amount_nano_usd": 5, "reason": "t"}, {}),
    ("PUT", "/budgets"): (
        {"scope_kind": "project", "scope_id": "{scope_id}", "period": "day", "limit_nano_usd": 10**12},
        {},
    ),
    ("DELETE", "/budgets/{scope_id}/{period}/{hardness}"): (None, {"scope_id": "tenant_id"}),
    ("PUT", "/issuers/{number_prefix}"): ({"name": "Seller"}, {}),
    ("PUT", f"{TENANT}/buyer"): ({"number_prefix": "ACME", "terms": "on_account"}, {}),
    ("POST", "/invoices"): ({"tenant_id": "{tenant_id}", "until_ns": 2, "since_ns": 1}, {}),
    ("POST", "/invoices/{invoice_id}/credit_note"): (None, {"invoice_id": "issued_invoice"}),
    ("POST", "/invoices/{invoice_id}/issue"): (None, {"invoice_id": "draft_invoice"}),
    ("POST", "/invoices/{invoice_id}/void"): (None, {"invoice_id": "other_draft_invoice"}),
    ("POST", "/invoices/{invoice_id}/payments"): (
        {"payment_id": "p", "amount_minor": 1},
        {"invoice_id": "issued_invoice"},
    ),
    ("POST", "/webhooks"): ({"url": "https://hooks.example.com/b"}, {}),
    ("POST", "/deliveries/{delivery_id}/resend"): (None, {}),
    ("POST", "/webhooks/{endpoint_id}/remove"): (None, {}),
}
QUERIES = {f"{ORGANIZATION}/usage/completions": "?start_time=1", f"{ORGANIZATION}/costs": "?start_time=1"}
ORDER = ("GET", "PUT", "POST", "DELETE")
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
    if path.startswith(ROOT):
        if caller == "reading token":
            return 200 if method == "GET" else 403
        return 200 if caller == "token" else 401
    if caller in UNKNOWN or caller in TOKENS:
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
    await hire(hall)
    await hire(hall, "nobody")
    world, olga = services.world, {"now_ns": services.world.now_ns() - 9}
    programs = {
        "token": await program_of(hall),
        "reading token": await program_of(hall, read_only=True),
        "revoked token": await program_of(hall),
        "expired token": await program_of(hall, **olga, expires_ns=world.now_ns()),
        "token of nobody": await program_of(hall, "nobody"),
    }
    async with hall.database.transaction() as conn:
        await TokenClerk(conn, world.entropy, world.now_ns()).revoke(programs["revoked token"].token.token_id, "t")
        gone = update(tables.operator).where(tables.operator.c.name == "nobody")
        await conn.execute(gone.values(disabled_ns=world.now_ns()))
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
        **{name: {"authorization": f"Bearer {one.token.secret_text}"} for name, one in programs.items()},
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
        operated = {(method, ROOT + path) for method, path in OPERATED}
        assert routes == {*OPEN_TO, *OPEN_TO_EVERYBODY, *OPEN_TO_SCRAPERS, *operated}
        account = hall.accounts["acme"]
        things = await furnish(hall) | {"period": "day", "hardness": "hard"}
        issued = things["issued_invoice"]
        for method, path in sorted(routes - operated):
            asked = (
                path.replace("{model_id:path}", "integer")
                .replace("{project_id}", account.project_id)
                .replace("{key_id}", await spare_key(hall))
                .replace("{rate_limit_id}", f"rl_{account.project_id}")
                .replace("{invoice_id}", issued)
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
                if answer.status == 401:
                    refused.setdefault(answer.body, []).append(caller)
            assert len(refused) <= 1, refused
        await every_operated_route(hall, headers, things)
        assert len(worker.submits) == 2  # the two of the good key
        async with hall.database.read() as conn:
            checked = await check_ledger(conn)
            assert await pending_holds(conn) == []
        assert (checked.unbalanced, checked.total_nano_usd) == ([], 0)

    runner.run(scenario())


async def every_operated_route(hall: Hall, headers: dict[str, dict[str, str]], things: dict[str, str]) -> None:
    def filled(text: str, others: dict[str, str]) -> str:
        for name in things:
            text = text.replace("{" + name + "}", things[others.get(name, name)])
        return text.replace("{invoice_id}", things[others.get("invoice_id", "issued_invoice")])

    num_written = 0
    for (method, path), (with_, others) in sorted(OPERATED.items(), key=lambda one: ORDER.index(one[0][0])):
        body = (
            {name: filled(value, {}) if isinstance(value, str) else value for name, value in (with_ or {}).items()}
            if method != "GET"
            else None
        )
        asked = ROOT + filled(path, others) + (with_ if method == "GET" else "")
        await forget_tries(hall)
        refused = set()
        for caller in (one for one in CALLERS if one != "token"):  # it changes things: the last
            answer = await hall.call(method, asked, body, tenant=None, headers=headers[caller])
            assert answer.status == expected_status(method, ROOT + path, caller), (caller, method, path, answer.body)
            if answer.status == 401:
                refused.add(answer.body)
        assert len(refused) == 1, refused
        assert len(await hall.outbox("operator.request")) == num_written  # none of them changed a thing
        answer = await hall.call(method, asked, body, tenant=None, headers=headers["token"])
        assert answer.status == 200, (method, path, answer.body)
        num_written += method != "GET"
        entries = await hall.outbox("operator.request")
        assert len(entries) == num_written
        if method != "GET":
            assert (entries[-1]["route"], entries[-1]["operator"]) == (f"{method} {ROOT}{path}", "olga")


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
