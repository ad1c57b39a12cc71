"""Signing keys: created once in a folder that only its owner can read, and their public text form.

Two hybrid signers with keys of their own, so that no signature can be passed off as the other kind:

    log     signs checkpoints (note signatures)     key name = the log's origin
    report  signs report statements (DSSE)          key name = the log's origin + "/report"

Each signer holds an Ed25519 and an ML-DSA-44 key (FIPS 204, pure, empty context). A forger must break both.
The third secret is the key of the tenant pseudonyms; whoever holds it can link pseudonyms to tenant ids.

A verifier key ("vkey") is the C2SP signed-note text NAME+ID+BASE64(TYPE || KEY). ID is the first four bytes of
SHA-256(NAME LF TYPE KEY) in hex. TYPE is

    0x01               Ed25519 (signed-note)
    0x06               ML-DSA-44 cosignature (tlog-cosignature), used by the log's key on checkpoints
    0xff "dsse-ml-dsa-44" LF   our own: signed-note keeps 0xff for types without an assigned byte. Plain ML-DSA-44 over
                       DSSE's pre-authentication encoding; no C2SP type means that.
"""

import base64
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey

SEED_BYTES = 32
ORIGIN_BYTES_MAX = 200  # tlog-cosignature allows 255 bytes for a name; "/report" must fit too
TYPE_ED25519 = b"\x01"
TYPE_MLDSA_COSIGNATURE = b"\x06"
TYPE_MLDSA_DSSE = b"\xffdsse-ml-dsa-44\n"


class KeyringError(Exception):
    """A key file is damaged or readable by others; the message says what to do."""


@dataclass(frozen=True, slots=True)
class HybridSigner:
    name: str
    ed25519: Ed25519PrivateKey
    mldsa: MLDSA44PrivateKey
    mldsa_type: bytes

    @property
    def ed25519_id(self) -> bytes:
        return key_id(self.name, TYPE_ED25519, self.ed25519.public_key().public_bytes_raw())

    @property
    def mldsa_id(self) -> bytes:
        return key_id(self.name, self.mldsa_type, self.mldsa.public_key().public_bytes_raw())

    def vkeys(self) -> list[str]:
        """The public keys as vkey text: Ed25519, then ML-DSA-44."""
        return [
            vkey(self.name, TYPE_ED25519, self.ed25519.public_key().public_bytes_raw()),
            vkey(self.name, self.mldsa_type, self.mldsa.public_key().public_bytes_raw()),
        ]


@dataclass(frozen=True, slots=True)
class Keyring:
    log: HybridSigner
    report: HybridSigner
    pseudonym_key: bytes

    def public(self) -> Mapping[str, list[str]]:
        """What keys.json holds: {"log": [vkey, vkey], "report": [vkey, vkey]}."""
        return {"log": self.log.vkeys(), "report": self.report.vkeys()}


def key_id(name: str, key_type: bytes, public_key: bytes) -> bytes:
    """The four bytes that name a key in a signature line."""
    return hashlib.sha256(name.encode() + b"\n" + key_type + public_key).digest()[:4]


def vkey(name: str, key_type: bytes, public_key: bytes) -> str:
    text = base64.b64encode(key_type + public_key).decode()
    return f"{name}+{key_id(name, key_type, public_key).hex()}+{text}"


def load_keyring(folder: Path, *, origin: str, entropy: Callable[[int], bytes]) -> Keyring:
    """Read the keys in `folder`, creating those that do not exist yet (folder 0700, files 0600).

    `origin` is the log's name: no white space, no plus sign. Raises KeyringError for a damaged or exposed file.
    """
    if not origin or "+" in origin or any(c.isspace() or ord(c) < 0x20 for c in origin):
        raise KeyringError(f"{origin!r} cannot name a log: use something like example.com/log, no spaces, no '+'")
    if origin.endswith("/report") or len(origin.encode()) > ORIGIN_BYTES_MAX:
        raise KeyringError(
            f"{origin!r} cannot name a log: too long, or it ends in /report, which names the report's keys"
        )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def seed(name: str) -> bytes:
        return _load_or_create(folder / name, entropy)

    return Keyring(
        log=HybridSigner(
            origin,
            Ed25519PrivateKey.from_private_bytes(seed("log_ed25519")),
            MLDSA44PrivateKey.from_seed_bytes(seed("log_mldsa44")),
            TYPE_MLDSA_COSIGNATURE,
        ),
        report=HybridSigner(
            f"{origin}/report",
            Ed25519PrivateKey.from_private_bytes(seed("report_ed25519")),
            MLDSA44PrivateKey.from_seed_bytes(seed("report_mldsa44")),
            TYPE_MLDSA_DSSE,
        ),
        pseudonym_key=seed("pseudonym_key"),
    )


def _load_or_create(path: Path, entropy: Callable[[int], bytes]) -> bytes:
    try:
        mode = path.stat().st_mode
        seed = path.read_bytes()
    except FileNotFoundError:
        _create(path, entropy(SEED_BYTES))
        mode, seed = path.stat().st_mode, path.read_bytes()
    if mode & 0o077:
        raise KeyringError(f"{path} can be read by others: chmod 600 it, and treat the key as exposed")
    if len(seed) != SEED_BYTES:
        raise KeyringError(f"{path} holds {len(seed)} bytes instead of {SEED_BYTES}: restore it from a backup")
    return seed


def _create(path: Path, seed: bytes) -> None:
    """Write a whole key or none: a crash half-way leaves only a temporary file. The first creator wins."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(seed)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
