"""Checkpoints, their keys and their golden vectors; a note of another implementation reads too."""

import base64
import json
import stat
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from audit import verify
from audit.transparency.checkpoint import (
    Checkpoint,
    NoteError,
    Verifier,
    parse_checkpoint,
    parse_note,
    sign_checkpoint,
    verify_checkpoint,
)
from audit.transparency.keyring import Keyring, KeyringError, key_id, load_keyring
from tests.audit import make_golden
from tests.audit.conftest import ORIGIN, seeded

NOW_NS = 1_795_458_000 * 10**9


def verifiers(keyring: Keyring) -> list[Verifier]:
    return [Verifier.parse(text) for text in keyring.log.vkeys()]


@given(size=st.integers(0, 2**63 - 1), root=st.binary(min_size=32, max_size=32))
def test_a_signed_checkpoint_reads_back(keyring: Keyring, size: int, root: bytes) -> None:
    checkpoint = Checkpoint(ORIGIN, size, root)
    note = sign_checkpoint(checkpoint, keyring.log, now_ns=NOW_NS)
    assert verify_checkpoint(note, verifiers(keyring)) == checkpoint
    keys = [k for text in keyring.log.vkeys() for k in verify.read_keys(text, pinned=True)]
    head, _ = verify.open_checkpoint(note.encode(), keys, "note")  # the second implementation agrees
    assert (head.origin, head.size, head.root) == (ORIGIN, size, root)


def test_golden_vectors(tmp_path: Path) -> None:
    golden = json.loads(make_golden.PATH.read_text("utf-8"))
    made = make_golden.make(tmp_path / "keys")
    assert made["public"] == golden["public"]
    assert parse_note(str(made["note"])).signatures[0] == parse_note(golden["note"]).signatures[0]  # Ed25519 repeats
    log_keys = [Verifier.parse(text) for text in golden["public"]["log"]]
    assert verify_checkpoint(golden["note"], log_keys) == make_golden.CHECKPOINT
    keys = [k for text in golden["public"]["report"] for k in verify.read_keys(text, pinned=True)]
    signatures = [
        (name, bytes.fromhex(identifier), base64.b64decode(entry["sig"]))
        for entry in json.loads(golden["envelope"])["signatures"]
        for name, _, identifier in [entry["keyid"].rpartition("+")]
    ]
    pae = b"DSSEv1 28 application/vnd.in-toto+json 15 " + make_golden.PAYLOAD
    name = f"{make_golden.ORIGIN}/report"
    assert len(verify._signers(keys, name, (verify.ED25519, verify.MLDSA_REPORT), signatures, pae, "golden")) == 2


def test_a_note_of_another_implementation_reads() -> None:
    """The example in the documentation of Go's golang.org/x/mod/sumdb/note."""
    key = base64.b64decode("ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW")
    note = parse_note(
        "If you think cryptography is the answer to your problem,\n"
        "then you don't know what your problem is.\n\n"
        "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
    )
    (line,) = note.signatures
    assert line.key_id == key_id("PeterNeumann", key[:1], key[1:]) == bytes.fromhex("c74f20a3")
    Ed25519PublicKey.from_public_bytes(key[1:]).verify(line.signature, note.body.encode())


def test_every_key_must_have_signed(keyring: Keyring, tmp_path: Path) -> None:
    other = load_keyring(tmp_path / "keys", origin=ORIGIN, entropy=seeded(99))
    note = sign_checkpoint(Checkpoint(ORIGIN, 1, b"r" * 32), keyring.log, now_ns=NOW_NS)
    with pytest.raises(NoteError, match="no signature by"):
        verify_checkpoint(note, verifiers(other))
    with pytest.raises(NoteError, match="no key"):
        verify_checkpoint(note, [])
    body, _, lines = note.rpartition("\n\n")
    for line in lines.splitlines():
        with pytest.raises(NoteError, match="no signature by"):
            verify_checkpoint(f"{body}\n\n{line}\n", verifiers(keyring))


def test_a_signature_does_not_pass_to_another_checkpoint(keyring: Keyring) -> None:
    one = sign_checkpoint(Checkpoint(ORIGIN, 1, b"r" * 32), keyring.log, now_ns=NOW_NS)
    for other in (Checkpoint(ORIGIN, 2, b"r" * 32), Checkpoint(ORIGIN, 1, b"s" * 32)):
        forged = other.body() + "\n" + one.rpartition("\n\n")[2]
        with pytest.raises(NoteError, match="wrong signature"):
            verify_checkpoint(forged, verifiers(keyring))
        for verifier, line in zip(verifiers(keyring), parse_note(forged).signatures, strict=True):
            with pytest.raises(InvalidSignature):
                verifier.verify(other, line.signature)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "a\n1\n",
        f"a\n01\n{base64.b64encode(b'r' * 32).decode()}\n",
        f"a\n-1\n{base64.b64encode(b'r' * 32).decode()}\n",
        f"a\n١\n{base64.b64encode(b'r' * 32).decode()}\n",
        f"\n1\n{base64.b64encode(b'r' * 32).decode()}\n",
        f"a\n1\n{base64.b64encode(b'r' * 31).decode()}\n",
        f"a\n1\n{base64.b64encode(b'r' * 32).decode()}\nextension\n",
        f"a\n1\n{base64.b64encode(b'r' * 32).decode()[:-2]}B=\n",
        "a\n1\nnot base64 at all\n",
    ],
)
def test_what_is_no_checkpoint_is_refused(body: str) -> None:
    with pytest.raises(NoteError):
        parse_checkpoint(body)


@pytest.mark.parametrize(
    "text",
    [
        "no signatures\n",
        "text\n\n— name\n",
        "text\n\n- name AAAAAAAA\n",
        "text\n\n— name AAAA\n",
        "text\n\n— name AAAAAAAA",
        "text\n\n— na+me AAAAAAAA\n",
        "te\txt\n\n— name AAAAAAAA\n",
        "text\n\n" + "— name AAAAAAAA\n" * 33,
        "x" * 300_000 + "\n\n— name AAAAAAAA\n",
    ],
)
def test_what_is_no_note_is_refused(text: str) -> None:
    with pytest.raises(NoteError):
        parse_note(text)


def test_keys_are_private_and_stay_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    first = load_keyring(folder, origin=ORIGIN, entropy=seeded(1))
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert load_keyring(folder, origin=ORIGIN, entropy=seeded(2)).public() == first.public()
    texts = [text for group in first.public().values() for text in group]
    assert len({text.split("+", 2)[2] for text in texts}) == 4  # no key has two uses

    (folder / "log_ed25519").chmod(0o644)
    with pytest.raises(KeyringError, match="can be read by others"):
        load_keyring(folder, origin=ORIGIN, entropy=seeded(1))
    (folder / "log_ed25519").chmod(0o600)
    (folder / "log_ed25519").write_bytes(b"short")
    with pytest.raises(KeyringError, match="5 bytes"):
        load_keyring(folder, origin=ORIGIN, entropy=seeded(1))


@pytest.mark.parametrize("origin", ["", "a b", "a+b", "a\n", "log/report", "x" * 201])
def test_an_origin_that_cannot_be_written_in_a_note_is_refused(tmp_path: Path, origin: str) -> None:
    with pytest.raises(KeyringError, match="cannot name a log"):
        load_keyring(tmp_path / "keys", origin=origin, entropy=seeded(1))


def test_verifier_keys_are_checked(keyring: Keyring) -> None:
    good = keyring.log.vkeys()[0]
    name, identifier, blob = good.split("+", 2)
    for bad in ("", "a+b", f"{name}+00000000+{blob}", f"other+{identifier}+{blob}", f"{name}+{identifier}+!!!"):
        with pytest.raises(NoteError):
            Verifier.parse(bad)
        with pytest.raises(verify.Failure):
            verify.read_keys(bad, pinned=True)
