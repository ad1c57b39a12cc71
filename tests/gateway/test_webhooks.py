"""Webhooks to a real receiver over TLS: what arrives, to whom, signed how; receivers that fail, stall and attack."""

import asyncio
import base64
import hashlib
import hmac
import json
import ssl
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, select

from audit.transparency.entry import Entry
from audit.transparency.keyring import load_keyring
from audit.transparency.log import sequence
from audit.transparency.outbox import append
from audit.transparency.tables import log_opening
from gateway.clerk import Clerk
from gateway.host.tls import ensure_certificates, server_context
from gateway.services import Services
from gateway.webhooks.delivery import Webhooks
from gateway.webhooks.events import ALERT_KINDS, EVENT_KINDS, num_leaves
from gateway.webhooks.post import PostError, check_url, post
from gateway.webhooks.signature import endpoint_secret
from gateway.world import World
from tenancy.webhook_tables import webhook_endpoint
from tenancy.webhooks import (
    CLAIM_S,
    NUM_ATTEMPTS_MAX,
    RETRY_AFTER_S,
    SECOND,
    Delivery,
    WebhookError,
    claim_due,
    deliveries,
    endpoints,
)
from tests.fakes.hall import Hall
from tests.fakes.receiver import Receiver, ok
from tests.gateway.conftest import Stage

KINDS = frozenset({"key.revoked", "isolation.violation"})


class House:
    """A hall with a clock that can be set, the log's sequencer, a receiver, and an authority that its client trusts."""

    def __init__(self, hall: Hall, runner: asyncio.Runner, folder: Path) -> None:
        self.runner = runner
        self.ahead_ns = 0
        world = hall.services.world
        moved = World(lambda: time.time_ns() + self.ahead_ns, world.monotonic_ns, world.entropy, world.environ)
        self.services: Services = replace(hall.services, world=moved)
        self.hall = hall
        files = ensure_certificates(folder / "tls", "localhost", time.time_ns())
        self.client_tls = ssl.create_default_context(cafile=str(files.ca))
        self.receiver = Receiver(server_context(files))
        self.keyring = load_keyring(folder / "keys", origin="test/log", entropy=world.entropy)
        self.webhooks = Webhooks(self.services, self.client_tls, post_timeout_s=1.0)
        runner.run(self.receiver.start())

    @property
    def url(self) -> str:
        return f"https://localhost:{self.receiver.port}/hook?x=1"

    def clerk(self, conn: Any) -> Clerk:
        return Clerk(conn, self.services.world.entropy, self.services.world.now_ns())

    async def add(self, tenant: str = "", kinds: frozenset[str] = KINDS, url: str = "") -> str:
        tenant_id = self.hall.accounts[tenant].tenant_id if tenant else ""
        async with self.services.database.transaction() as conn:
            return await self.clerk(conn).add_webhook(
                url or self.url, kinds, tenant_id=tenant_id, next_leaf_index=await num_leaves(conn)
            )

    async def happen(self, kind: str = "key.revoked", tenant: str = "acme", **body: Any) -> None:
        tenant_id = self.hall.accounts[tenant].tenant_id if tenant else ""
        entry = Entry(
            kind, tenant_id, self.services.world.now_ns(), body or {"key_id": "key_1", "reason": "it was found"}
        )
        async with self.services.database.transaction() as conn:
            await append(conn, entry, entropy=self.services.world.entropy)
        await self.sequence()

    async def sequence(self) -> None:
        async with self.services.database.transaction() as conn:
            await sequence(conn, signer=self.keyring, origin="test/log", now_ns=self.services.world.now_ns())

    async def deliveries(self) -> list[Delivery]:
        async with self.services.database.read() as conn:
            return await deliveries(conn)

    async def logged(self, kind: str) -> list[dict[str, Any]]:
        return await self.hall.outbox(kind)


@pytest.fixture
def house(stage: Stage, runner: asyncio.Runner, tmp_path: Path) -> Iterator[House]:
    hall, _ = stage.make(webhook_private=True)
    one = House(hall, runner, tmp_path)
    yield one
    runner.run(one.receiver.stop())


def verified(house: House, endpoint_id: str, index: int = 0) -> Any:
    """As a receiver would: the secret that was shown, the signature computed from the headers; the body's JSON."""
    got = house.receiver.received[index]
    secret = base64.b64decode(endpoint_secret(house.services.secrets, endpoint_id).removeprefix("whsec_"))
    signed = f"{got.headers['webhook-id']}.{got.headers['webhook-timestamp']}.".encode() + got.body
    expected = base64.b64encode(hmac.new(secret, signed, hashlib.sha256).digest()).decode()
    assert got.headers["webhook-signature"] == f"v1,{expected}"
    assert abs(int(got.headers["webhook-timestamp"]) - house.services.world.now_ns() // SECOND) < 60
    return json.loads(got.body)


def test_an_event_arrives_signed_and_can_be_found_in_the_log(house: House) -> None:
    async def scenario() -> str:
        endpoint_id = await house.add("acme")
        await house.happen()
        for _ in range(3):
            await house.webhooks.round()
        return endpoint_id

    endpoint_id = house.runner.run(scenario())
    assert len(house.receiver.received) == 1  # once, however often the rounds run
    event = verified(house, endpoint_id)
    assert event["type"] == "key.revoked"
    assert event["data"] == {"key_id": "key_1", "reason": "it was found"}
    assert house.receiver.received[0].headers["webhook-id"] == f"evt_{event['log_index']}"

    async def leaf() -> Any:
        async with house.services.database.read() as conn:
            query = select(log_opening.c.body).where(log_opening.c.leaf_index == event["log_index"])
            return (await conn.execute(query)).scalar_one()

    assert json.loads(house.runner.run(leaf())) == event["data"]
    assert [one.state for one in house.runner.run(house.deliveries())] == ["delivered"]
    assert b'bulkhead_webhook_attempts_total{outcome="delivered"} 1.0' in house.services.metrics.render()


def test_a_tenant_hears_of_itself_only(house: House) -> None:
    accounts = house.hall.accounts
    domains = [accounts["globex"].tenant_id, accounts["acme"].tenant_id]
    violation = {
        "epoch": "e",
        "rule": "foreign_read",
        "detail": f"block of {accounts['globex'].tenant_id}",
        "step": 3,
        "block_id": 7,
        "sequence_ids": ["req_x/0"],
        "domains": domains,
    }

    async def scenario() -> tuple[str, str]:
        mine, all_of_it = await house.add("acme"), await house.add()
        await house.happen(tenant="globex")
        await house.happen("isolation.violation", tenant="", **violation)
        await house.happen("isolation.violation", tenant="", **violation | {"domains": domains[:1]})
        await house.webhooks.round()
        return mine, all_of_it

    mine, all_of_it = house.runner.run(scenario())
    by_endpoint: dict[str, list[Any]] = {mine: [], all_of_it: []}
    for delivery in house.runner.run(house.deliveries()):
        by_endpoint[delivery.endpoint_id].append(delivery.kind)
    assert by_endpoint[mine] == ["isolation.violation"]
    assert len(by_endpoint[all_of_it]) == 3
    bodies = [json.loads(got.body) for got in house.receiver.received]
    (told,) = [body for body in bodies if body["tenant_id"] == accounts["acme"].tenant_id]
    assert told["data"] == {"epoch": "e", "rule": "foreign_read", "step": 3}
    assert accounts["globex"].tenant_id not in json.dumps(told)


def test_nothing_from_before_and_nothing_lost_over_a_crash(house: House) -> None:
    """An endpoint hears of what comes after it. A server that dies with deliveries in hand: another sends them."""

    async def scenario() -> None:
        await house.happen(reason="before", key_id="k")
        await house.add()
        await house.happen(reason="after", key_id="k")
        await house.webhooks.collect()
        now_ns = house.services.world.now_ns()
        async with house.services.database.transaction() as conn:
            assert len(await claim_due(conn, now_ns, 9)) == 1  # and then it dies
        await house.webhooks.round()
        assert house.receiver.received == []
        house.ahead_ns += (CLAIM_S + 1) * SECOND
        await house.webhooks.round()

    house.runner.run(scenario())
    assert [json.loads(got.body)["data"]["reason"] for got in house.receiver.received] == ["after"]


def test_many_servers_make_one_delivery_of_an_event(house: House) -> None:
    async def scenario() -> None:
        await house.add()
        others = [Webhooks(house.services, house.client_tls) for _ in range(3)]
        for number in range(5):
            await house.happen(reason=str(number), key_id="k")
            await asyncio.gather(*(other.round() for other in others))
        await house.webhooks.round()

    house.runner.run(scenario())
    assert [json.loads(got.body)["data"]["reason"] for got in house.receiver.received] == list("01234")


def test_attempts_come_again_later_and_later_and_end(house: House) -> None:
    house.receiver.answers = [
        ok(500),
        ok(302, "location: https://localhost/elsewhere"),
        b"SSH-2.0-x\r\n",
        None,
        ok(503),
    ]

    async def scenario() -> list[str]:
        await house.add("acme")
        await house.happen()
        errors = []
        for number in range(NUM_ATTEMPTS_MAX):
            assert len(house.receiver.received) == number
            await house.webhooks.round()
            await house.webhooks.round()  # not due: nothing happens
            (delivery,) = await house.deliveries()
            assert delivery.num_attempts == number + 1
            errors.append(delivery.last_error)
            if number < len(RETRY_AFTER_S):
                wait_ns = delivery.next_attempt_ns - house.services.world.now_ns()
                assert 0.7 * RETRY_AFTER_S[number] < wait_ns / SECOND < 1.2 * RETRY_AFTER_S[number]
                house.ahead_ns += wait_ns + SECOND
        return errors

    errors = house.runner.run(scenario())
    assert errors[:5] == [
        "the receiver answered 500",
        "the receiver answered 302",
        "the answer is not HTTP/1.1",
        "no answer within 1 s",
        "the receiver answered 503",
    ]
    (delivery,) = house.runner.run(house.deliveries())
    assert delivery.state == "dead"
    (logged,) = house.runner.run(house.logged("webhook.given_up"))
    assert logged["event_kind"] == "key.revoked"
    assert logged["num_attempts"] == NUM_ATTEMPTS_MAX
    house.ahead_ns += 10**18
    house.runner.run(house.webhooks.round())
    assert len(house.receiver.received) == NUM_ATTEMPTS_MAX

    house.receiver.answers = [ok(200)]

    async def again() -> None:
        async with house.services.database.transaction() as conn:
            await house.clerk(conn).resend_webhook(delivery.delivery_id)
        await house.webhooks.round()

    house.runner.run(again())
    first, last = house.receiver.received[0], house.receiver.received[-1]
    assert first.headers["webhook-id"] == last.headers["webhook-id"]
    assert first.body == last.body
    assert house.runner.run(house.deliveries())[0].state == "delivered"
    house.ahead_ns += 31 * 24 * 3_600 * SECOND
    house.runner.run(house.webhooks.forget())
    assert house.runner.run(house.deliveries()) == []


def test_a_receiver_that_is_gone_ends_its_endpoint(house: House) -> None:
    house.receiver.answers = [ok(410)]

    async def scenario() -> None:
        endpoint_id = await house.add("acme")
        await house.happen()
        await house.webhooks.round()
        await house.happen()
        await house.webhooks.round()
        async with house.services.database.read() as conn:
            assert await endpoints(conn) == []
        with pytest.raises(WebhookError, match="has ended before"):
            async with house.services.database.transaction() as conn:
                await house.clerk(conn).remove_webhook(endpoint_id, "x")

    house.runner.run(scenario())
    assert len(house.receiver.received) == 1


def test_an_erased_entry_is_not_told(house: House) -> None:
    async def scenario() -> None:
        await house.add()
        await house.happen()
        await house.webhooks.collect()
        async with house.services.database.transaction() as conn:
            await conn.execute(delete(log_opening))
        await house.webhooks.send_due()
        async with house.services.database.read() as conn:
            assert len(await endpoints(conn)) == 1  # it is not the receiver's fault

    house.runner.run(scenario())
    assert house.receiver.received == []
    assert house.runner.run(house.deliveries())[0].last_error == "the entry was erased from the log"


def test_a_certificate_for_another_name_or_authority_gets_nothing(house: House) -> None:
    async def scenario() -> None:
        strangers = Webhooks(house.services, ssl.create_default_context(), post_timeout_s=1.0)
        await house.add()
        await house.happen()
        await strangers.round()

    house.runner.run(scenario())
    assert house.receiver.received == []
    assert "TLS" in house.runner.run(house.deliveries())[0].last_error


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/x",
        "https://10.0.0.8/x",
        "https://169.254.169.254/latest/meta-data",
        "https://[::1]/x",
        "https://[::ffff:10.0.0.1]/x",
        "https://[fe80::1]/x",
        "https://[64:ff9b::a00:1]/x",
        "https://[2002:7f00:1::]/x",
        "https://0.0.0.0/x",
        "https://224.0.0.1/x",
        "https://100.64.0.1/x",
        "http://example.com/x",
        "ftp://example.com/x",
        "https:///x",
        "https://user@example.com/",
        "https://example.com/#x",
        "https://example.com:0/",
        "https://example.com:99999/",
        "https://example.com/a b",
        "https://example.com/\r\nx: y",
        "https://[::1/",
    ],
)
def test_addresses_inside_and_odd_urls_are_refused(url: str) -> None:
    with pytest.raises(PostError):
        check_url(url, private_allowed=False)


@pytest.mark.parametrize("host", ["localhost", "2130706433", "0x7f.1"])
def test_names_of_addresses_inside_are_refused(host: str) -> None:
    tls = ssl.create_default_context()
    with pytest.raises(PostError, match=r"not public|no address"):
        asyncio.run(post(f"https://{host}/x", b"", {}, private_allowed=False, tls=tls, timeout_s=5))


def test_a_name_is_looked_up_once(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is public when it is checked and private when it is connected to must not get through: the
    connection goes to the address that was checked."""

    async def scenario() -> list[str]:
        loop = asyncio.get_running_loop()
        looked_up: list[str] = []
        answers = iter(["127.0.0.1", "203.0.113.1"])

        async def getaddrinfo(host: Any, port: Any, **_: Any) -> Any:
            text = host.decode() if isinstance(host, bytes) else host
            if text == "rebinding.test":
                looked_up.append(text)
                text = next(answers)
            assert text == "127.0.0.1"
            return [(2, 1, 6, "", (text, port))]

        monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
        url = f"https://rebinding.test:{house.receiver.port}/"
        with pytest.raises(PostError, match="TLS"):  # it was connected to, and has no certificate of that name
            await post(url, b"", {}, private_allowed=True, tls=house.client_tls)
        return looked_up

    assert house.runner.run(scenario()) == ["rebinding.test"]
    assert house.receiver.received == []


def test_endpoints_are_bounded_and_kinds_are_those_of_the_log(house: House) -> None:
    assert ALERT_KINDS <= EVENT_KINDS
    assert not {kind for kind in EVENT_KINDS if kind.startswith(("request.", "webhook.", "audit."))}

    async def scenario() -> None:
        for _ in range(20):
            await house.add("acme")
        with pytest.raises(WebhookError, match="remove one first"):
            await house.add("acme")
        await house.add("globex")
        async with house.services.database.read() as conn:
            rows = (await conn.execute(select(webhook_endpoint))).all()
        secrets = [endpoint_secret(house.services.secrets, row.id).encode() for row in rows]
        assert len(set(secrets)) == 21
        assert not any(secret[6:] in repr(row).encode() for secret in secrets for row in rows)
        logged = await house.logged("webhook.added")
        assert {one["host"] for one in logged} == {"localhost"}
        assert "hook" not in json.dumps(logged)

    house.runner.run(scenario())
