"""Keys: the exact text authenticates; every edit, revoked, expired and suspended key gets one and the same answer."""

import asyncio
import string
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event, select
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.database import Database
from tenancy import tables
from tenancy.access import keys, presented
from tenancy.access.directory import set_tenant_status
from tenancy.access.keys import (
    InvalidApiKeyError,
    KeyScopeError,
    Principal,
    UnknownKeyIdError,
    authenticate,
    list_keys,
    mint_key,
    revoke_key,
)
from tests.tenancy.conftest import opened
from tests.tenancy.world import PEPPER, SECOND, T0, Populated, counting_entropy, populate

MESSAGE = "Incorrect API key provided."


class Store:
    """One database and one event loop for many examples."""

    def __init__(self, url: str) -> None:
        self.runner = asyncio.Runner()
        self.database = Database(url)
        self.made = self.runner.run(self._populate())

    async def _populate(self) -> Populated:
        async with self.database.transaction() as conn:
            return await populate(conn, entropy=counting_entropy())

    def authenticate(self, presented: str, *, now_ns: int = T0, pepper: bytes = PEPPER) -> Principal:
        async def run() -> Principal:
            async with self.database.read() as conn:
                return await authenticate(conn, presented, pepper=pepper, now_ns=now_ns)

        return self.runner.run(run())

    def close(self) -> None:
        self.runner.run(self.database.dispose())
        self.runner.close()


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    made = Store(database_url)
    yield made
    made.close()


@st.composite
def edits(draw: st.DrawFn) -> "tuple[str, int, str]":
    kind = draw(st.sampled_from(["replace", "insert", "delete", "swap case", "cut", "append"]))
    alphabet = st.one_of(st.sampled_from(string.ascii_letters + string.digits + "-_= \n\0é"), st.characters())
    return kind, draw(st.integers(0, 62)), draw(alphabet)


def edited(text: str, edit: tuple[str, int, str]) -> str:
    kind, at, character = edit
    changed = {
        "replace": text[:at] + character + text[at + 1 :],
        "insert": text[:at] + character + text[at:],
        "delete": text[:at] + text[at + 1 :],
        "swap case": text[:at] + text[at:].swapcase(),
        "cut": text[:at],
        "append": text + character,
    }
    return changed[kind]


@given(edit=edits())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_edit_of_the_text_is_refused_alike(store: Store, edit: tuple[str, int, str]) -> None:
    text = store.made.secret_text
    assert len(text) == 63
    presented = edited(text, edit)
    if presented == text:
        assert store.authenticate(presented).key_id == store.made.key_id
    else:
        with pytest.raises(InvalidApiKeyError) as refused:
            store.authenticate(presented)
        assert str(refused.value) == MESSAGE


def test_the_last_character_has_one_text(store: Store) -> None:
    """43 base64url characters hold two bits too many: four texts decode to the same bytes, one of them is the key."""
    text = store.made.secret_text
    alphabet = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"
    accepted = []
    for character in alphabet:
        try:
            store.authenticate(text[:-1] + character)
        except InvalidApiKeyError:
            continue
        accepted.append(character)
    assert accepted == [text[-1]]


@pytest.mark.parametrize(
    "presented", ["", "bk-", "Bearer x", "sk-abc", "bk-" + "0" * 16 + "-" + "A" * 43, "\ud800", "x" * 1_000_000]
)
def test_malformed_and_unknown_keys_get_the_same_answer(store: Store, presented: str) -> None:
    with pytest.raises(InvalidApiKeyError, match=MESSAGE):
        store.authenticate(presented)


def test_the_principal_names_the_whole_way_up(store: Store) -> None:
    made = store.made
    assert store.authenticate(made.secret_text) == Principal(
        made.organisation_id, made.tenant_id, "acme", made.project_id, made.key_id, frozenset({"inference"})
    )
    with pytest.raises(InvalidApiKeyError):
        store.authenticate(made.secret_text, pepper=b"another pepper")


def test_revoked_expired_and_suspended_keys_are_dead(database_url: str) -> None:
    async def run() -> None:
        entropy = counting_entropy()
        async with opened(database_url) as database, database.transaction() as conn:
            made = await populate(conn, entropy=entropy)

            async def alive(text: str, now_ns: int = T0) -> bool:
                try:
                    await authenticate(conn, text, pepper=PEPPER, now_ns=now_ns)
                except InvalidApiKeyError:
                    return False
                return True

            async def mint(expires_ns: int | None = None) -> keys.MintedKey:
                return await mint_key(
                    conn,
                    made.project_id,
                    "k",
                    ["usage"],
                    pepper=PEPPER,
                    entropy=entropy,
                    now_ns=T0,
                    expires_ns=expires_ns,
                )

            short = await mint(expires_ns=T0 + SECOND)
            assert await alive(short.secret_text, T0 + SECOND - 1)
            assert not await alive(short.secret_text, T0 + SECOND)  # half-open
            other = await mint()
            assert await revoke_key(conn, other.key_id, now_ns=T0 + 1)
            assert not await revoke_key(conn, other.key_id, now_ns=T0 + 2)
            assert not await alive(other.secret_text)
            assert await alive(made.secret_text)
            await set_tenant_status(conn, made.tenant_id, "suspended")
            assert not await alive(made.secret_text)
            await set_tenant_status(conn, made.tenant_id, "active")
            assert await alive(made.secret_text)
            with pytest.raises(UnknownKeyIdError, match="key_x"):
                await revoke_key(conn, "key_x", now_ns=T0)

    asyncio.run(run())


def test_every_refusal_does_the_same_work(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One query, one HMAC, one constant-time compare of 32 bytes, whatever is wrong with the key."""
    work: list[str] = []
    compare, compute = presented.hmac.compare_digest, presented.secret_hmac
    monkeypatch.setattr(
        presented.hmac, "compare_digest", lambda a, b: (work.append(f"compare {len(a)} {len(b)}"), compare(a, b))[1]
    )
    monkeypatch.setattr(
        presented, "secret_hmac", lambda *a: (work.append(f"hmac {sum(map(len, a[1:]))}"), compute(*a))[1]
    )

    async def run() -> None:
        entropy = counting_entropy()
        async with opened(sqlite_url) as database, database.transaction() as conn:
            made = await populate(conn, entropy=entropy)
            dead = await mint_key(conn, made.project_id, "k", ["usage"], pepper=PEPPER, entropy=entropy, now_ns=T0)
            await revoke_key(conn, dead.key_id, now_ns=T0)
            event.listen(database._engine.sync_engine, "before_cursor_execute", lambda *_: work.append("query"))
            text = made.secret_text
            wrong_secret = text[:-2] + ("AA" if text[-2:] != "AA" else "BB")
            for sent in ("", "bk-x", "bk-" + "0" * 16 + text[19:], wrong_secret, dead.secret_text, text):
                work.clear()
                if sent == text:
                    await authenticate(conn, sent, pepper=PEPPER, now_ns=T0)
                else:
                    with pytest.raises(InvalidApiKeyError):
                        await authenticate(conn, sent, pepper=PEPPER, now_ns=T0)
                assert sorted(work) == ["compare 32 32", f"hmac {len(PEPPER) + 16 + 43}", "query"], sent

    asyncio.run(run())


def test_a_secret_is_shown_once_and_stored_never(sqlite_url: str) -> None:
    async def run() -> None:
        entropy = counting_entropy()
        async with opened(sqlite_url) as database, database.transaction() as conn:
            made = await populate(conn, entropy=entropy)
            key = await mint_key(
                conn, made.project_id, "second", ["usage", "inference"], pepper=PEPPER, entropy=entropy, now_ns=T0 + 1
            )
            secret = key.secret_text[20:]
            assert secret not in repr(key)
            assert secret not in await everything_stored(conn)
            first, second = await list_keys(conn, made.tenant_id)
            assert (first.key_id, second.key_id) == (made.key_id, key.key_id)
            assert second.scopes == {"usage", "inference"}
            assert secret not in repr(second)

    asyncio.run(run())


async def everything_stored(conn: AsyncConnection) -> str:
    return repr([tuple(row) for row in await conn.execute(select(tables.api_key))])


@pytest.mark.parametrize("scopes", [[], ["root"], ["inference", "inferense"]])
def test_only_known_scopes_are_given(sqlite_url: str, scopes: list[str]) -> None:
    async def run() -> None:
        entropy = counting_entropy()
        async with opened(sqlite_url) as database, database.transaction() as conn:
            made = await populate(conn, entropy=entropy)
            with pytest.raises(KeyScopeError):
                await mint_key(conn, made.project_id, "k", scopes, pepper=PEPPER, entropy=entropy, now_ns=T0)
            with pytest.raises(ValueError, match="later than now"):
                await mint_key(
                    conn, made.project_id, "k", ["usage"], pepper=PEPPER, entropy=entropy, now_ns=T0, expires_ns=T0
                )

    asyncio.run(run())
