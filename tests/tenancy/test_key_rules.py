"""What narrows a key, rotation, last use, and the deletion of a tenant, on both databases."""

import asyncio
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncConnection

from tenancy.access.directory import owner_of, set_tenant_status
from tenancy.access.key_rules import KeyRuleError, KeyRules, loaded, read_rules, stored
from tenancy.access.keys import InvalidApiKeyError, authenticate, get_key, list_keys, mint_key, note_uses, revoke_key
from tenancy.access.rotation import RotationError, rotate_key
from tenancy.accounts.ledger import Hold, InsufficientCredit, grant_credit, place_hold, void
from tenancy.closing import MoneyHeldError, TenantInactiveError, delete_tenant, inactive_among, require_active
from tenancy.quotas.limits import get_limits, set_limits
from tests.tenancy.conftest import opened
from tests.tenancy.world import PEPPER, SECOND, T0, Populated, counting_entropy, populate


async def alive(conn: AsyncConnection, text: str, now_ns: int = T0, peer: str | None = None) -> bool:
    try:
        await authenticate(conn, text, pepper=PEPPER, now_ns=now_ns, peer=peer)
    except InvalidApiKeyError:
        return False
    return True


@given(
    network=st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).flatmap(
        lambda a: st.integers(0, a.max_prefixlen).map(lambda bits: str(ip_network((a, bits), strict=False)))
    ),
    peer=st.ip_addresses(),
)
def test_a_network_holds_what_the_standard_library_says(network: str, peer: object) -> None:
    rules = read_rules(networks=[network])
    assert loaded(None, stored(rules.networks)) == rules
    address = ip_address(str(peer))
    if getattr(address, "ipv4_mapped", None) is None:
        assert rules.allows_peer(str(peer)) == (address in ip_network(network))


def test_peers_that_need_care() -> None:
    rules = read_rules(networks=["10.0.0.0/8", "::1"])
    assert rules.allows_peer("10.1.2.3")
    assert rules.allows_peer("::ffff:10.1.2.3")
    assert rules.allows_peer("::1")
    for peer in (None, "", "11.0.0.1", "::ffff:11.0.0.1", "10.0.0.1, 11.0.0.1", "localhost", "::2"):
        assert not rules.allows_peer(peer), peer
    assert KeyRules().allows_peer(None)
    assert not loaded("", None).allows_model("m")  # a damaged row allows nothing


@pytest.mark.parametrize("text", ["", "10.0.0.1/8", "10.0.0.0/33", "example.org", "10.0.0.0/8 ::1", "all"])
def test_what_is_not_a_network_is_refused(text: str) -> None:
    with pytest.raises(KeyRuleError):
        read_rules(networks=[text])


TIERS_ASKED = [None, "auto", "priority", "default", "flex", "batch"]


@pytest.mark.parametrize(
    ("tiers", "given"),
    [
        ([], ["default", "default", "priority", "default", "flex", "batch"]),
        (["batch", "flex"], ["flex", "flex", None, None, "flex", "batch"]),
        (["batch", "priority"], ["batch", "batch", "priority", None, None, "batch"]),
        (["priority"], [None, None, "priority", None, None, None]),
    ],
)
def test_a_key_gets_its_own_tiers_only(tiers: list[str], given: list[str | None]) -> None:
    rules = read_rules(tiers=tiers)
    assert loaded(None, None, stored(rules.tiers)) == rules
    assert [rules.tier_for(asked) for asked in TIERS_ASKED] == given
    assert [loaded(None, None, "").tier_for(asked) for asked in TIERS_ASKED] == [None] * 6  # a damaged row


@pytest.mark.parametrize("tiers", [[""], ["auto"], ["scale"], ["batch flex"]])
def test_what_is_not_a_tier_is_refused(tiers: list[str]) -> None:
    with pytest.raises(KeyRuleError, match="priority, default, flex, batch"):
        read_rules(tiers=tiers)


@pytest.mark.parametrize("models", [[""], ["a b"], ["x" * 201], [str(n) for n in range(65)]])
def test_what_is_not_a_model_is_refused(models: list[str]) -> None:
    with pytest.raises(KeyRuleError):
        read_rules(models=models)


def test_a_key_works_from_its_networks_only(database_url: str) -> None:
    async def run() -> None:
        entropy = counting_entropy()
        async with opened(database_url) as database, database.transaction() as conn:
            made = await populate(conn, entropy=entropy)
            rules = read_rules(["m"], ["192.0.2.0/24", "2001:db8::/32"], ["flex", "batch"])
            key = await mint_key(
                conn, made.project_id, "k", ["usage"], pepper=PEPPER, entropy=entropy, now_ns=T0, rules=rules
            )
            assert await alive(conn, key.secret_text, peer="192.0.2.7")
            assert await alive(conn, key.secret_text, peer="2001:db8::1")
            for peer in (None, "192.0.3.7", "127.0.0.1"):
                assert not await alive(conn, key.secret_text, peer=peer)
            assert (await get_key(conn, key.key_id)).rules == rules
            assert await alive(conn, made.secret_text, peer="203.0.113.1")

    asyncio.run(run())


def test_rotation_overlaps_and_then_ends_the_old_key(database_url: str) -> None:
    async def run() -> None:
        entropy = counting_entropy()
        async with opened(database_url) as database, database.transaction() as conn:
            made = await populate(conn, entropy=entropy)
            await set_limits(conn, "key", made.key_id, requests_per_minute=7, now_ns=T0)
            rotated = await rotate_key(
                conn, made.key_id, overlap_ns=10 * SECOND, pepper=PEPPER, entropy=entropy, now_ns=T0
            )
            new = rotated.minted
            assert await alive(conn, new.secret_text)
            assert await alive(conn, made.secret_text, T0 + 10 * SECOND - 1)
            assert not await alive(conn, made.secret_text, T0 + 10 * SECOND)
            assert await alive(conn, new.secret_text, T0 + 10 * SECOND)
            assert (await get_limits(conn, [new.key_id]))[new.key_id].requests_per_minute == 7
            old, successor = await list_keys(conn, made.tenant_id)
            assert (successor.name, successor.scopes, successor.rules) == (old.name, old.scopes, old.rules)
            assert await owner_of(conn, "key", new.key_id) == made.tenant_id

            async def refused(key_id: str, overlap_ns: int, now_ns: int) -> None:
                with pytest.raises(RotationError):
                    await rotate_key(conn, key_id, overlap_ns=overlap_ns, pepper=PEPPER, entropy=entropy, now_ns=now_ns)

            await refused(made.key_id, 0, T0 + 10 * SECOND)  # expired
            await refused(new.key_id, -1, T0)
            # An overlap never lengthens a life.
            again = await rotate_key(
                conn, made.key_id, overlap_ns=99 * SECOND, pepper=PEPPER, entropy=entropy, now_ns=T0 + SECOND
            )
            assert again.old_expires_ns == again.expires_ns == T0 + 10 * SECOND
            await revoke_key(conn, new.key_id, now_ns=T0)
            await refused(new.key_id, 0, T0)

    asyncio.run(run())


def test_the_last_use_only_moves_forward(database_url: str) -> None:
    async def run() -> None:
        async with opened(database_url) as database, database.transaction() as conn:
            made = await populate(conn, entropy=counting_entropy())
            for at_ns, seen in ((T0 + 5, T0 + 5), (T0 + 3, T0 + 5), (T0 + 9, T0 + 9)):
                await note_uses(conn, {made.key_id: at_ns, "key_gone": at_ns})
                assert (await get_key(conn, made.key_id)).last_used_ns == seen

    asyncio.run(run())


async def hold(conn: AsyncConnection, made: Populated, hold_id: str) -> Hold | InsufficientCredit:
    return await place_hold(
        conn,
        hold_id=hold_id,
        tenant_id=made.tenant_id,
        request_id=hold_id,
        price_id=made.price_id,
        amount_nano_usd=10,
        expires_ns=T0 + 60 * SECOND,
        now_ns=T0,
    )


def test_a_tenant_with_money_held_is_not_deleted(database_url: str) -> None:
    async def run() -> None:
        async with opened(database_url) as database, database.transaction() as conn:
            made = await populate(conn, entropy=counting_entropy())
            await grant_credit(conn, made.tenant_id, 100, transfer_id="t", now_ns=T0)
            await hold(conn, made, "hold_1")
            with pytest.raises(MoneyHeldError, match="10 nano-units"):
                await delete_tenant(conn, made.tenant_id, now_ns=T0)
            assert await alive(conn, made.secret_text)
            await set_tenant_status(conn, made.tenant_id, "suspended")
            assert await inactive_among(conn, [made.tenant_id]) == {made.tenant_id}
            await void(conn, "hold_1", T0)
            closed = await delete_tenant(conn, made.tenant_id, now_ns=T0)
            assert (closed.num_keys_revoked, closed.credit_nano_usd) == (1, 100)
            assert (await get_key(conn, made.key_id)).state(T0) == "revoked"
            assert (await delete_tenant(conn, made.tenant_id, now_ns=T0)).num_keys_revoked == 0

    asyncio.run(run())


def test_deletion_and_admission_at_once_leave_no_hold_behind(postgres_url: str) -> None:
    async def run() -> None:
        entropy = counting_entropy()
        async with opened(postgres_url) as database:

            async def admit(made: Populated) -> bool:
                try:
                    async with database.transaction() as conn:
                        await hold(conn, made, f"hold_{made.tenant_id}")
                        await require_active(conn, made.tenant_id)
                except TenantInactiveError:
                    return False
                return True

            async def delete(made: Populated) -> bool:
                try:
                    async with database.transaction() as conn:
                        await delete_tenant(conn, made.tenant_id, now_ns=T0)
                except MoneyHeldError:
                    return False
                return True

            seen = set()
            for number in range(12):
                async with database.transaction() as conn:
                    made = await populate(conn, f"t{number}", entropy=entropy)
                    await grant_credit(conn, made.tenant_id, 100, transfer_id=f"t{number}", now_ns=T0)
                pair = (admit(made), delete(made)) if number % 2 else (delete(made), admit(made))
                results = await asyncio.gather(*pair)
                assert sum(results) == 1, results
                seen.add(results[0])
            assert seen

    asyncio.run(run())
