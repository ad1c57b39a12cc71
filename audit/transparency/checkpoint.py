"""Checkpoints: the signed head of the log, as a C2SP signed note (signed-note, tlog-checkpoint, tlog-cosignature).

    example.com/log                  origin
    1024                             number of leaves
    CsUYapGGPo4dkMgI...              root, base64

    — example.com/log Az3grl...      Ed25519 over the three lines above
    — example.com/log 9kPq1x...      ML-DSA-44 over tlog-cosignature's cosigned_message (label "subtree/v1", start 0)

ML-DSA-44 needs no form of our own: tlog-checkpoint says that logs SHOULD sign by that cosignature, and its message
holds name, origin, size and root. There are no extension lines, which it would not cover.
"""

import base64
import binascii
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PublicKey

from audit.transparency.keyring import TYPE_ED25519, TYPE_MLDSA_COSIGNATURE, HybridSigner, key_id
from audit.transparency.merkle import HASH_BYTES

SIGNATURE_LINES_MAX = 32  # the log's two and room for witnesses
NOTE_BYTES_MAX = 256 * 1024


class NoteError(ValueError):
    """Not a note, or not signed as required; the message says which line or key."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    origin: str
    size: int  # number of leaves
    root: bytes

    def body(self) -> str:
        """The note text, with its final newline."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"


@dataclass(frozen=True, slots=True)
class SignatureLine:
    name: str
    key_id: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Note:
    body: str
    signatures: tuple[SignatureLine, ...]


@dataclass(frozen=True, slots=True)
class Verifier:
    """A public key in its role on checkpoints, read from vkey text."""

    name: str
    key_type: bytes
    public_key: bytes

    @classmethod
    def parse(cls, text: str) -> "Verifier":
        try:
            name, identifier, encoded = text.strip().split("+", 2)
            blob = base64.b64decode(encoded, validate=True)
        except ValueError as error:
            raise NoteError(f"not a verifier key: {text[:60]!r}") from error
        verifier = cls(name, blob[:1], blob[1:])
        if verifier.key_id.hex() != identifier:
            raise NoteError(f"the verifier key of {name} does not have the id {identifier}")
        if (blob[:1], len(blob)) not in ((TYPE_ED25519, 33), (TYPE_MLDSA_COSIGNATURE, 1313)):
            raise NoteError(f"the verifier key {name}+{identifier} has an unknown type")
        return verifier

    @property
    def key_id(self) -> bytes:
        return key_id(self.name, self.key_type, self.public_key)

    def verify(self, checkpoint: Checkpoint, signature: bytes) -> None:
        """Raises InvalidSignature."""
        if self.key_type == TYPE_ED25519:
            Ed25519PublicKey.from_public_bytes(self.public_key).verify(signature, checkpoint.body().encode())
            return
        if len(signature) < 8:
            raise InvalidSignature
        (timestamp,) = struct.unpack(">Q", signature[:8])
        message = cosigned_message(self.name, timestamp, checkpoint)
        MLDSA44PublicKey.from_public_bytes(self.public_key).verify(signature[8:], message)


def cosigned_message(name: str, timestamp_s: int, checkpoint: Checkpoint) -> bytes:
    """tlog-cosignature's message for ML-DSA-44; `timestamp_s` is POSIX seconds."""
    cosigner, origin = name.encode(), checkpoint.origin.encode()
    if not 0 < len(cosigner) < 256 or not 0 < len(origin) < 256:
        raise NoteError("a key name and an origin have 1 to 255 bytes")
    return (
        b"subtree/v1\n\0"
        + bytes([len(cosigner)])
        + cosigner
        + struct.pack(">Q", timestamp_s)
        + bytes([len(origin)])
        + origin
        + struct.pack(">QQ", 0, checkpoint.size)
        + checkpoint.root
    )


def sign_checkpoint(checkpoint: Checkpoint, signer: HybridSigner, *, now_ns: int) -> str:
    """The whole signed note."""
    timestamp_s = now_ns // 1_000_000_000
    classic = signer.ed25519.sign(checkpoint.body().encode())
    quantum = signer.mldsa.sign(cosigned_message(signer.name, timestamp_s, checkpoint))
    lines = (
        _line(signer.name, signer.ed25519_id, classic),
        _line(signer.name, signer.mldsa_id, struct.pack(">Q", timestamp_s) + quantum),
    )
    return f"{checkpoint.body()}\n{''.join(lines)}"


def _line(name: str, identifier: bytes, signature: bytes) -> str:
    return f"— {name} {base64.b64encode(identifier + signature).decode()}\n"


def parse_note(text: str) -> Note:
    """Split a signed note. Raises NoteError; nothing is verified yet."""
    if len(text) > NOTE_BYTES_MAX or any(ord(c) < 0x20 and c != "\n" for c in text):
        raise NoteError("not a signed note: too long, or control characters in it")
    body, separator, tail = text.rpartition("\n\n")
    if not separator or not tail.endswith("\n"):
        raise NoteError("not a signed note: no blank line before the signatures, or no final newline")
    lines = tail[:-1].split("\n")
    if len(lines) > SIGNATURE_LINES_MAX:
        raise NoteError(f"{len(lines)} signature lines; at most {SIGNATURE_LINES_MAX} are read")
    return Note(body + "\n", tuple(_parse_line(line) for line in lines))


def _parse_line(line: str) -> SignatureLine:
    parts = line.split(" ")
    if len(parts) != 3 or parts[0] != "—" or not parts[1] or "+" in parts[1]:
        raise NoteError(f"not a signature line: {line[:60]!r}")
    try:
        blob = base64.b64decode(parts[2], validate=True)
    except binascii.Error as error:
        raise NoteError(f"not base64 in the signature line of {parts[1]}") from error
    if len(blob) < 5 or base64.b64encode(blob).decode() != parts[2]:
        raise NoteError(f"the signature of {parts[1]} is too short or not canonical base64")
    return SignatureLine(parts[1], blob[:4], blob[4:])


def parse_checkpoint(body: str) -> Checkpoint:
    """The three lines of a checkpoint's text. Raises NoteError."""
    lines = body.split("\n")
    if len(lines) != 4 or lines[3] or not lines[0]:
        raise NoteError("a checkpoint has exactly three lines: origin, size, root")
    if not lines[1].isascii() or not lines[1].isdigit() or str(int(lines[1])) != lines[1]:
        raise NoteError(f"not a tree size: {lines[1][:40]!r}")
    try:
        root = base64.b64decode(lines[2], validate=True)
    except binascii.Error as error:
        raise NoteError("the root is not base64") from error
    if len(root) != HASH_BYTES:
        raise NoteError(f"a root has {HASH_BYTES} bytes, not {len(root)}")
    checkpoint = Checkpoint(lines[0], int(lines[1]), root)
    if checkpoint.body() != body:
        raise NoteError("the checkpoint is not in its canonical form")
    return checkpoint


def verify_checkpoint(text: str, verifiers: Iterable[Verifier]) -> Checkpoint:
    """The checkpoint, if every one of `verifiers` has signed it. Unknown signatures are ignored.

    Raises NoteError naming the key whose signature is missing or wrong.
    """
    note = parse_note(text)
    checkpoint = parse_checkpoint(note.body)
    checked = 0
    for verifier in verifiers:
        label = f"{verifier.name}+{verifier.key_id.hex()}"
        found = [s for s in note.signatures if (s.name, s.key_id) == (verifier.name, verifier.key_id)]
        if not found:
            raise NoteError(f"no signature by {label}")
        for line in found:
            try:
                verifier.verify(checkpoint, line.signature)
            except InvalidSignature as error:
                raise NoteError(f"wrong signature by {label}") from error
        checked += 1
    if not checked:
        raise NoteError("no key was given to verify against")
    return checkpoint
