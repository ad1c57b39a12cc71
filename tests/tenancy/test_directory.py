"""Organisations, tenants, projects and their limits."""

import asyncio
from typing import Any

import pytest
from sqlalchemy import update

from tenancy import tables
from tenancy.access.directory import (
    TENANT_MOVES,
    DuplicateNameError,
    TenantStatusError,
    UnknownIdError,
    create_organisation,
    create_project,
    create_tenant,
    get_tenant_by_name,
    list_projects,
    list_tenants,
    set_tenant_status,
)
from tenancy.access.keys import authenticate
from tenancy.access.rotation import rotate_key
from tenancy.accounts.ledger import Balance, balance
from tenancy.ids import InvalidNameError, new_id
from tenancy.quotas.limits import LimitError, ScopeLimits, get_limits, load_scopes, set_limits
from tests.tenancy.conftest import opened
from tests.tenancy.world import PEPPER, SECOND, T0, counting_entropy, populate


def test_a_tenant_is_made_with_its_accounts_open(database_url: str) -> None:
    async def run() -> None:
        entropy = counting_entropy()
        async with opened(database_url) as database, database.transaction() as conn:
            organisation = await create_organisation(conn, "Acme Group", entropy=entropy, now_ns=T0)
            tenant = await create_tenant(conn, organisation.organisation_id, "acme", entropy=entropy, now_ns=T0)
            assert await get_tenant_by_name(conn, "acme") == tenant
            assert await get_tenant_by_name(conn, "Acme") is None
            assert await balance(conn, tenant.tenant_id) == Balance(0, 0, 0)
            project = await create_project(conn, tenant.tenant_id, "default", entropy=entropy, now_ns=T0)
            assert await list_projects(conn, tenant.tenant_id) == [project]
            assert [t.name for t in await list_tenants(conn)] == ["acme"]
            here: dict[str, Any] = {"entropy": entropy, "now_ns": T0}
            with pytest.raises(DuplicateNameError, match="Acme Group"):
                await create_organisation(conn, "Acme Group", **here)
            with pytest.raises(DuplicateNameError, match="acme"):
                await create_tenant(conn, organisation.organisation_id, "acme", **here)
            with pytest.raises(DuplicateNameError, match="default"):
                await create_project(conn, tenant.tenant_id, "default", **here)
            with pytest.raises(UnknownIdError, match="org_x"):
                await create_tenant(conn, "org_x", "other", **here)
            with pytest.raises(UnknownIdError, match="ten_x"):
                await create_project(conn, "ten_x", "other", **here)

    asyncio.run(run())


@pytest.mark.parametrize("name", ["", " ", " a", "a\n", "a\0b", "x" * 101, "\u202etxt"])
def test_names_can_be_read_back(sqlite_url: str, name: str) -> None:
    async def run() -> None:
        async with opened(sqlite_url) as database, database.transaction() as conn:
            with pytest.raises(InvalidNameError):
                await create_organisation(conn, name, entropy=counting_entropy(), now_ns=T0)

    asyncio.run(run())


def test_every_move_between_statuses(sqlite_url: str) -> None:
    async def run() -> None:
        entropy = counting_entropy()
        async with opened(sqlite_url) as database, database.transaction() as conn:
            for number, (before, allowed) in enumerate(TENANT_MOVES.items()):
                for after in TENANT_MOVES:
                    tenant = await populate(conn, f"{number} {after}", entropy=entropy)
                    if before != "active":
                        await set_tenant_status(conn, tenant.tenant_id, before)
                    if after in allowed or after == before:
                        assert (await set_tenant_status(conn, tenant.tenant_id, after)).status == after
                    else:
                        with pytest.raises(TenantStatusError, match="cannot become"):
                            await set_tenant_status(conn, tenant.tenant_id, after)
            with pytest.raises(UnknownIdError, match="ten_x"):
                await set_tenant_status(conn, "ten_x", "suspended")

    asyncio.run(run())


def test_a_request_is_counted_in_four_scopes(database_url: str) -> None:
    async def run() -> None:
        async with opened(database_url) as database, database.transaction() as conn:
            made = await populate(conn, entropy=counting_entropy())
            principal = await authenticate(conn, made.secret_text, pepper=PEPPER, now_ns=T0)
            await set_limits(conn, "tenant", made.tenant_id, requests_per_minute=9, concurrency_max=2, now_ns=T0)
            await set_limits(conn, "tenant", made.tenant_id, tokens_per_minute=0, now_ns=T0 + 1)  # replaces
            org = made.organisation_id
            assert await load_scopes(conn, principal) == [
                ScopeLimits(org, organisation_id=org),
                ScopeLimits(made.tenant_id, tokens_per_minute=0, organisation_id=org),
                ScopeLimits(made.project_id, organisation_id=org),
                ScopeLimits(made.key_id, organisation_id=org),
            ]
            assert list(await get_limits(conn, [made.tenant_id, "key_x"])) == [made.tenant_id]
            rules: Any = {"tokens_per_day": 5, "shadow": frozenset({"tokens_per_day", "concurrency_max"})}
            asked = await set_limits(conn, "key", made.key_id, **rules, now_ns=T0)
            assert (await get_limits(conn, [made.key_id]))[made.key_id] == asked
            rotated = await rotate_key(
                conn, made.key_id, overlap_ns=SECOND, pepper=PEPPER, entropy=counting_entropy("r"), now_ns=T0
            )
            successor = (await get_limits(conn, [rotated.minted.key_id]))[rotated.minted.key_id]
            assert (successor.tokens_per_day, successor.shadow) == (5, asked.shadow)
            with pytest.raises(LimitError, match="no limit 'x'"):
                await set_limits(conn, "key", made.key_id, shadow=frozenset({"x"}), now_ns=T0)  # type: ignore[arg-type]
            with pytest.raises(LimitError, match="concurrency_max"):
                await set_limits(conn, "key", made.key_id, concurrency_max=-1, now_ns=T0)

    asyncio.run(run())


def test_a_tenants_weight_is_its_principals(database_url: str) -> None:
    async def run() -> None:
        async with opened(database_url) as database, database.transaction() as conn:
            made = await populate(conn, entropy=counting_entropy())

            async def weight() -> int:
                return (await authenticate(conn, made.secret_text, pepper=PEPPER, now_ns=T0)).weight

            assert await weight() == 1
            await set_limits(conn, "tenant", made.tenant_id, requests_per_minute=9, now_ns=T0)
            assert await weight() == 1
            await set_limits(conn, "tenant", made.tenant_id, weight=1_000, now_ns=T0)
            assert await weight() == 1_000
            assert (await get_limits(conn, [made.tenant_id]))[made.tenant_id].weight == 1_000
            await conn.execute(update(tables.scope_limit).values(weight=None))  # a row from before
            assert await weight() == (await get_limits(conn, [made.tenant_id]))[made.tenant_id].weight == 1
            for wrong in (0, -1, 1_001):
                with pytest.raises(LimitError, match="weight"):
                    await set_limits(conn, "tenant", made.tenant_id, weight=wrong, now_ns=T0)
            for kind, scope_id in (("key", made.key_id), ("organisation", made.organisation_id)):
                with pytest.raises(LimitError, match="a tenant's"):
                    await set_limits(conn, kind, scope_id, weight=2, now_ns=T0)

    asyncio.run(run())


def test_ids_say_what_they_name() -> None:
    assert new_id("ten", lambda num_bytes: bytes(range(num_bytes))) == "ten_000102030405060708090a0b0c0d0e0f"
