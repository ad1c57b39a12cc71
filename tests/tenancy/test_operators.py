"""Operators: argon2id, one answer for every failed log-in, and the same work for a name that nobody has."""

import asyncio
from statistics import median
from time import perf_counter

import pytest
from argon2 import extract_parameters
from sqlalchemy import update

from tenancy import tables
from tenancy.access import operators
from tenancy.access.operators import (
    PASSWORD_LENGTH_MAX,
    STAND_IN_HASH,
    DuplicateOperatorError,
    WeakPasswordError,
    create_operator,
    hash_password,
    verify_operator,
    verify_password,
)
from tests.tenancy.conftest import opened
from tests.tenancy.world import T0, counting_entropy

PASSWORD = "correct horse battery"


def test_log_in(database_url: str) -> None:
    async def run() -> None:
        entropy = counting_entropy()
        async with opened(database_url) as database, database.transaction() as conn:
            made = await create_operator(conn, "ada", PASSWORD, T0, entropy=entropy)
            assert await verify_operator(conn, "ada", PASSWORD) == made
            for name, password in (
                ("ada", PASSWORD + " "),
                ("ada", ""),
                ("Ada", PASSWORD),
                ("", PASSWORD),
                ("a\0da", PASSWORD),
                ("x" * 1_000, PASSWORD),
                ("bob", PASSWORD),
                ("ada", PASSWORD + "\ud800"),
            ):
                assert await verify_operator(conn, name, password) is None
            with pytest.raises(DuplicateOperatorError, match="ada"):
                await create_operator(conn, "ada", PASSWORD, T0, entropy=entropy)
            await conn.execute(update(tables.operator).values(disabled_ns=T0))
            assert await verify_operator(conn, "ada", PASSWORD) is None

    asyncio.run(run())


@pytest.mark.parametrize("password", ["short", "x" * 11, "x" * (PASSWORD_LENGTH_MAX + 1)])
def test_weak_passwords_are_refused_and_not_shown(password: str) -> None:
    with pytest.raises(WeakPasswordError) as refused:
        hash_password(password, entropy=counting_entropy())
    assert password not in str(refused.value)


def test_a_longer_password_never_passes_for_its_beginning(sqlite_url: str) -> None:
    async def run() -> None:
        longest = "x" * PASSWORD_LENGTH_MAX
        async with opened(sqlite_url) as database, database.transaction() as conn:
            await create_operator(conn, "ada", longest, T0, entropy=counting_entropy())
            assert await verify_operator(conn, "ada", longest) is not None
            assert await verify_operator(conn, "ada", longest + "y") is None

    asyncio.run(run())


def test_the_stand_in_costs_what_a_real_hash_costs() -> None:
    real = hash_password(PASSWORD, entropy=counting_entropy())
    assert extract_parameters(STAND_IN_HASH) == extract_parameters(real)
    assert real.startswith("$argon2id$")
    assert not verify_password(STAND_IN_HASH, PASSWORD)
    assert not verify_password("not a hash", PASSWORD)

    def seconds(stored: str) -> float:
        times = []
        for _ in range(5):
            began = perf_counter()
            verify_password(stored, "a wrong password")
            times.append(perf_counter() - began)
        return median(times)

    assert 1 / 3 < seconds(STAND_IN_HASH) / seconds(real) < 3


def test_an_unknown_name_is_verified_too(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verified: list[str] = []
    monkeypatch.setattr(operators, "verify_password", lambda stored, _: verified.append(stored))

    async def run() -> None:
        async with opened(sqlite_url) as database, database.transaction() as conn:
            assert await verify_operator(conn, "nobody", PASSWORD) is None

    asyncio.run(run())
    assert verified == [STAND_IN_HASH]
