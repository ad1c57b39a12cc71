"""The registry of entries: canonical form, refusals, and that documentation and verifier know the same kinds."""

import json
import re
import sys
from pathlib import Path

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from audit import verify
from audit.transparency.commitment import commit, leaf_bytes, pseudonym
from audit.transparency.entry import INT64_MAX, KINDS, Entry, EntryError, canonical, is_decimal_field
from audit.transparency.entry_kind import SAFE_INT_MAX
from tests.audit.strategies import entries
from tests.audit.world import admitted

DOCS = Path(__file__).parents[2] / "docs" / "log-entries.md"
KEY_RULES: dict[str, object] = {"expires_ns": 0, "models": [], "networks": [], "tiers": []}
LETTERS = {"str": "s", "bool": "b", "list[str]": "l"}


@given(entries())
def test_a_body_survives_its_canonical_form(entry: Entry) -> None:
    read = json.loads(entry.canonical_body())
    assert read == {k: str(v) if is_decimal_field(k) else v for k, v in entry.body.items()}
    assert verify.canonical(read) == entry.canonical_body()  # the verifier's own encoder writes the same bytes
    assert list(read) == sorted(read)


@given(
    st.dictionaries(
        st.text(st.characters(codec="ascii"), max_size=8),
        st.text() | st.integers(-SAFE_INT_MAX, SAFE_INT_MAX) | st.booleans() | st.lists(st.text(), max_size=3),
        max_size=6,
    )
)
def test_the_canonical_form_is_the_standards(body: dict[str, str | int | bool | list[str]]) -> None:
    assert canonical(body) == rfc8785.dumps(body)


def test_every_character_is_written_as_the_standard_says() -> None:
    text = "".join(chr(number) for number in range(sys.maxunicode + 1) if not 0xD800 <= number <= 0xDFFF)
    assert canonical({"text": text}) == rfc8785.dumps({"text": text})


def bad_bodies() -> list[tuple[str, dict[str, object], str]]:
    good = dict(admitted("req_1").body)
    return [
        ("unknown.kind", good, "not a registered"),
        ("request.admitted", good | {"prompt": "hello"}, "unknown field 'prompt'"),
        ("request.admitted", {k: v for k, v in good.items() if k != "model"}, "missing model"),
        ("request.admitted", good | {"max_tokens": 1.0}, "must be an int, not float"),
        ("request.admitted", good | {"max_tokens": True}, "must be an int, not bool"),
        ("request.admitted", good | {"max_tokens": -1}, "outside 0"),
        ("request.admitted", good | {"max_tokens": SAFE_INT_MAX + 1}, "outside"),
        ("request.admitted", good | {"hold_nano_usd": INT64_MAX + 1}, "outside"),
        ("request.admitted", good | {"model": 7}, "must be a str"),
        ("request.admitted", good | {"model": "x" * 1025}, "at most 1024"),
        ("request.admitted", good | {"model": "\ud800"}, "UTF-8"),
        ("request.admitted", good | {"model": "a\0b"}, "UTF-8"),
        ("key.created", {"key_id": "k", "project_id": "p", "name": "n", **KEY_RULES, "scopes": "all"}, "list"),
        ("key.created", {"key_id": "k", "project_id": "p", "name": "n", **KEY_RULES, "scopes": [1]}, "must be a str"),
        (
            "key.created",
            {"key_id": "k", "project_id": "p", "name": "n", **KEY_RULES, "scopes": ["x"] * 1025},
            "at most 1024",
        ),
    ]


@pytest.mark.parametrize(("kind", "body", "message"), bad_bodies())
def test_what_does_not_fit_the_registry_is_refused(kind: str, body: dict[str, object], message: str) -> None:
    with pytest.raises(EntryError, match=message):
        Entry(kind, "ten_a", 1, body)  # type: ignore[arg-type]


def test_an_outcome_is_one_of_four() -> None:
    body = dict(KINDS_EXAMPLE)
    with pytest.raises(EntryError, match="'lost', not one of captured"):
        Entry("request.settled", "", 1, body | {"outcome": "lost"})


KINDS_EXAMPLE = {
    "request_id": "r",
    "finish_reason": "stop",
    "num_prompt_tokens": 1,
    "num_cached_tokens": 0,
    "num_completion_tokens": 1,
    "amount_nano_usd": 1,
}


def test_the_verifier_knows_the_same_registry() -> None:
    def letter(field_type: str, name: str) -> str:
        return LETTERS.get(field_type) or ("d" if is_decimal_field(name) else "i")

    ours = {k.name: {k.version: {f.name: letter(f.type, f.name) for f in k.fields}} for k in KINDS.values()}
    theirs = {
        name: {v: dict(text.split(":") for text in fields.split()) for v, fields in versions.items()}
        for name, versions in verify.KINDS.items()
    }
    assert {name: {max(versions): versions[max(versions)]} for name, versions in theirs.items()} == ours
    for name, versions in theirs.items():  # old leaves stay readable
        assert sorted(versions) == list(range(1, KINDS[name].version + 1))


def test_every_kind_is_documented_and_no_other() -> None:
    rows = re.findall(r"^\| `([a-z_.]+)` \| (\d+) \| (.*?) \| (.*?) \|$", DOCS.read_text("utf-8"), re.MULTILINE)
    documented = {
        name: (int(version), text, re.findall(r"`([a-z_0-9]+)`", fields)) for name, version, text, fields in rows
    }
    expected = {k.name: (k.version, k.description, [f.name for f in k.fields]) for k in KINDS.values()}
    assert documented == expected


def test_a_commitment_hides_and_binds() -> None:
    body = admitted("req_1").canonical_body()
    one, two = commit(b"\1" * 32, body), commit(b"\2" * 32, body)
    assert one != two
    assert commit(b"\1" * 32, body + b" ") != one
    with pytest.raises(ValueError, match="32 bytes"):
        commit(b"short", body)


def test_a_leaf_holds_no_name_and_no_content() -> None:
    tenant = pseudonym(b"k" * 32, "ten_secret")
    leaf = leaf_bytes(kind="key.revoked", version=1, at_ns=5, tenant=tenant, commitment="00")
    assert leaf == b'{"at_ns":"5","commitment":"00","kind":"key.revoked","tenant":"%s","v":1}' % tenant.encode()
    assert pseudonym(b"k" * 32, "") == ""
    assert pseudonym(b"l" * 32, "ten_secret") != tenant
