"""The commands about money, run as an operator runs them: what they print for people and for programs."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from gateway.cli import app
from gateway.commands.session import CommandError, in_transaction, open_session
from tenancy.access.directory import get_tenant_by_name
from tenancy.access.keys import list_keys
from tenancy.accounts.ledger import capture, place_hold
from tenancy.invoicing.invoices import InvoiceError
from tenancy.pricing.price_book import price_at
from tenancy.usage.meter import Usage, UsageRecord, record_usage

DAY_NS = 86_400 * 10**9


class Operator:
    def __init__(self, folder: Path) -> None:
        self.environment = {"BULKHEAD_DATA_DIR": str(folder)}

    def run(self, *arguments: str) -> str:
        done: Result = CliRunner().invoke(app, list(arguments), env=self.environment, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    def read(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json"))


async def served(conn: Any, now_ns: int) -> None:
    """A request of ten days ago that cost 30.00, as admission and settlement write it."""
    tenant = await get_tenant_by_name(conn, "acme")
    assert tenant is not None
    tenant_id, at_ns = tenant.tenant_id, now_ns - 10 * DAY_NS
    price = await price_at(conn, "m", now_ns, tenant_id=tenant_id)
    charge = 30 * 10**9
    how: dict[str, Any] = {"expires_ns": now_ns + DAY_NS, "now_ns": at_ns}
    await place_hold(
        conn,
        hold_id="hold_1",
        tenant_id=tenant_id,
        request_id="req_1",
        price_id=price.price_id,
        amount_nano_usd=charge,
        **how,
    )
    await capture(conn, "hold_1", charge, at_ns)
    usage = Usage(3_000_000, 0, 0)
    (key,) = await list_keys(conn, tenant_id)
    ids = ("req_1", tenant_id, key.project_id, key.key_id)
    await record_usage(conn, UsageRecord(*ids, "m", usage, price.price_id, charge, at_ns, at_ns, "stop", False))


def test_a_tenants_money_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = Operator(tmp_path)
    operator.run("tenant", "create", "--name", "acme", "--currency", "EUR")
    operator.run("credit", "grant", "--tenant", "acme", "--usd", "1.5", "--kind", "promotional")
    assert "EUR 100.00" in operator.run("credit", "limit", "--tenant", "acme", "--usd", "100")
    operator.run("key", "create", "--tenant", "acme", "--name", "laptop")
    budget = operator.run("budget", "set", "--scope", "tenant", "--of", "acme", "--period", "total", "--usd", "900")
    assert "EUR 900.00" in budget
    operator.run("price", "add", "--model", "m", "--input", "10", "--output", "10", "--currency", "EUR")

    (tenant,) = operator.read("tenant", "list")
    assert (tenant["name"], tenant["currency"], tenant["credit_nano_usd"]) == ("acme", "EUR", 101_500_000_000)
    assert tenant["limits"] == dict.fromkeys(
        ("requests_per_minute", "tokens_per_minute", "concurrency_max", "tokens_per_day")
    ) | {"shadow": []}
    (key,) = operator.read("key", "list", "--tenant", "acme")
    assert (key["name"], key["state"], key["scopes"]) == ("laptop", "active", ["inference"])
    assert not {"secret", "secret_hmac"} & key.keys()
    credits = operator.read("credit", "list", "--tenant", "acme")
    assert [(one["kind"], one["left_nano_usd"]) for one in credits] == [
        ("promotional", 1_500_000_000),
        ("line", 100_000_000_000),
    ]
    (price,) = operator.read("price", "list")
    assert (price["state"], price["currency"], price["input_pico_usd"]) == ("active", "EUR", 10_000_000)
    (used,) = operator.read("budget", "list")
    assert (used["budget"]["limit_nano_usd"], used["used_nano_usd"], used["currency"]) == (900_000_000_000, 0, "EUR")
    assert operator.read("webhook", "list") == []
    for listed in (("tenant", "list"), ("credit", "list", "--tenant", "acme"), ("price", "list"), ("budget", "list")):
        table = operator.run(*listed)
        assert "EUR" in table
        assert "$" not in table

    operator.run("invoice", "issuer", "--prefix", "BH", "--name", "Bulkhead Ltd")
    operator.run(
        "invoice", "buyer", "--tenant", "acme", "--prefix", "BH", "--terms", "on_account", "--tax-percent", "10"
    )
    for name, value in operator.environment.items():
        monkeypatch.setenv(name, value)
    session = open_session()
    now_ns = session.world.now_ns()
    in_transaction(session, lambda conn: served(conn, now_ns))
    since, until = (iso(now_ns - days * DAY_NS) for days in (11, 9))
    invoice = operator.run("invoice", "draft", "--tenant", "acme", "--since", since, "--until", until).strip()
    assert "EUR 31.35 due" in operator.run("invoice", "issue", invoice)  # 30.00 less 1.50, and a tenth of that

    part = ("invoice", "pay", invoice, "--amount", "11.35", "--payment-id", "bank 1", "--reference", "wire")
    for _ in range(2):  # a repeat
        assert "EUR 20.00 are open" in operator.run(*part)
    (listed,) = operator.read("invoice", "list")
    assert (listed["state"], listed["due_minor"], listed["open_minor"]) == ("issued", 3_135, 2_000)
    assert "EUR 20.00" in operator.run("invoice", "show", invoice).splitlines()[-1]
    with pytest.raises(InvoiceError, match="are open: 2001 cannot be paid"):
        operator.run("invoice", "pay", invoice, "--amount", "20.01")
    with pytest.raises(CommandError, match="no more decimals"):
        operator.run("invoice", "pay", invoice, "--amount", "0.001")
    with pytest.raises(InvoiceError, match="credit note"):
        operator.run("invoice", "void", invoice)
    for _ in range(2):
        assert operator.run("invoice", "pay", invoice, "--reference", "rest") == f"{invoice} is paid\n"
    payments = operator.read("invoice", "payments", invoice)
    assert (payments["state"], payments["open_minor"]) == ("paid", 0)
    assert [(one["payment_id"], one["amount_minor"]) for one in payments["payments"]] == [
        ("bank 1", 1_135),
        (f"{invoice}:paid", 2_000),
    ]
    assert "EUR 11.35" in operator.run("invoice", "payments", invoice)
    line = operator.read("credit", "list", "--tenant", "acme")[-1]
    assert (line["kind"], line["left_nano_usd"]) == ("line", 100_000_000_000)


def iso(at_ns: int) -> str:
    return datetime.fromtimestamp(at_ns // 10**9, UTC).isoformat()
