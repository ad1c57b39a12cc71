"""The operators' API: its tokens, what each change leaves in the log, repeats, bounds, a tenant's money by HTTP."""

import asyncio
import csv
import io
import json
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import func, select
from typer.testing import CliRunner

from audit.transparency import tables as audit_tables
from gateway.billing.focus import REVENUE_KINDS
from gateway.clerk import Clerk
from gateway.cli import app as command_line
from gateway.host.valkey import connect_redis
from gateway.operators.tries import ADDRESS_MAX, PAIR_MAX, Tries
from gateway.token_clerk import TokenClerk
from tenancy import tables
from tenancy.access.operator_tokens import TOKENS_MAX, OperatorTokenError, list_tokens
from tenancy.access.operators import UnknownOperatorError
from tests.fakes.hall import Account, Hall
from tests.fakes.operators import DAY_NS, ROOT, Program, forget_tries, furnish, hire, program_of
from tests.gateway.conftest import Stage

SECOND_NS = 10**9


@pytest.fixture
def program(stage: Stage, runner: asyncio.Runner) -> Program:
    hall, _ = stage.make()

    async def made() -> Program:
        await forget_tries(hall)
        await hire(hall)
        return await program_of(hall)

    return runner.run(made())


async def num_entries(hall: Hall) -> int:
    async with hall.database.read() as conn:
        return int((await conn.execute(select(func.count()).select_from(audit_tables.outbox))).scalar_one())


async def token_status(program: Program, method: str = "GET", body: Any = None) -> int:
    return (await program.call(method, "/tenants", body)).status


def test_a_token_is_dead_at_once(program: Program, runner: asyncio.Runner) -> None:
    hall, new = program.hall, {"name": "initech"}

    async def scenario() -> None:
        world = hall.services.world
        reader = await program_of(hall, read_only=True)
        assert [await token_status(one) for one in (program, reader)] == [200, 200]
        assert await reader.refused("POST", "/tenants", new) == (403, "read_only_token")
        async with hall.database.transaction() as conn:
            clerk = TokenClerk(conn, world.entropy, world.now_ns())
            assert await clerk.revoke(program.token.token_id, "lost")
            assert not await clerk.revoke(program.token.token_id, "again")
        assert [await token_status(one) for one in (program, reader)] == [401, 200]
        assert await token_status(program, "POST", new) == 401
        async with hall.database.transaction() as conn:
            clerk_of_people = Clerk(conn, world.entropy, world.now_ns())
            assert await clerk_of_people.disable_operator("olga", "left")
            assert not await clerk_of_people.disable_operator("olga", "again")
        assert await token_status(reader) == 401
        assert await hall.outbox("operator.disabled") == [{"name": "olga", "reason": "left"}]
        with pytest.raises(OperatorTokenError, match="no active operator"):
            await program_of(hall)
        (one,) = await hall.outbox("operator.token_revoked")
        assert one == {"token_id": program.token.token_id, "operator": "olga", "reason": "lost"}
        assert await hall.outbox("operator.request") == await hall.outbox("tenant.created") == []

    runner.run(scenario())


def test_a_token_that_is_revoked_while_a_body_arrives_changes_nothing(program: Program, runner: asyncio.Runner) -> None:
    """It was good when the request began; the transaction looks again."""
    hall = program.hall

    async def scenario() -> None:
        world = hall.services.world
        real = hall.database.transaction
        entered = []

        def revoking(*how: Any) -> Any:
            if not entered:
                entered.append(1)
                hall.database.transaction = real  # type: ignore[method-assign]

            class First:
                async def __aenter__(self) -> Any:
                    async with real() as conn:
                        await TokenClerk(conn, world.entropy, world.now_ns()).revoke(program.token.token_id, "t")
                    self.inner = real(*how)
                    return await self.inner.__aenter__()

                async def __aexit__(self, *error: Any) -> Any:
                    return await self.inner.__aexit__(*error)

            return First()

        hall.database.transaction = revoking  # type: ignore[method-assign]
        assert await token_status(program, "POST", {"name": "initech"}) == 401
        assert entered
        assert await hall.outbox("tenant.created") == []

    runner.run(scenario())


def test_what_is_kept_and_shown_of_a_token(program: Program, runner: asyncio.Runner) -> None:
    hall = program.hall

    async def scenario() -> None:
        assert await token_status(program) == 200
        await hall.services.token_uses.write(hall.database)
        async with hall.database.read() as conn:
            (shown,) = await list_tokens(conn)
            rows = (await conn.execute(select(tables.metadata.tables["operator_token"]))).all()
        assert shown.state(hall.services.world.now_ns()) == "active"
        assert shown.last_used_ns is not None
        secret = program.token.secret_text.split("-", 2)[2]  # base64url has hyphens, too
        assert secret not in f"{program.token!r} {rows} {shown}"
        (entry,) = await hall.outbox("operator.token_created")
        assert (entry["operator"], entry["read_only"], entry["expires_ns"]) == ("olga", False, "0")
        assert secret not in json.dumps(entry)
        for _ in range(TOKENS_MAX - 1):
            last = await program_of(hall, read_only=True)
        with pytest.raises(OperatorTokenError, match="revoke one first"):
            await program_of(hall)
        assert await token_status(last) == 200

    runner.run(scenario())


def test_wrong_tokens_are_counted(program: Program, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    hall = program.hall

    async def ask(secret: str) -> tuple[int, str]:
        answer = await hall.call("GET", f"{ROOT}/tenants", tenant=None, headers={"authorization": f"Bearer {secret}"})
        return answer.status, answer.headers.get("retry-after", "")

    async def scenario() -> None:
        other = await program_of(hall)
        good = program.token.secret_text
        guess = good[:-1] + ("A" if good[-1] != "A" else "Q")
        for _ in range(PAIR_MAX):
            assert (await ask(guess))[0] == 401
        assert (await ask(guess))[0] == 429  # this public id from here: whatever the secret, it is not looked at
        status, wait_s = await ask(good)
        assert status == 429
        assert 0 < int(wait_s) <= 900
        assert await token_status(other) == 200
        for _ in range(ADDRESS_MAX - PAIR_MAX):
            assert (await ask("bk-nonsense"))[0] == 401
        assert (await ask("bk-nonsense"))[0] == 429
        assert await token_status(other) == 200  # a stranger behind the same proxy locks nobody out
        await forget_tries(hall)
        assert (await ask(good))[0] == 200
        gone = Tries(connect_redis("unix:///nowhere/valkey.sock"), b"k")  # tokens are served while Valkey is gone
        await gone.check("0" * 16, "127.0.0.1")
        await gone.note("0" * 16, "127.0.0.1")

    runner.run(scenario())


def test_a_tenant_s_money_by_http_alone(program: Program, runner: asyncio.Runner) -> None:
    hall = program.hall
    world, real_now_ns = hall.services.world, hall.services.world.now_ns
    model = hall.services.tokenizer.model_id

    async def scenario() -> None:
        tenant = await program.post("/tenants", name="initech", currency="EUR")
        tenant_id = tenant["tenant_id"]
        home = f"/tenants/{tenant_id}"
        key = await program.post(f"{home}/keys", name="laptop", scopes=["inference", "usage"])
        hall.accounts["initech"] = Account(tenant_id, tenant["project_id"], key["key_id"], key["secret"])
        figures = {"input_pico_usd": 10**6, "output_pico_usd": 10**7, "request_nano_usd": 10 * 10**9}
        price = await program.post("/prices", model=model, currency="EUR", **figures)
        assert (price["state"], price["cached_input_pico_usd"], price["batch_percent"]) == ("active", 10**6, 50)
        granted = await program.post(
            f"{home}/credits", transfer_id="gift", amount_nano_usd=10**9, kind="promotional", memo="welcome"
        )
        assert (granted["credit_nano_usd"], granted["currency"]) == (10**9, "EUR")
        assert (await hall.chat(tenant="initech", max_tokens=2)).status == 429  # 1 EUR does not cover 10
        line = await program.put(f"{home}/credit_line", limit_nano_usd=100 * 10**9)
        assert (line["limit_nano_usd"], line["drawn_nano_usd"]) == (100 * 10**9, 0)
        await program.put(
            "/budgets", scope_kind="tenant", scope_id=tenant_id, period="month", limit_nano_usd=50 * 10**9
        )
        answer = await hall.chat(tenant="initech", max_tokens=2)
        assert answer.status == 200
        assert await hall.settler.drain(5) == 0
        (row,) = [row for row in (await hall.usage_rows()).values() if row.tenant_id == tenant_id]
        assert row.amount_nano_usd > 10 * 10**9
        after_ns = world.now_ns() + 1

        await program.put("/issuers/OP", name="Bulkhead Ltd", address="1 Road\nTown")
        buyer = await program.put(f"{home}/buyer", number_prefix="OP", terms="on_account", tax_rate_bp=1_000)
        assert (buyer["name"], buyer["number_prefix"]) == ("initech", "OP")
        draft = await program.post("/invoices", tenant_id=tenant_id, until_ns=after_ns)
        invoice_id = draft["invoice_id"]
        assert (draft["state"], draft["number"]) == ("draft", "")
        assert await program.refused("POST", f"/invoices/{invoice_id}/issue") == (409, "conflict")  # not over yet
        object.__setattr__(world, "now_ns", lambda: real_now_ns() + 600 * SECOND_NS)
        for _ in range(2):  # a repeat
            issued = await program.post(f"/invoices/{invoice_id}/issue")
            assert (issued["state"], issued["number"]) == ("issued", "OP-000001")
        due = issued["due_minor"]
        net_minor = (row.amount_nano_usd - 10**9 + 5 * 10**6) // 10**7
        assert (issued["net_minor"], due) == (net_minor, net_minor + (net_minor + 5) // 10)

        first = {"payment_id": "bank 1", "amount_minor": 300, "reference": "wire"}
        for _ in range(2):
            paid = await program.post(f"/invoices/{invoice_id}/payments", **first)
            assert (paid["state"], paid["open_minor"], len(paid["payments"])) == ("issued", due - 300, 1)
        assert await program.refused("POST", f"/invoices/{invoice_id}/payments", {**first, "amount_minor": 301}) == (
            409,
            "conflict",
        )
        for _ in range(2):
            paid = await program.post(f"/invoices/{invoice_id}/payments", payment_id="bank 2")
            assert (paid["state"], paid["open_minor"], len(paid["payments"])) == ("paid", 0, 2)
        line = await program.get(f"{home}/credit_line")
        assert (line["drawn_nano_usd"], line["receivable_nano_usd"]) == (0, 0)

        books = await program.get(f"/books/reconciliation?day_ns={row.finished_ns}")
        assert (books["num_differences"], books["num_documents"], books["num_unwitnessed"]) == (0, 1, 1)
        period = f"since_ns={row.finished_ns - SECOND_NS}&until_ns={after_ns}"
        exported = await program.call("GET", f"/books/focus?{period}&tenant_id={tenant_id}")
        rows = list(csv.DictReader(io.StringIO(exported.body.decode())))
        earned = [Decimal(one["BilledCost"]) for one in rows if one["x_LedgerKind"] in REVENUE_KINDS]
        assert sum(earned) * 10**9 == row.amount_nano_usd
        margin = await program.get(f"/books/margin?{period}&cost_per_hour_nano_usd=1&currency=EUR")
        (own,) = [one for one in margin["tenants"] if one["tenant_id"] == tenant_id]
        assert own["revenue_nano_usd"] == row.amount_nano_usd

        await the_tenant_reads_the_same(hall, program, invoice_id)
        requests = await hall.outbox("operator.request")
        assert {one["operator"] for one in requests} == {"olga"}
        assert [one["route"].split(ROOT)[1] for one in requests][:2] == ["/tenants", "/tenants/{tenant_id}/keys"]
        assert len(await hall.outbox("invoice.payment")) == 2
        assert len(await hall.outbox("invoice.issued")) == 1
        await hall.check_books()

    try:
        runner.run(scenario())
    finally:
        object.__setattr__(world, "now_ns", real_now_ns)


async def the_tenant_reads_the_same(hall: Hall, program: Program, invoice_id: str) -> None:
    """What the tenant's key sees is what the operator's token sees, and a file is the same bytes for both."""

    async def own(path: str) -> Any:
        answer = await hall.call("GET", f"/v1/organization{path}", tenant="initech")
        assert answer.status == 200, answer.body
        return answer

    tenant_id = hall.accounts["initech"].tenant_id
    assert (await own("/invoices")).json() == await program.get(f"/invoices?tenant_id={tenant_id}")
    assert (await own(f"/invoices/{invoice_id}")).json() == await program.get(f"/invoices/{invoice_id}")
    assert (await own("/credits")).json() == await program.get(f"/tenants/{tenant_id}/credits")
    assert (await own("/budgets")).json() == await program.get(f"/budgets?tenant_id={tenant_id}")
    payments = f"/invoices/{invoice_id}/payments"
    assert (await own(payments)).json() == await program.get(payments)
    balance = (await own("/balance")).json()
    assert balance["credit_line"] == await program.get(f"/tenants/{tenant_id}/credit_line")
    for kind, begins in (("pdf", b"%PDF"), ("csv", b""), ("json", b"{")):
        theirs = await own(f"/invoices/{invoice_id}/file?format={kind}")
        ours = await program.call("GET", f"/invoices/{invoice_id}/file?format={kind}")
        assert theirs.body == ours.body
        assert theirs.body.startswith(begins)
        assert theirs.headers["content-disposition"] == f'attachment; filename="{invoice_id}.{kind}"'


def test_a_repeat_changes_nothing_and_is_told_the_same(program: Program, runner: asyncio.Runner) -> None:
    """Every change that names itself, twice: the second answer is the first, and only `operator.request` is logged."""
    hall = program.hall

    async def scenario() -> None:
        things = await furnish(hall)
        home = f"/tenants/{things['tenant_id']}"
        begins = hall.services.world.now_ns() + DAY_NS
        calls: list[tuple[str, str, dict[str, Any]]] = [
            ("POST", f"{home}/credits", {"transfer_id": "t1", "amount_nano_usd": 7, "expires_ns": begins}),
            ("POST", f"{home}/adjustments", {"transfer_id": "t2", "amount_nano_usd": -3, "reason": "t"}),
            (
                "POST",
                f"/requests/{things['request_id']}/refunds",
                {"transfer_id": "t3", "amount_nano_usd": 5, "reason": "t"},
            ),
            ("POST", f"/invoices/{things['draft_invoice']}/issue", {}),
            ("POST", f"/invoices/{things['draft_invoice']}/payments", {"payment_id": "p"}),
            ("POST", f"/invoices/{things['other_draft_invoice']}/void", {"reason": "t"}),
            ("POST", "/prices", {"model": "n", "input_pico_usd": 1, "output_pico_usd": 2, "effective_from_ns": begins}),
            ("POST", f"/prices/{things['price_id']}/withdraw", {"reason": "t"}),
            ("POST", f"/keys/{things['key_id']}/revoke", {"reason": "t"}),
            ("PUT", f"{home}/credit_line", {"limit_nano_usd": 10**9}),
        ]
        for method, path, body in calls:
            first = await program.call(method, path, body)
            assert first.status == 200, (path, first.body)
            before = await num_entries(hall)
            again = await program.call(method, path, body)
            assert (again.status, again.body) == (200, first.body), path
            assert await num_entries(hall) == before + 1, path
        for method, path, body in calls[:3]:  # the same id for something else
            other = {**body, "amount_nano_usd": body["amount_nano_usd"] * 2}
            assert await program.refused(method, path, other) == (409, "conflict")

    runner.run(scenario())


def test_the_same_at_once_is_made_once(program: Program, runner: asyncio.Runner) -> None:
    hall = program.hall

    async def scenario() -> None:
        acme = hall.accounts["acme"].tenant_id
        before = (await hall.credit()).credit_nano_usd
        grant = {"transfer_id": "t", "amount_nano_usd": 7}
        answers = await asyncio.gather(
            *(program.call("POST", "/tenants", {"name": "initech"}) for _ in range(6)),
            *(program.call("POST", f"/tenants/{acme}/credits", grant) for _ in range(6)),
        )
        assert sorted(one.status for one in answers[:6]) == [200] + [409] * 5
        assert [one.status for one in answers[6:]] == [200] * 6
        assert (await hall.credit()).credit_nano_usd == before + 7
        assert [len(await hall.outbox(kind)) for kind in ("tenant.created", "credit.granted")] == [1, 1]

    runner.run(scenario())


def test_pages_lose_nothing(program: Program, runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        things = await furnish(program.hall)
        home = f"/tenants/{things['tenant_id']}"
        for number in range(3):
            await program.post(f"{home}/keys", name=f"key {number}")
            await program.post(f"{home}/projects", name=f"project {number}")
            await program.post(f"{home}/credits", transfer_id=f"t{number}", amount_nano_usd=1)
            await program.post("/webhooks", url=f"https://hooks.example.com/{number}")
            for scope in ("tenant", "project"):
                scope_id = things["tenant_id"] if scope == "tenant" else things["scope_id"]
                period = ("day", "month", "total")[number]
                budget = {"scope_kind": scope, "scope_id": scope_id, "period": period, "limit_nano_usd": 10**12}
                await program.put("/budgets", **budget)
        lists = ["/tenants", "/prices", "/budgets", "/invoices", "/webhooks", "/deliveries"]
        lists += [f"{home}/{name}" for name in ("keys", "projects", "credits")]
        for path in lists:
            whole = await program.get(f"{path}?limit=100")
            assert not whole["has_more"]
            found, after = [], ""
            while True:
                page = await program.get(f"{path}?limit=1" + (f"&after={after}" if after else ""))
                found += page["data"]
                if not page["has_more"]:
                    break
                assert len(page["data"]) == 1
                after = page["last_id"].replace(" ", "%20")
            assert found == whole["data"], path
            assert len(found) >= 1
            assert await program.refused("GET", f"{path}?after=nothing") == (404, "not_found")

    runner.run(scenario())


NUL = "a\0b"


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/tenants?limit=0", None, 400),
        ("GET", "/tenants?limit=101", None, 400),
        ("GET", "/tenants?page=2", None, 400),
        ("GET", "/tenants/ten_0", None, 404),
        ("GET", "/tenants/a%00b", None, 404),
        ("GET", "/tenants/" + "a" * 129, None, 404),
        ("GET", "/limits/galaxy/x", None, 404),
        ("GET", "/limits/key/x", None, 404),
        ("GET", "/invoices/inv_0", None, 404),
        ("GET", "/invoices?tenant_id=ten_0", None, 404),
        ("GET", "/invoices?after=a%00b", None, 400),
        ("GET", "/requests/req_0", None, 404),
        ("GET", "/issuers/NONE", None, 404),
        ("GET", "/tenants/{tenant_id}/buyer", None, 404),
        ("GET", "/deliveries?endpoint_id=whk_0", None, 404),
        ("GET", "/books/focus", None, 400),
        ("GET", "/books/focus?since_ns=2&until_ns=1", None, 400),
        ("GET", "/books/margin?since_ns=1&until_ns=2", None, 400),
        ("GET", "/books/margin?since_ns=1&until_ns=2&cost_per_hour_nano_usd=1&currency=euro", None, 400),
        ("POST", "/tenants", None, 400),
        ("POST", "/tenants", {}, 400),
        ("POST", "/tenants", {"name": ""}, 400),
        ("POST", "/tenants", {"name": " padded"}, 400),
        ("POST", "/tenants", {"name": NUL}, 400),
        ("POST", "/tenants", {"name": "x", "colour": "red"}, 400),
        ("POST", "/tenants", {"name": "x", "currency": "euro"}, 400),
        ("POST", "/tenants", {"name": "acme"}, 409),
        ("POST", "/tenants?x=1", {"name": "x"}, 400),
        ("POST", "/tenants/ten_0/suspend", None, 404),
        ("POST", "/tenants/{tenant_id}/suspend", {"reason": NUL}, 400),
        ("POST", "/tenants/{tenant_id}/keys", {"name": "k", "scopes": ["root"]}, 400),
        ("POST", "/tenants/{tenant_id}/keys", {"name": "k", "networks": ["nowhere"]}, 400),
        ("POST", "/tenants/{tenant_id}/keys", {"name": "k", "expires_ns": 1}, 400),
        ("POST", "/tenants/{tenant_id}/keys", {"name": "k", "project_id": "prj_0"}, 404),
        ("POST", "/tenants/{tenant_id}/keys", {"name": "k", "project_id": "{other_project}"}, 404),
        ("POST", "/keys/key_0/revoke", None, 404),
        ("POST", "/keys/key_0/rotate", None, 404),
        ("POST", "/keys/{key_id}/rotate", {"expires_ns": 1}, 400),
        ("PUT", "/limits/project/{project_id}", {"requests_per_minute": -1}, 400),
        ("PUT", "/limits/project/{project_id}", {"weight": 2}, 400),
        ("PUT", "/limits/project/{project_id}", {"shadow": ["nothing"]}, 400),
        ("PUT", "/tenants/{tenant_id}/policy", {"mode": "open"}, 400),
        ("POST", "/prices", {"model": "m", "input_pico_usd": 1.5, "output_pico_usd": 1}, 400),
        ("POST", "/prices", {"model": "m", "input_pico_usd": 10**12 + 1, "output_pico_usd": 1}, 400),
        ("POST", "/prices", {"model": "m", "input_pico_usd": -1, "output_pico_usd": 1}, 400),
        (
            "POST",
            "/prices",
            {"model": "integer", "input_pico_usd": 1, "output_pico_usd": 1, "effective_from_ns": 1},
            409,
        ),
        ("POST", "/price_drafts/draft_0/schedule", None, 404),
        ("POST", "/price_drafts/draft_0/discard", None, 404),
        ("POST", "/prices/price_0/withdraw", None, 404),
        ("POST", "/tenants/{tenant_id}/credits", {"amount_nano_usd": 1}, 400),
        ("POST", "/tenants/{tenant_id}/credits", {"transfer_id": "t", "amount_nano_usd": 0}, 400),
        ("POST", "/tenants/{tenant_id}/credits", {"transfer_id": "t", "amount_nano_usd": 10**18 + 1}, 400),
        ("POST", "/tenants/{tenant_id}/credits", {"transfer_id": NUL, "amount_nano_usd": 1}, 400),
        ("POST", "/tenants/{tenant_id}/credits", {"transfer_id": "t", "amount_nano_usd": 1, "expires_ns": 1}, 400),
        ("POST", "/tenants/{tenant_id}/adjustments", {"transfer_id": "t", "amount_nano_usd": 0, "reason": "t"}, 400),
        (
            "POST",
            "/tenants/{tenant_id}/adjustments",
            {"transfer_id": "t", "amount_nano_usd": -(10**15), "reason": "t"},
            409,
        ),
        ("POST", "/requests/req_0/refunds", {"transfer_id": "t", "amount_nano_usd": 1, "reason": "t"}, 404),
        ("PUT", "/budgets", {"scope_kind": "key", "scope_id": "k", "period": "day", "limit_nano_usd": 1}, 404),
        ("PUT", "/budgets", {"scope_kind": "galaxy", "scope_id": "k", "period": "day", "limit_nano_usd": 1}, 400),
        ("DELETE", "/budgets/{tenant_id}/year/hard", None, 404),
        ("DELETE", "/budgets/{tenant_id}/day/hard", None, 404),
        ("PUT", "/issuers/a.b", {"name": "x"}, 400),
        ("PUT", "/tenants/{tenant_id}/buyer", {"number_prefix": "NONE", "terms": "prepaid"}, 404),
        ("PUT", "/tenants/{tenant_id}/buyer", {"number_prefix": "NONE", "terms": "barter"}, 400),
        ("POST", "/invoices", {"tenant_id": "ten_0", "until_ns": 1}, 404),
        ("POST", "/invoices", {"tenant_id": "{tenant_id}", "until_ns": 1}, 409),
        ("POST", "/invoices/inv_0/issue", None, 404),
        ("POST", "/invoices/inv_0/payments", {"payment_id": "p"}, 404),
        ("POST", "/invoices/inv_0/payments", {"payment_id": "p" * 101}, 400),
        ("POST", "/webhooks", {"url": "http://hooks.example.com"}, 400),
        ("POST", "/webhooks", {"url": "https://127.0.0.1/"}, 400),
        ("POST", "/webhooks", {"url": "https://hooks.example.com/", "kinds": ["nothing"]}, 400),
        ("POST", "/webhooks", {"url": "https://hooks.example.com/", "tenant_id": "ten_0"}, 404),
        ("POST", "/webhooks/whk_0/remove", None, 404),
        ("POST", "/deliveries/dlv_0/resend", None, 404),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    bounds: Program, runner: asyncio.Runner, method: str, path: str, body: Any, status: int
) -> None:
    hall = bounds.hall
    acme, globex = hall.accounts["acme"], hall.accounts["globex"]
    names = {"tenant_id": acme.tenant_id, "project_id": acme.project_id, "key_id": acme.key_id}

    def filled(text: Any) -> Any:
        for name, value in (names | {"other_project": globex.project_id}).items():
            text = text.replace("{" + name + "}", value) if isinstance(text, str) else text
        return text

    async def scenario() -> None:
        before = await num_entries(hall)
        own = None if body is None else {name: filled(value) for name, value in body.items()}
        found, code = await bounds.refused(method, filled(path), own)
        assert found == status, code
        assert await num_entries(hall) == before

    runner.run(scenario())


@pytest.fixture(scope="module")
def bounds(shared_stage: Stage, runner: asyncio.Runner) -> Program:
    hall, _ = shared_stage.make()
    runner.run(hire(hall))
    return runner.run(program_of(hall))


def test_a_tenant_reads_its_own_money_and_nobody_else_s(stage: Stage, runner: asyncio.Runner) -> None:
    """Another's invoice, a draft of its own and what does not exist are one answer."""
    hall, _ = stage.make()

    async def scenario() -> None:
        await forget_tries(hall)
        await hire(hall)
        program = await program_of(hall)
        theirs, own = await furnish(hall, "globex"), await furnish(hall, "acme")
        key = await program.post(f"/tenants/{own['tenant_id']}/keys", name="office", scopes=["usage"])
        hall.accounts["office"] = Account(own["tenant_id"], "", key["key_id"], key["secret"])

        async def read(path: str) -> Any:
            return await hall.call("GET", f"/v1/organization/invoices{path}", tenant="office")

        assert [one["invoice_id"] for one in (await read("")).json()["data"]] == [own["issued_invoice"]]
        nobody = "inv_" + "0" * 32
        for others in (theirs["issued_invoice"], theirs["draft_invoice"], own["draft_invoice"]):
            for path in ("/{}", "/{}/file", "/{}/payments", "?after={}"):
                one, two = await read(path.format(others)), await read(path.format(nobody))
                assert one.status == two.status == 404
                assert one.body.replace(others.encode(), nobody.encode()) == two.body
        for name in ("credits", "budgets", "invoices", "balance"):
            found = (await hall.call("GET", f"/v1/organization/{name}", tenant="office")).body.decode()
            assert own["tenant_id"] in found or name == "invoices"
            assert not [one for one in theirs.values() if len(one) > 20 and one in found], name
        asked = f"/v1/organization/budgets?tenant_id={theirs['tenant_id']}"
        assert (await hall.call("GET", asked, tenant="office")).status == 400

    runner.run(scenario())


def test_tokens_on_the_command_line(tmp_path: Any) -> None:
    environment = {"BULKHEAD_DATA_DIR": str(tmp_path)}

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(command_line, ["admin", *arguments], env=environment, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    run("create", "--name", "olga")
    secret = run("token", "create", "--operator", "olga", "--name", "billing", "--read-only").splitlines()[0]
    (one,) = json.loads(run("token", "list", "--json"))
    assert secret.startswith(f"bko-{one['public_id']}-")
    assert secret not in run("token", "list")
    assert (one["operator"], one["name"], one["read_only"], one["state"]) == ("olga", "billing", True, "active")
    assert run("token", "revoke", one["token_id"], "--reason", "t") == "revoked\n"
    assert run("token", "revoke", one["token_id"]) == "it was revoked before\n"
    (one,) = json.loads(run("token", "list", "--json"))
    assert one["state"] == "revoked"
    with pytest.raises(OperatorTokenError, match="no active operator"):
        run("token", "create", "--operator", "nobody")
    run("token", "create", "--operator", "olga")
    assert run("disable", "olga", "--reason", "left") == "operator olga is disabled\n"
    assert [one["state"] for one in json.loads(run("token", "list", "--json"))] == ["revoked", "disabled"]
    with pytest.raises(UnknownOperatorError):
        run("disable", "nobody")
