"""OpenAI's administration API with the official client over TLS, and what one tenant may see of another: nothing."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import openai
import pytest

from audit.transparency.entry import Entry
from audit.transparency.keyring import load_keyring
from audit.transparency.log import sequence
from audit.transparency.outbox import append
from gateway.clerk import Clerk
from gateway.host.https import https_server
from gateway.host.port import bind
from gateway.host.tls import ensure_certificates
from tenancy.access.key_rules import read_rules
from tenancy.quotas.limits import PER_MINUTE_MAX
from tests.fakes.hall import Account, Hall
from tests.gateway.conftest import Stage
from tests.gateway.test_openai_client import Site

SCOPES = frozenset({"usage", "audit", "admin"})


@pytest.fixture
def site(stage: Stage, runner: asyncio.Runner, tmp_path: Path) -> Iterator[Site]:
    """Two tenants, each with an office key that may do everything but ask the model."""
    hall, _ = stage.make()

    @asynccontextmanager
    async def opened() -> AsyncIterator[Site]:
        tls = ensure_certificates(tmp_path / "tls", "127.0.0.1", hall.services.world.now_ns())
        listener = bind("127.0.0.1", 0)
        server = https_server(hall.app, tls, drain_timeout_s=2)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await server.listening.wait()
        for name in ("acme", "globex"):
            account = hall.accounts[name]
            async with hall.database.transaction() as conn:
                clerk = Clerk(conn, hall.services.world.entropy, hall.services.world.now_ns())
                minted = await clerk.create_key(
                    account.tenant_id, account.project_id, "office", hall.services.secrets.key_pepper, scopes=SCOPES
                )
            office = Account(account.tenant_id, account.project_id, minted.key_id, minted.secret_text)
            hall.accounts[f"{name} office"] = office
        yield Site(hall, f"https://127.0.0.1:{listener.getsockname()[1]}", tls, tmp_path)
        server.should_exit = True
        await serving

    manager = opened()
    yield runner.run(manager.__aenter__())
    runner.run(manager.__aexit__(None, None, None))


@asynccontextmanager
async def office(site: Site, tenant: str) -> AsyncIterator[Any]:
    secret = site.hall.accounts[f"{tenant} office"].secret
    async with site.client(api_key="none", admin_api_key=secret, max_retries=0) as client:
        yield client.admin.organization


async def sequenced(hall: Hall, folder: Path) -> None:
    keyring = load_keyring(folder / "keys", origin="test/log", entropy=hall.services.world.entropy)
    async with hall.database.transaction() as conn:
        await sequence(conn, signer=keyring, origin="test/log", now_ns=hall.services.world.now_ns())


def test_usage_and_costs_are_the_ledger_s(site: Site, runner: asyncio.Runner) -> None:
    hall = site.hall

    async def scenario() -> None:
        for number in range(3):
            await hall.chat(max_tokens=3 + number)
        await hall.chat(tenant="globex", max_tokens=9)
        await hall.check_books()
        rows = [row for row in (await hall.usage_rows()).values() if row.tenant_id == hall.accounts["acme"].tenant_id]
        async with office(site, "acme") as own:
            start = min(row.finished_ns for row in rows) // 10**9
            page = await own.usage.completions(start_time=start, bucket_width="1h", group_by=["project_id", "model"])
            (result,) = [result for bucket in page.data for result in bucket.results]
            assert result.input_tokens == sum(row.num_prompt_tokens for row in rows)
            assert result.input_cached_tokens == sum(row.num_cached_tokens for row in rows)
            assert result.output_tokens == sum(row.num_completion_tokens for row in rows)
            assert (result.num_model_requests, result.project_id, result.model) == (
                3,
                hall.accounts["acme"].project_id,
                "integer",
            )
            costs = await own.usage.costs(start_time=start)
            (cost,) = [result for bucket in costs.data for result in bucket.results]
            amount = sum(row.amount_nano_usd for row in rows)
            assert cost.amount.value == pytest.approx(amount / 10**9)
        async with site.http("acme office") as http:
            raw = await http.get(f"/v1/organization/costs?start_time={start}")
        (bucket,) = [bucket for bucket in json.loads(raw.text, parse_float=Decimal)["data"] if bucket["results"]]
        told = bucket["results"][0]
        assert told["amount"]["value"] * 10**9 == amount == int(told["amount_nano_usd"])  # to the last digit

    runner.run(scenario())


def test_buckets_are_whole_and_pages_lose_nothing(site: Site, runner: asyncio.Runner) -> None:
    hall = site.hall

    async def scenario() -> None:
        await hall.chat(max_tokens=2)
        (row,) = (await hall.usage_rows()).values()
        now_s = row.finished_ns // 10**9
        async with office(site, "acme") as own:
            seen, cursor = [], None
            for _ in range(20):
                how: dict[str, Any] = {"page": cursor} if cursor else {}
                page = await own.usage.completions(
                    start_time=now_s - 600, end_time=now_s + 60, bucket_width="1m", limit=2, **how
                )
                seen += page.data
                cursor = page.next_page
                if not page.has_more:
                    break
            assert cursor is None
            starts = [bucket.start_time for bucket in seen]
            assert starts == list(range(starts[0], now_s + 60, 60))
            assert starts[0] == (now_s - 600) // 60 * 60
            assert sum(result.num_model_requests for bucket in seen for result in bucket.results) == 1
            (bucket,) = [bucket for bucket in seen if bucket.results]
            assert bucket.start_time <= now_s < bucket.end_time

    runner.run(scenario())


def test_projects_keys_and_limits(site: Site, runner: asyncio.Runner) -> None:
    hall = site.hall

    async def scenario() -> None:
        async with office(site, "acme") as own:
            made = await own.projects.create(name="research")
            listed = await own.projects.list()
            assert [one.id for one in listed.data] == [hall.accounts["acme"].project_id, made.id]
            first = await own.projects.list(limit=1)
            assert first.has_more
            assert [one.id for one in (await own.projects.list(limit=1, after=first.data[0].id)).data] == [made.id]
            assert (await own.projects.retrieve(made.id)).name == "research"
            with pytest.raises(openai.BadRequestError, match="project named"):
                await own.projects.create(name="research")

            account = await own.projects.service_accounts.create(made.id, name="nightly", expires_in_seconds=3_600)
            assert account.api_key is not None
            hall.accounts["nightly"] = Account(
                hall.accounts["acme"].tenant_id, made.id, account.id, account.api_key.value
            )
            assert (await hall.chat(tenant="nightly", max_tokens=2)).status == 200
            key = await own.projects.api_keys.retrieve(account.id, project_id=made.id)
            assert key.name == "nightly"
            assert account.api_key.value not in repr(key)
            assert [one.id for one in (await own.projects.api_keys.list(made.id)).data] == [account.id]

            limits = (await own.projects.rate_limits.list_rate_limits(made.id)).data
            assert [one.max_requests_per_1_minute for one in limits] == [PER_MINUTE_MAX]
            changed = await own.projects.rate_limits.update_rate_limit(
                limits[0].id, project_id=made.id, max_requests_per_1_minute=1
            )
            assert changed.max_requests_per_1_minute == 1
            assert changed.max_tokens_per_1_minute == PER_MINUTE_MAX
            answers = [(await hall.chat(tenant="nightly", max_tokens=2)).status for _ in range(2)]
            assert answers == [200, 429]

            assert (await own.projects.api_keys.delete(account.id, project_id=made.id)).deleted
            assert (await hall.chat(tenant="nightly", max_tokens=2)).status == 401
            assert (await own.projects.api_keys.list(made.id)).data == []
        kinds = ("project.created", "key.created", "limits.changed", "key.revoked")
        logged = {kind: await hall.outbox(kind) for kind in kinds}
        assert [one["name"] for one in logged["project.created"]] == ["research"]
        assert logged["key.created"][-1]["scopes"] == ["inference"]
        assert logged["limits.changed"][0]["requests_per_minute"] == 1
        assert logged["key.revoked"][0]["key_id"] == account.id

    runner.run(scenario())


def test_a_restricted_office_makes_restricted_keys(site: Site, runner: asyncio.Runner) -> None:
    hall = site.hall

    async def scenario() -> None:
        account = hall.accounts["acme"]
        async with hall.database.transaction() as conn:
            minted = await Clerk(conn, hall.services.world.entropy, hall.services.world.now_ns()).create_key(
                account.tenant_id,
                account.project_id,
                "narrow",
                hall.services.secrets.key_pepper,
                scopes=SCOPES,
                rules=read_rules(models=["another"]),
            )
        hall.accounts["narrow office"] = Account(
            account.tenant_id, account.project_id, minted.key_id, minted.secret_text
        )
        path = f"/v1/organization/projects/{account.project_id}/service_accounts"
        made = (await hall.call("POST", path, {"name": "x"}, tenant="narrow office")).json()
        hall.accounts["narrow"] = Account(account.tenant_id, account.project_id, made["id"], made["api_key"]["value"])
        assert (await hall.chat(tenant="narrow", max_tokens=2)).status == 404

    runner.run(scenario())


def test_the_log_of_a_tenant(site: Site, runner: asyncio.Runner, tmp_path: Path) -> None:
    hall = site.hall
    accounts = hall.accounts

    async def scenario() -> None:
        world = hall.services.world
        violation: dict[str, Any] = {
            "epoch": "e",
            "rule": "foreign_read",
            "detail": accounts["globex"].tenant_id,
            "step": 1,
            "block_id": 1,
            "sequence_ids": [],
            "domains": [accounts["globex"].tenant_id, accounts["acme"].tenant_id],
        }
        async with hall.database.transaction() as conn:
            await append(conn, Entry("isolation.violation", "", world.now_ns(), violation), entropy=world.entropy)
        for tenant in ("acme", "globex", "acme"):
            await hall.chat(tenant=tenant, max_tokens=2)
        await hall.check_books()
        expected = [json.loads(json.dumps(one)) for one in await hall.outbox("request.settled")]
        await sequenced(hall, tmp_path)
        async with site.http("acme office") as http:
            found: list[Any] = []
            after = ""
            for _ in range(20):
                page = (await http.get(f"/v1/organization/audit_logs?limit=2{after}")).json()
                found += page["data"]
                after = f"&after={page['last_id']}"
                if not page["has_more"]:
                    break
            text = json.dumps(found)
            assert accounts["globex"].tenant_id not in text
            assert [one["log_index"] for one in found] == sorted((one["log_index"] for one in found), reverse=True)
            assert [one["details"] for one in found if one["type"] == "isolation.violation"] == [
                {"epoch": "e", "rule": "foreign_read", "step": 1}
            ]
            settled = [one["details"]["request_id"] for one in found if one["type"] == "request.settled"]
            own = [row.request_id for row in (await hall.usage_rows()).values()]
            mine = [row for row in own if row in settled]
            assert len(mine) == len(settled) == 2
            assert len(expected) == 3
            only = (await http.get("/v1/organization/audit_logs?event_types[]=key.created")).json()["data"]
            assert {one["type"] for one in only} == {"key.created"}
            future = (await http.get("/v1/organization/audit_logs?effective_at[gt]=8000000000")).json()["data"]
            assert future == []
        async with office(site, "acme") as client:
            shown = [one.id async for one in client.audit_logs.list(limit=3)]
        assert shown == [one["id"] for one in found]

    runner.run(scenario())


def test_what_is_another_tenant_s_is_not_there(site: Site, runner: asyncio.Runner) -> None:
    """Every route, with every id of the other tenant and with ids of nobody: equal but for the id."""
    hall = site.hall

    async def scenario() -> None:
        other = hall.accounts["globex"]
        absent = Account("ten_" + "0" * 32, "prj_" + "0" * 32, "key_" + "0" * 32, "")

        def calls(whose: Account) -> list[tuple[str, str, Any]]:
            project = f"/v1/organization/projects/{whose.project_id}"
            own = f"/v1/organization/projects/{hall.accounts['acme'].project_id}"
            return [
                ("GET", project, None),
                ("GET", f"{project}/api_keys", None),
                ("GET", f"{project}/api_keys/{whose.key_id}", None),
                ("DELETE", f"{project}/api_keys/{whose.key_id}", None),
                ("GET", f"{own}/api_keys/{whose.key_id}", None),
                ("DELETE", f"{own}/api_keys/{whose.key_id}", None),
                ("GET", f"{own}/api_keys?after={whose.key_id}", None),
                ("GET", f"/v1/organization/projects?after={whose.project_id}", None),
                ("POST", f"{project}/service_accounts", {"name": "x"}),
                ("GET", f"{project}/rate_limits", None),
                ("POST", f"{project}/rate_limits/rl_{whose.project_id}", {"max_requests_per_1_minute": 0}),
                ("POST", f"{own}/rate_limits/rl_{whose.project_id}", {"max_requests_per_1_minute": 0}),
            ]

        for theirs, nobodys in zip(calls(other), calls(absent), strict=True):
            one, two = [
                await hall.call(method, path, body, tenant="acme office") for method, path, body in (theirs, nobodys)
            ]
            assert one.status == two.status == 404, theirs
            ids = zip((other.project_id, other.key_id), (absent.project_id, absent.key_id), strict=True)
            text = one.body.decode()
            for known, unknown in ids:
                text = text.replace(known, unknown)
            assert text == two.body.decode()
        start = "start_time=1700000000"
        for asked in (f"project_ids[]={other.project_id}", f"api_key_ids[]={other.key_id}"):
            answer = await hall.call("GET", f"/v1/organization/usage/completions?{start}&{asked}", tenant="acme office")
            assert not [bucket for bucket in answer.json()["data"] if bucket["results"]]
        assert (await hall.chat(tenant="globex", max_tokens=2)).status == 200  # nothing of it was changed

    runner.run(scenario())


@pytest.mark.parametrize(
    "query",
    [
        "usage/completions",
        "usage/completions?start_time=x",
        "usage/completions?start_time=1&bucket_width=1w",
        "usage/completions?start_time=1&group_by[]=user_id",
        "usage/completions?start_time=1&user_ids[]=u",
        "usage/completions?start_time=1&page=page_zzz",
        "usage/completions?start_time=1700000000&page=page_MQ",
        "usage/completions?start_time=1&limit=32",
        "usage/completions?start_time=1&start_time=2",
        "costs?start_time=1&bucket_width=1h",
        "audit_logs?event_types[]=nothing",
        "audit_logs?limit=0",
        "projects?limit=101",
    ],
)
def test_what_is_not_understood_is_refused(site: Site, runner: asyncio.Runner, query: str) -> None:
    answer = runner.run(site.hall.call("GET", f"/v1/organization/{query}", tenant="acme office"))
    assert answer.status == 400
    assert answer.json()["error"]["param"]
