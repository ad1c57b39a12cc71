"""Bulkhead's offline verifier: one file, the Python standard library and `cryptography` (50 or later), no access to us.

    python verify.py log FOLDER [--key VKEY]... [--since-checkpoint FILE]
    python verify.py report FILE.dsse.json [--log FOLDER] [--key VKEY]...

VKEY is a verifier key NAME+ID+BASE64, or a file that holds some (keys.json will do). Get it from someone you trust, not
from where you got the log. Exit status: 0 everything that was checked holds, 1 something does not, 2 nothing could be
checked (wrong usage, missing files). Everything that the run could not prove is listed at the end; read that part too.

What is checked, by number:

    Log     (1) keys: well formed, their ids match; pinned by you or only found beside the log
            (2) checkpoint: canonical form, signed by the log's Ed25519 key and by its ML-DSA-44 key (both must hold)
            (3) leaves: bundles are whole, indexes dense from 0 to size - 1, every leaf in canonical form
            (4) tree: leaves hash to level 0 tiles, full tiles to the level above, and all of it to the signed root
            (5) registry: every kind and version is known, its fields have the right names and types
            (6) openings: each opens its leaf's commitment; a missing one is named by an erasure receipt in the log
            (7) history: an earlier checkpoint, when given, is signed and is a prefix of this log
            (8) requests: admitted before settled, settled at most once, never above the hold; nothing charged when void
            (9) heartbeats: counters of an epoch never fall
    Report (10) envelope: DSSE form, signed by the report's Ed25519 key and by its ML-DSA-44 key (both must hold)
           (11) subject: the checkpoint inside is signed by the log, and is the subject of the statement
           (12) log: with --log, checks (1) to (9), and the report's checkpoint is a prefix of that log
           (13) figures: with --log, every figure is counted again from the opened leaves and compared

This file deliberately shares no code with the program that it checks. Formats: docs/log-entries.md, docs/report.md.
"""

import argparse
import base64
import hashlib
import hmac
import json
import os
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PublicKey

ED25519, MLDSA_LOG, MLDSA_REPORT = "Ed25519", "ML-DSA-44 (checkpoint)", "ML-DSA-44 (report)"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPES = {  # version 1 had no refunds and adjustments among its money figures, version 2 no sampled checks
    f"https://bulkhead.dev/attestation/isolation-report/v{version}": version for version in (1, 2, 3)
}

# The registry, as kind -> version -> fields. s text, i number, d number as decimal text, b truth value, l list of text.
KINDS: dict[str, dict[int, str]] = {
    "gateway.started": {1: "version:s"},
    "gateway.stopped": {1: "reason:s"},
    "worker.started": {1: "epoch:s model_id:s model_digest:s isolation:s kernels:s"},
    "worker.lost": {1: "epoch:s reason:s"},
    "request.admitted": {
        1: "request_id:s key_id:s model:s price_id:s num_prompt_tokens:i max_tokens:i hold_nano_usd:d"
    },
    "request.settled": {
        1: "request_id:s finish_reason:s num_prompt_tokens:i num_cached_tokens:i num_completion_tokens:i "
        "amount_nano_usd:d outcome:s"
    },
    "request.replayed": {1: "request_id:s original_request_id:s key_id:s"},
    "tenant.created": {1: "organisation_id:s name:s", 2: "organisation_id:s name:s currency:s"},
    "tenant.status_changed": {1: "status:s reason:s"},
    "tenant.deleted": {1: "name:s reason:s num_keys_revoked:i credit_nano_usd:d"},
    "key.created": {
        1: "key_id:s project_id:s name:s scopes:l",
        2: "key_id:s project_id:s name:s scopes:l expires_ns:d models:l networks:l",
        3: "key_id:s project_id:s name:s scopes:l expires_ns:d models:l networks:l tiers:l",
    },
    "key.rotated": {1: "key_id:s old_key_id:s project_id:s old_expires_ns:d expires_ns:d"},
    "key.revoked": {1: "key_id:s reason:s"},
    "price.added": {
        1: "price_id:s model:s input_pico_usd:i cached_input_pico_usd:i output_pico_usd:i request_nano_usd:d "
        "effective_from_ns:d",
        2: "price_id:s model:s input_pico_usd:i cached_input_pico_usd:i output_pico_usd:i request_nano_usd:d "
        "effective_from_ns:d tier:s currency:s flex_percent:i batch_percent:i priority_percent:i steps:l",
    },
    "price.drafted": {1: "draft_id:s model:s tier:s"},
    "price.discarded": {1: "draft_id:s model:s tier:s"},
    "price.withdrawn": {1: "price_id:s model:s tier:s currency:s reason:s effective_from_ns:d"},
    "credit.limit_set": {1: "transfer_id:s reason:s limit_nano_usd:d"},
    "invoice.issuer_set": {1: "issuer_id:s number_prefix:s name:s tax_id:s payment_days:i"},
    "invoice.buyer_set": {1: "issuer_id:s name:s tax_id:s tax_rate_bp:i terms:s"},
    "invoice.drafted": {1: "invoice_id:s corrects_id:s invoice_kind:s since_ns:d until_ns:d"},
    "invoice.issued": {
        1: "invoice_id:s number:s document_sha256:s currency:s invoice_kind:s net_minor:i tax_minor:i due_minor:i "
        "due_ns:d"
    },
    "invoice.payment": {1: "invoice_id:s payment_id:s reference:s amount_minor:i open_minor:i"},
    "invoice.paid": {1: "invoice_id:s reference:s"},
    "invoice.voided": {1: "invoice_id:s reason:s"},
    "books.reconciled": {1: "since_ns:d until_ns:d num_requests:i num_unwitnessed:i num_differences:i differences:l"},
    "credit.granted": {
        1: "transfer_id:s memo:s amount_nano_usd:d",
        2: "transfer_id:s memo:s amount_nano_usd:d credit_kind:s expires_ns:d",
    },
    "credit.expired": {1: "transfer_id:s credit_kind:s amount_nano_usd:d expires_ns:d"},
    "credit.refunded": {1: "transfer_id:s request_id:s reason:s amount_nano_usd:d"},
    "credit.adjusted": {1: "transfer_id:s corrects_id:s reason:s direction:s amount_nano_usd:d"},
    "limits.changed": {
        1: "scope_kind:s scope_id:s requests_per_minute:i tokens_per_minute:i concurrency_max:i",
        2: "scope_kind:s scope_id:s requests_per_minute:i tokens_per_minute:i concurrency_max:i weight:i",
        3: "scope_kind:s scope_id:s requests_per_minute:i tokens_per_minute:i concurrency_max:i weight:i "
        "tokens_per_day:i shadow:l",
    },
    "limit.would_refuse": {1: "request_id:s scope_id:s limit_name:s"},
    "budget.set": {1: "scope_kind:s scope_id:s period:s hard:b limit_nano_usd:d"},
    "budget.removed": {1: "scope_kind:s scope_id:s period:s hard:b"},
    "budget.alert": {
        1: "scope_kind:s scope_id:s period:s hard:b threshold_percent:i used_nano_usd:d limit_nano_usd:d "
        "period_start_ns:d"
    },
    "audit.heartbeat": {
        1: "epoch:s num_steps:i num_slots_checked:i num_violations:i num_self_tests:i last_self_test_ok:b",
        2: "epoch:s num_steps:i num_slots_checked:i num_violations:i num_self_tests:i last_self_test_ok:b "
        "slots_per_step:i num_slots_read:i replay_percent:i num_sequences:i num_replays:i num_replays_differing:i "
        "num_canaries:i",
    },
    "isolation.violation": {1: "epoch:s rule:s detail:s step:i block_id:i sequence_ids:l domains:l"},
    "cache.erased": {1: "epoch:s num_blocks:i"},
    "policy.changed": {1: "mode:s slice_percent:i requests_per_minute:i tokens_per_minute:i concurrency_max:i"},
    "quota.lost": {1: "reason:s"},
    "quota.back": {1: "lost_ns:d num_admitted_lease:i num_admitted_open:i num_refused:i"},
    "quota.rebuilt": {1: "organisation_id:s reason:s num_scopes:i num_open:i"},
    "project.created": {1: "project_id:s name:s"},
    "webhook.added": {1: "endpoint_id:s host:s kinds:l"},
    "webhook.removed": {1: "endpoint_id:s reason:s"},
    "webhook.resent": {1: "endpoint_id:s delivery_id:s"},
    "webhook.given_up": {1: "endpoint_id:s delivery_id:s event_kind:s reason:s log_index:i num_attempts:i"},
    "operator.created": {1: "name:s"},
    "operator.disabled": {1: "name:s reason:s"},
    "operator.logged_in": {1: "name:s"},
    "operator.logged_out": {1: "name:s"},
    "operator.login_failed": {1: "name:s"},
    "operator.token_created": {1: "token_id:s operator:s name:s read_only:b expires_ns:d"},
    "operator.token_revoked": {1: "token_id:s operator:s reason:s"},
    "operator.request": {1: "operator:s token_id:s request_id:s route:s subject:s"},
    "report.issued": {1: "name:s statement_sha256:s since_ns:d until_ns:d"},
    "opening.erased": {1: "reason:s leaf_indexes:l"},
}
OUTCOMES = ("captured", "voided", "expired", "recovered")


class Failure(Exception):
    """A check failed; the message names the place."""


class Unusable(Exception):
    """Nothing can be checked: a file is missing or an argument is wrong."""


@dataclass
class Findings:
    """What a run found, in order."""

    passed: list[tuple[int, str]] = field(default_factory=list)
    failed: list[tuple[int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    keys: list["Key"] = field(default_factory=list)  # whose signatures held
    not_proven: list[str] = field(default_factory=list)

    def run(self, number: int, check: Callable[[], str]) -> bool:
        """Run one check; it returns what it saw or raises Failure."""
        try:
            self.passed.append((number, check()))
        except Failure as failure:
            self.failed.append((number, str(failure)))
            return False
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            self.failed.append((number, f"malformed data: {type(error).__name__}: {error}"))
            return False
        return True

    @property
    def ok(self) -> bool:
        return bool(self.passed) and not self.failed


@dataclass(frozen=True)
class Key:
    name: str
    kind: str  # ED25519, MLDSA_LOG or MLDSA_REPORT
    key_id: bytes
    raw: bytes
    pinned: bool
    fingerprint: str  # sha256 of the verifier key's text

    @property
    def label(self) -> str:
        return f"{self.name}+{self.key_id.hex()} {self.kind}"


@dataclass(frozen=True)
class Leaf:
    index: int
    kind: str
    version: int
    at_ns: int
    tenant: str
    commitment: str
    body: dict[str, Any] | None = None  # None: erased, or no openings at hand


@dataclass(frozen=True)
class Head:
    origin: str
    size: int
    root: bytes
    body: bytes


@dataclass
class Log:
    """A log as far as it has been checked."""

    folder: str
    findings: Findings
    keys: list[Key] = field(default_factory=list)
    head: Head | None = None
    raw_leaves: list[bytes] = field(default_factory=list)
    leaves: list[Leaf] = field(default_factory=list)
    receipts: dict[int, int] = field(default_factory=dict)  # erased leaf -> the leaf that says so


# ---------------------------------------------------------------- the log


def verify_log(folder: str, key_texts: Sequence[str] = (), since_checkpoint: str | None = None) -> Log:
    """Checks (1) to (9). Raises Unusable when there is no checkpoint. A log that grows meanwhile is read again."""
    for _ in range(3):
        before = _read(folder, "checkpoint")
        log = _verify_log_once(folder, before, key_texts, since_checkpoint)
        if log.findings.ok or _read(folder, "checkpoint") == before:
            break
    return log


def _verify_log_once(folder: str, note: bytes, key_texts: Sequence[str], since_checkpoint: str | None) -> Log:
    log = Log(folder, Findings())
    run = log.findings.run
    steps: list[tuple[int, Callable[[], str]]] = [
        (1, lambda: _check_keys(log, key_texts)),
        (2, lambda: _check_head(log, note)),
        (3, lambda: _check_leaves(log)),
        (4, lambda: _check_tree(log)),
        (5, lambda: _check_registry(log)),
        (6, lambda: _check_openings(log)),
        (7, lambda: _check_history(log, since_checkpoint)),
        (8, lambda: _check_requests(log)),
        (9, lambda: _check_heartbeats(log)),
    ]
    for number, step in steps:
        if not run(number, step) and number <= 6:
            log.findings.notes.append(f"the checks after ({number}) were not made: they would rest on what failed")
            break
    log.findings.not_proven += [
        "that everything that happened was logged: a log shows that what it holds is unchanged, not that it is all",
        "the times: they come from the operator's clock",
        "that everyone is shown this same log: compare checkpoints with others, no outside witness has signed this one",
    ]
    return log


def _check_keys(log: Log, key_texts: Sequence[str]) -> str:
    # (1) Keys: pinned ones first, those found beside the log only for a type that was not pinned.
    pinned = [k for text in key_texts for k in read_keys(text, pinned=True)]
    path = os.path.join(log.folder, "keys.json")
    found = read_keys(path, pinned=False) if os.path.exists(path) else []
    log.keys = merge_keys(pinned, found)
    return f"{len(log.keys)} keys, {len(pinned)} pinned"


def _check_head(log: Log, note: bytes) -> str:
    # (2) Checkpoint: form and both signatures.
    head, signers = open_checkpoint(note, log.keys, "checkpoint")
    if loose := unpinned(signers):
        log.findings.not_proven.append(f"whose log this is: {loose}")
    log.head, log.findings.keys = head, signers
    return f"checkpoint of {head.origin}, {head.size} leaves, signed by {' and '.join(k.label for k in signers)}"


def _check_leaves(log: Log) -> str:
    # (3) Leaves: every bundle whole, no index missing, canonical form.
    size = _head(log).size
    for n in range((size + 255) // 256):
        width = min(256, size - n * 256)
        name, blob = _read_tile(log.folder, "entries", n, width)
        position = 0
        for i in range(width):
            length = int.from_bytes(blob[position : position + 2], "big")
            raw = blob[position + 2 : position + 2 + length]
            if len(blob) < position + 2 or len(raw) != length:
                raise Failure(f"{name}: leaf {n * 256 + i} is cut off")
            log.raw_leaves.append(raw)
            log.leaves.append(_parse_leaf(raw, n * 256 + i, name))
            position += 2 + length
        if position != len(blob) and name == _tile_name("entries", n, width):
            raise Failure(f"{name}: {len(blob) - position} bytes after the last leaf")
    return f"{size} leaves, indexes dense from 0"


def _check_tree(log: Log) -> str:
    # (4) Tree: leaf hashes are the level 0 tiles, full tiles give the level above, everything gives the root.
    head = _head(log)
    hashes = [hashlib.sha256(b"\x00" + raw).digest() for raw in log.raw_leaves]
    level, row, num_tiles = 0, hashes, 0
    while row:
        for n in range((len(row) + 255) // 256):
            part = row[n * 256 : n * 256 + 256]
            name, blob = _read_tile(log.folder, str(level), n, len(part))
            length = 32 * len(part) if name == _tile_name(str(level), n, len(part)) else 32 * 256
            if blob[: 32 * len(part)] != b"".join(part) or len(blob) != length:
                raise Failure(f"{name}: not the hashes of the level below")
            num_tiles += 1
        row = [_root(row[n * 256 : n * 256 + 256]) for n in range(len(row) // 256)]
        level += 1
    if _root(hashes) != head.root:
        raise Failure(f"the leaves do not give the signed root of {head.size} leaves")
    return f"{len(hashes)} leaf hashes, {num_tiles} tiles, and the signed root"


def _check_registry(log: Log) -> str:
    # (5) Registry: kinds and versions that this file knows.
    for leaf in log.leaves:
        if leaf.version not in KINDS.get(leaf.kind, {}):
            raise Failure(f"leaf {leaf.index}: kind {leaf.kind!r} version {leaf.version} is unknown to this verifier")
    return f"{len({leaf.kind for leaf in log.leaves})} kinds, all known"


def _check_openings(log: Log) -> str:
    # (6) Openings: commitment, fields, and a receipt for each one that is missing.
    if not os.path.isdir(os.path.join(log.folder, "openings")):
        log.findings.not_proven.append("any content: the openings are not here, only commitments were checked")
        return "no openings at hand"
    opened: dict[int, dict[str, Any]] = {}
    for n in range((len(log.leaves) + 255) // 256):
        name = f"openings/{_index_path(n)}.jsonl"
        last = n * 256 - 1
        for number, line in enumerate(_lines(_read(log.folder, name, Failure), name), 1):
            place = f"{name} line {number}"
            index, nonce, body = _parse_opening(line, place)
            if not max(last + 1, n * 256) <= index < n * 256 + 256:
                raise Failure(f"{place}: index {index} is out of order or in the wrong file")
            last = index
            if index >= len(log.leaves):
                continue  # the log has moved on since its checkpoint was read
            leaf = log.leaves[index]
            raw = canonical(body)
            made = hmac.new(nonce, b"bulkhead/commitment/v1\0" + raw, hashlib.sha256).hexdigest()
            if not hmac.compare_digest(made, leaf.commitment):
                raise Failure(f"{place}: does not open the commitment of leaf {index} ({leaf.kind})")
            _check_fields(body, KINDS[leaf.kind][leaf.version], f"leaf {index} ({leaf.kind})")
            opened[index] = body
    receipts = log.receipts = {
        int(text): leaf.index
        for leaf in log.leaves
        if leaf.kind == "opening.erased"
        for text in opened.get(leaf.index, {}).get("leaf_indexes", [])
        if text.isascii() and text.isdigit()
    }
    for leaf in log.leaves:
        if leaf.index not in opened and leaf.index not in receipts:
            raise Failure(
                f"leaf {leaf.index} ({leaf.kind}): its opening is missing and no receipt says that it was erased"
            )
        if leaf.index in opened and receipts.get(leaf.index, 0) > leaf.index and leaf.kind != "opening.erased":
            raise Failure(
                f"leaf {leaf.index}: receipt {receipts[leaf.index]} says it was erased, but its opening is here"
            )
    log.leaves = [
        Leaf(x.index, x.kind, x.version, x.at_ns, x.tenant, x.commitment, opened.get(x.index)) for x in log.leaves
    ]
    erased = len(log.leaves) - len(opened)
    if erased:
        log.findings.not_proven.append(f"the content of {erased} erased leaves: only that they existed, and when")
    return f"{len(opened)} openings match their commitments, {erased} are erased with a receipt"


def _check_history(log: Log, since_checkpoint: str | None) -> str:
    # (7) History: the earlier head must be what the first leaves of this log give.
    if since_checkpoint is None:
        log.findings.not_proven.append(
            "that history was not rewritten by the key's owner: pass --since-checkpoint with a checkpoint you kept"
        )
        return "no earlier checkpoint given"
    try:
        with open(since_checkpoint, "rb") as file:
            note = file.read()
    except OSError as error:
        raise Unusable(f"{since_checkpoint}: {error.strerror}") from error
    return _check_prefix(log, open_checkpoint(note, log.keys, since_checkpoint)[0], since_checkpoint)


def _check_prefix(log: Log, old: Head, place: str) -> str:
    head = _head(log)
    if old.origin != head.origin:
        raise Failure(f"{place}: is of {old.origin}, this log is {head.origin}")
    if old.size > head.size:
        raise Failure(f"{place}: has {old.size} leaves, this log only {head.size}: it was cut back")
    if _root([hashlib.sha256(b"\x00" + raw).digest() for raw in log.raw_leaves[: old.size]]) != old.root:
        raise Failure(f"{place}: the first {old.size} leaves of this log give another root: history was rewritten")
    return f"the checkpoint of {old.size} leaves is a prefix of this log"


def _check_requests(log: Log) -> str:
    # (8) Requests: a small ledger of its own over the opened leaves.
    holds: dict[str, tuple[int, str]] = {}
    settled: dict[str, int] = {}
    erased = any(leaf.body is None for leaf in log.leaves if leaf.kind == "request.admitted")
    for leaf, body in _opened(log.leaves, "request.admitted", "request.settled"):
        request, place = body["request_id"], f"leaf {leaf.index} (request {body['request_id']})"
        if leaf.kind == "request.admitted":
            if request in holds:
                raise Failure(f"{place}: admitted twice")
            holds[request] = int(body["hold_nano_usd"]), leaf.tenant
            continue
        if request in settled:
            raise Failure(f"{place}: settled twice, first at leaf {settled[request]}")
        settled[request] = leaf.index
        amount = int(body["amount_nano_usd"])
        if body["num_cached_tokens"] > body["num_prompt_tokens"]:
            raise Failure(f"{place}: more cached than prompt tokens")
        if body["outcome"] in ("voided", "expired") and amount:
            raise Failure(f"{place}: {body['outcome']}, but {amount} nano-USD are charged")
        if request not in holds:
            if erased:
                continue
            raise Failure(f"{place}: settled but never admitted")
        if amount > holds[request][0]:
            raise Failure(f"{place}: charges {amount} nano-USD, above its hold of {holds[request][0]}")
        if leaf.tenant != holds[request][1]:
            raise Failure(f"{place}: settled for another tenant than it was admitted for")
    return f"{len(holds)} admitted, {len(settled)} settled, {len(holds.keys() - settled.keys())} open"


def _check_heartbeats(log: Log) -> str:
    # (9) Heartbeats: totals of an epoch only grow.
    last: dict[str, tuple[int, dict[str, Any]]] = {}
    for leaf, body in _opened(log.leaves, "audit.heartbeat"):
        before = last.get(body["epoch"])
        for name in (*_COUNTERS, *_SAMPLED):
            if before and body.get(name, 0) < before[1].get(name, 0):
                raise Failure(f"leaf {leaf.index}: {name} of epoch {body['epoch']} fell since leaf {before[0]}")
        last[body["epoch"]] = leaf.index, body
    counted = sum(body["num_violations"] for _, body in last.values())
    entries = sum(leaf.kind == "isolation.violation" for leaf in log.leaves)
    if counted or entries:
        log.findings.notes.append(f"ISOLATION VIOLATIONS: {entries} logged, {counted} counted by the auditor")
    num = sum(leaf.kind == "audit.heartbeat" for leaf in log.leaves)
    return f"{num} heartbeats of {len(last)} epochs, {counted} violations counted"


# ---------------------------------------------------------------- the report


def verify_report(path: str, log_folder: str | None = None, key_texts: Sequence[str] = ()) -> Findings:
    """Checks (10) to (13). Raises Unusable when the report cannot be read."""
    raw = _read("", path)
    findings = Findings()
    log = verify_log(log_folder, key_texts) if log_folder is not None else None
    report: dict[str, Any] = {}

    def envelope() -> str:
        # (10) Envelope and signatures.
        body, statement, signatures = _open_envelope(raw, path)
        predicate = statement["predicate"]
        carried = [k for texts in predicate["keys"].values() for t in texts for k in read_keys(t, pinned=False)]
        pinned = [k for text in key_texts for k in read_keys(text, pinned=True)]
        report.update(statement=statement, keys=merge_keys(pinned, log.keys if log else [], carried))
        pae = b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(body), body)
        name = predicate["log"]["origin"] + "/report"
        signers = _signers(report["keys"], name, (ED25519, MLDSA_REPORT), signatures, pae, path)
        findings.keys += signers
        if loose := unpinned(signers):
            findings.not_proven.append(f"who issued the report: {loose}")
        return f"statement of {len(body)} bytes, sha256 {hashlib.sha256(body).hexdigest()}, signed by " + " and ".join(
            k.label for k in signers
        )

    def subject() -> str:
        # (11) Subject: the checkpoint, signed by the log.
        statement = report["statement"]
        predicate = statement["predicate"]
        head, signers = open_checkpoint(
            predicate["log"]["checkpoint"].encode(), report["keys"], f"{path} log.checkpoint"
        )
        expected = [{"name": f"{head.origin}@{head.size}", "digest": {"sha256": hashlib.sha256(head.body).hexdigest()}}]
        if statement["subject"] != expected:
            raise Failure(f"{path} subject: is not the checkpoint of {head.size} leaves that the report carries")
        stated = {"origin": head.origin, "num_leaves": head.size, "root": base64.b64encode(head.root).decode()}
        if {name: predicate["log"][name] for name in stated} != stated:
            raise Failure(f"{path} log: origin, size or root differ from the checkpoint")
        if log is None and (loose := unpinned(signers)):
            findings.not_proven.append(f"whose log the report speaks of: {loose}")
        findings.keys += signers
        report["head"] = head
        return f"log head {head.origin} at {head.size} leaves, signed by {' and '.join(k.label for k in signers)}"

    def with_log() -> str:
        # (12) Log: whole and extending the report's head.
        assert_log = log if log is not None else Log("", Findings())
        if not assert_log.findings.ok:
            raise Failure(
                "the log does not verify: " + "; ".join(f"({n}) {text}" for n, text in assert_log.findings.failed)
            )
        return f"{len(assert_log.findings.passed)} log checks hold; " + _check_prefix(assert_log, report["head"], path)

    def figures() -> str:
        # (13) Figures: counted again.
        leaves = log.leaves[: report["head"].size] if log is not None else []
        predicate = report["statement"]["predicate"]
        counted = count_figures(leaves, predicate["scope"], PREDICATE_TYPES[report["statement"]["predicateType"]])
        differences = list(_differences(predicate["figures"], counted, "figures"))
        late = sum(x.body is None and log.receipts.get(x.index, 0) >= len(leaves) for x in leaves) if log else 0
        if differences and late:
            findings.not_proven.append(
                f"these figures: {late} leaves were erased after the report was issued, and that may or may not be why "
                f"they cannot be counted again: {'; '.join(differences)}"
            )
            return f"{len(differences)} figures differ after {late} later erasures and are listed as not proven"
        if differences:
            raise Failure("; ".join(differences[:10]))
        return f"{sum(1 for _ in _scalars(counted))} figures counted again from the log, all equal"

    if findings.run(10, envelope) and findings.run(11, subject):
        if log is None:
            findings.not_proven.append(
                "every figure in the report: pass --log FOLDER (with openings) to count them again"
            )
        elif findings.run(12, with_log):
            if any(leaf.body is not None for leaf in log.leaves) or not log.leaves:
                findings.run(13, figures)
            else:
                findings.not_proven.append("every figure in the report: the log was given without its openings")
        findings.not_proven += [
            "tenant names, declared exclusions, control mappings and other plain text: they are the operator's words",
            "isolation outside of what the auditor sees: its scope and limits are part of the report",
        ]
    if log is not None:
        findings.notes += log.findings.notes
        findings.not_proven += [text for text in log.findings.not_proven if not text.startswith("that history")]
    return findings


def count_figures(leaves: Sequence[Leaf], scope: dict[str, Any], version: int = 3) -> dict[str, Any]:
    """Every figure of a report, from leaves with their openings. Definitions: docs/report.md."""
    since, until, gap_max = (int(scope[name]) for name in ("since_ns", "until_ns", "heartbeat_gap_max_ns"))
    period = [leaf for leaf in leaves if since <= leaf.at_ns < until]
    by_kind: dict[str, int] = {}
    for leaf in period:
        by_kind[leaf.kind] = by_kind.get(leaf.kind, 0) + 1
    tenants: dict[str, dict[str, int]] = {}
    outcomes = dict.fromkeys(OUTCOMES, 0)
    settled_ever = {body["request_id"] for _, body in _opened(leaves, "request.settled")}
    open_requests = 0
    money_names: tuple[str, ...] = ("charged_nano_usd", "granted_nano_usd")
    if version > 1:
        money_names += ("refunded_nano_usd", "adjusted_nano_usd", "expired_nano_usd")

    def tenant(leaf: Leaf) -> dict[str, int]:
        names = ("num_admitted", "num_settled", *_TOKENS, *money_names)
        return tenants.setdefault(leaf.tenant, dict.fromkeys(names, 0))

    for leaf, body in _opened(period, "request.admitted"):
        tenant(leaf)["num_admitted"] += 1
        open_requests += body["request_id"] not in settled_ever
    for leaf, body in _opened(period, "request.settled"):
        row = tenant(leaf)
        row["num_settled"] += 1
        for name in _TOKENS:
            row[name] += body[name]
        row["charged_nano_usd"] += int(body["amount_nano_usd"])
        outcomes[body["outcome"]] += 1
    for leaf, body in _opened(period, "credit.granted"):
        tenant(leaf)["granted_nano_usd"] += int(body["amount_nano_usd"])
    others = ("credit.refunded", "credit.adjusted", "credit.expired") if version > 1 else ()
    for leaf, body in (found for kind in others for found in _opened(period, kind)):
        sign = -1 if body.get("direction") == "take" else 1
        tenant(leaf)[leaf.kind.removeprefix("credit.") + "_nano_usd"] += sign * int(body["amount_nano_usd"])
    totals = {name: sum(row[name] for row in tenants.values()) for name in ("num_admitted", "num_settled", *_TOKENS)}
    incidents = [
        {
            "leaf_index": leaf.index,
            "at_ns": str(leaf.at_ns),
            "tenant": leaf.tenant,
            **{name: body[name] for name in ("epoch", "step", "rule", "block_id", "detail")},
            "num_sequences": len(body["sequence_ids"]),
        }
        for leaf, body in _opened(period, "isolation.violation")
    ]
    coverage = _count_coverage(leaves, since, until, gap_max, _COUNTERS + (_SAMPLED if version > 2 else ()))
    return {
        "leaves": {
            "in_log": len(leaves),
            "in_period": len(period),
            "opened": sum(leaf.body is not None for leaf in period),
            "erased": sum(leaf.body is None for leaf in period),
            "by_kind": by_kind,
        },
        "requests": {**totals, **outcomes, "open": open_requests},
        "money": {name: str(sum(row[name] for row in tenants.values())) for name in money_names},
        "tenants": [
            {"tenant": name, **{k: str(v) if k.endswith("_nano_usd") else v for k, v in row.items()}}
            for name, row in sorted(tenants.items())
        ],
        "coverage": coverage,
        "incidents": incidents,
        "access": {
            name: by_kind.get(kind, 0)
            for name, kind in (
                ("operators_created", "operator.created"),
                ("logins", "operator.logged_in"),
                ("logins_failed", "operator.login_failed"),
                ("keys_created", "key.created"),
                ("keys_revoked", "key.revoked"),
                ("limits_changed", "limits.changed"),
            )
        },
        "verdict": _verdict(
            coverage, incidents, by_kind.get("isolation.violation", 0), totals["num_completion_tokens"]
        ),
    }


_TOKENS = ("num_prompt_tokens", "num_cached_tokens", "num_completion_tokens")
_COUNTERS = ("num_steps", "num_slots_checked", "num_violations", "num_self_tests")
_SAMPLED = ("num_slots_read", "num_sequences", "num_replays", "num_replays_differing", "num_canaries")


def _count_coverage(
    leaves: Sequence[Leaf], since: int, until: int, gap_max: int, counters: tuple[str, ...]
) -> dict[str, Any]:
    kinds = ("gateway.started", "gateway.stopped", "worker.started", "worker.lost", "audit.heartbeat")
    events = sorted(
        ((x.at_ns, x.index, x.kind, b) for x, b in _opened(leaves, *kinds) if x.at_ns < until), key=lambda e: e[:2]
    )
    end = min(until, max((leaf.at_ns for leaf in leaves), default=since))
    gaps: list[tuple[int, int, str]] = []
    spans: list[tuple[int, int]] = []
    up: int | None = None  # since when a worker runs
    seen = 0  # when it was last heard
    workers: list[tuple[int, dict[str, Any]]] = []

    def silence(now: int, reason: str) -> None:
        if now - seen > gap_max:
            gaps.append((seen, now, reason))

    for at, _, kind, body in events:
        if kind == "audit.heartbeat":
            if up is None:
                up = seen = at
            silence(at, "no_heartbeat")
            if not body["last_self_test_ok"]:
                gaps.append((seen, at, "self_test_failed"))
            seen = at
            continue
        if up is not None:
            silence(at, "unrecorded_stop" if kind in ("gateway.started", "worker.started") else "no_heartbeat")
            spans.append((up, at))
            up = None
        if kind == "worker.started":
            up = seen = at
            workers.append((at, body))
    if up is not None and end >= seen:
        silence(end, "no_heartbeat")
        spans.append((up, end))
    clipped = [(max(a, since), min(b, until), reason) for a, b, reason in gaps]
    clipped = sorted(gap for gap in clipped if gap[0] < gap[1])
    beats = [(at, body) for at, _, kind, body in events if kind == "audit.heartbeat"]
    inside = [(at, body) for at, body in beats if at >= since]
    totals = dict.fromkeys(counters, 0)
    for epoch in {body["epoch"] for _, body in inside}:
        last = [body for _, body in inside if body["epoch"] == epoch][-1]
        earlier = [body for at, body in beats if at < since and body["epoch"] == epoch]
        for name in counters:
            totals[name] += last.get(name, 0) - (earlier[-1].get(name, 0) if earlier else 0)
    rates = {"slots_per_step": "slots_per_step", "replay_percents": "replay_percent"}
    sampling = {
        name: sorted({body[setting] for _, body in inside if setting in body})
        for name, setting in rates.items()
        if counters != _COUNTERS
    }
    in_force = [body for at, body in workers if at < since][-1:] + [body for at, body in workers if at >= since]
    epochs = {body["epoch"] for _, body in inside} | {body["epoch"] for at, body in workers if at >= since}
    return {
        "num_epochs": len(epochs),
        "num_heartbeats": len(inside),
        **totals,
        **sampling,
        "num_heartbeats_self_test_failed": sum(not body["last_self_test_ok"] for _, body in inside),
        "worker_up_ns": str(sum(max(0, min(b, until) - max(a, since)) for a, b in spans)),
        "blind_ns": str(_union_ns([(a, b) for a, b, _ in clipped])),
        "gaps": [{"from_ns": str(a), "until_ns": str(b), "reason": reason} for a, b, reason in clipped],
        "last_entry_ns": str(end),
        "isolation_modes": sorted({body["isolation"] for body in in_force}),
        "models": sorted({f"{body['model_id']} {body['model_digest']}" for body in in_force}),
        "kernels": sorted({body["kernels"] for body in in_force}),
    }


def _verdict(
    coverage: dict[str, Any], incidents: list[Any], num_violation_leaves: int, num_completion_tokens: int
) -> str:
    if incidents or num_violation_leaves or coverage["num_violations"]:
        return "violations"
    if not coverage["num_heartbeats"]:
        return "blind" if int(coverage["worker_up_ns"]) else "no_activity"
    if num_completion_tokens > 0 and coverage["num_steps"] == 0:
        return "not_assessed"
    if int(coverage["blind_ns"]) or coverage["num_heartbeats_self_test_failed"]:
        return "clean_with_gaps"
    return "clean"


def _union_ns(spans: list[tuple[int, int]]) -> int:
    total, reached = 0, 0
    for a, b in sorted(spans):
        total += max(0, b - max(a, reached))
        reached = max(reached, b)
    return total


# ---------------------------------------------------------------- formats


def read_keys(text: str, *, pinned: bool) -> list[Key]:
    """Keys from a vkey, or from a file of vkeys or a keys.json."""
    if os.path.exists(text):
        content = _read("", text).decode("utf-8", "replace")
        try:
            parsed = json.loads(content)
        except ValueError:
            return [_read_key(line, pinned) for line in content.split("\n") if line.strip()]
        lists = list(parsed.values()) if isinstance(parsed, dict) else []
        if not lists or set(parsed) != {"log", "report"} or not all(isinstance(v, list) for v in lists):
            raise Failure(f'{text}: not a keys.json with "log" and "report"')
        return [_read_key(line, pinned) for lines in parsed.values() for line in lines]
    return [_read_key(text, pinned)]


def _read_key(text: object, pinned: bool) -> Key:
    parts = text.strip().split("+", 2) if isinstance(text, str) else []
    if len(parts) != 3:
        raise Failure(f"not a verifier key: {str(text)[:60]!r}")
    blob = _base64(parts[2], f"key of {parts[0]}")
    for prefix, length, kind in (
        (b"\x01", 32, ED25519),
        (b"\x06", 1312, MLDSA_LOG),
        (b"\xffdsse-ml-dsa-44\n", 1312, MLDSA_REPORT),
    ):
        if blob.startswith(prefix) and len(blob) == len(prefix) + length:
            key_id = hashlib.sha256(parts[0].encode() + b"\n" + blob).digest()[:4]
            if key_id.hex() != parts[1]:
                raise Failure(f"key of {parts[0]}: its id is {key_id.hex()}, not {parts[1]}")
            fingerprint = hashlib.sha256("+".join(parts).encode()).hexdigest()
            return Key(parts[0], kind, key_id, blob[len(prefix) :], pinned, fingerprint)
    raise Failure(f"key {parts[0]}+{parts[1]}: unknown type or length")


def merge_keys(*sources: Sequence[Key]) -> list[Key]:
    """All keys; for each name and kind those of the first source that has any, so that pinned ones win."""
    keys: list[Key] = []
    for source in sources:
        held = {(k.name, k.kind) for k in keys}
        keys += [k for k in source if (k.name, k.kind) not in held]
    return keys


def unpinned(signers: Sequence[Key]) -> str:
    """What to say about signers whose keys nobody vouched for; "" when all are pinned."""
    names = ", ".join(k.label for k in signers if not k.pinned)
    advice = "(trust on first use). Pass --key with a key from a source that you trust"
    return names and f"the key {names} is not pinned, it came with what it signs {advice}"


def open_checkpoint(note: bytes, keys: Sequence[Key], place: str) -> tuple[Head, list[Key]]:
    """Parse a signed checkpoint and demand a valid signature of each type, and of every pinned key of its name."""
    try:
        text = note.decode()
    except UnicodeDecodeError as error:
        raise Failure(f"{place}: not UTF-8") from error
    body, separator, tail = text.rpartition("\n\n")
    body += "\n"
    lines = body.split("\n")
    if not separator or len(lines) != 4 or lines[3] or not lines[0] or not tail.endswith("\n"):
        raise Failure(f"{place}: not a signed checkpoint of three lines")
    if not lines[1].isascii() or not lines[1].isdigit() or str(int(lines[1])) != lines[1]:
        raise Failure(f"{place}: {lines[1][:30]!r} is not a tree size")
    root = _base64(lines[2], f"{place}: root")
    if len(root) != 32:
        raise Failure(f"{place}: a root has 32 bytes, not {len(root)}")
    head = Head(lines[0], int(lines[1]), root, body.encode())
    signatures = []
    for line in tail[:-1].split("\n"):
        parts = line.split(" ")
        if len(parts) != 3 or parts[0] != "\u2014":
            raise Failure(f"{place}: not a signature line: {line[:40]!r}")
        blob = _base64(parts[2], f"{place}: signature of {parts[1]}")
        signatures.append((parts[1], blob[:4], blob[4:]))
    return head, _signers(keys, head.origin, (ED25519, MLDSA_LOG), signatures, head, place)


def _signers(
    keys: Sequence[Key],
    name: str,
    kinds: Sequence[str],
    signatures: Sequence[tuple[str, bytes, bytes]],
    message: "Head | bytes",
    place: str,
) -> list[Key]:
    """One key of each kind whose signature holds. A pinned key for this role must be among them."""
    role = [k for k in keys if k.name.endswith("/report") == name.endswith("/report")]
    signers = [_one_signature([k for k in role if k.name == name], kind, signatures, message, place) for kind in kinds]
    if absent := [k.label for k in role if k.pinned and k not in signers]:
        raise Failure(f"{place}: the pinned key {absent[0]} has not signed this; it is signed by {name}")
    return signers


def _one_signature(
    keys: Sequence[Key], kind: str, signatures: Sequence[tuple[str, bytes, bytes]], message: "Head | bytes", place: str
) -> Key:
    """The key of this kind whose signature holds. Every known key's signature that is present must hold."""
    candidates = [k for k in keys if k.kind == kind]
    if not candidates:
        raise Failure(f"{place}: no {kind} key is known for the signer")
    signer = None
    for key in candidates:
        for name, key_id, signature in signatures:
            if (name, key_id) == (key.name, key.key_id):
                if not _signature_holds(key, signature, message):
                    raise Failure(f"{place}: wrong {kind} signature by {key.name}+{key.key_id.hex()}")
                signer = key
    if signer is None:
        raise Failure(f"{place}: no {kind} signature by {', '.join(f'{k.name}+{k.key_id.hex()}' for k in candidates)}")
    return signer


def _signature_holds(key: Key, signature: bytes, message: "Head | bytes") -> bool:
    signed = message.body if isinstance(message, Head) else message
    try:
        if key.kind == ED25519:
            Ed25519PublicKey.from_public_bytes(key.raw).verify(signature, signed)
            return True
        if isinstance(message, Head):  # C2SP tlog-cosignature: a timestamp, then the signature over a binary message
            name, origin = key.name.encode(), message.origin.encode()
            signed = b"subtree/v1\n\0" + bytes([len(name)]) + name + signature[:8] + bytes([len(origin)]) + origin
            signed += struct.pack(">QQ", 0, message.size) + message.root
            signature = signature[8:]
        MLDSA44PublicKey.from_public_bytes(key.raw).verify(signature, signed)
    except (InvalidSignature, ValueError):
        return False
    return True


def _open_envelope(raw: bytes, place: str) -> tuple[bytes, dict[str, Any], list[tuple[str, bytes, bytes]]]:
    envelope = _json(raw, place)
    if not isinstance(envelope, dict) or set(envelope) != {"payload", "payloadType", "signatures"}:
        raise Failure(f"{place}: not a DSSE envelope")
    if envelope["payloadType"] != PAYLOAD_TYPE or not isinstance(envelope["signatures"], list):
        raise Failure(f"{place}: payload type is not {PAYLOAD_TYPE}")
    body = _base64(envelope["payload"], f"{place}: payload")
    signatures = []
    for entry in envelope["signatures"]:
        if not isinstance(entry, dict) or set(entry) != {"keyid", "sig"} or not isinstance(entry["keyid"], str):
            raise Failure(f"{place}: a signature needs keyid and sig")
        name, _, identifier = entry["keyid"].rpartition("+")
        try:
            key_id = bytes.fromhex(identifier)
        except ValueError as error:
            raise Failure(f"{place}: keyid {entry['keyid'][:60]!r} is not NAME+ID") from error
        if identifier != key_id.hex():
            raise Failure(f"{place}: keyid {entry['keyid'][:60]!r} is not in lower-case hex")
        signatures.append((name, key_id, _base64(entry["sig"], f"{place}: signature of {name}")))
    statement = _json(body, f"{place} payload")
    try:
        predicate = statement["predicate"]
        known = statement["_type"] == STATEMENT_TYPE and statement["predicateType"] in PREDICATE_TYPES
        parts = (statement["subject"], predicate["figures"], predicate["scope"], predicate["log"], predicate["keys"])
    except (KeyError, TypeError) as error:
        raise Failure(f"{place} payload: not a Bulkhead statement ({error} is missing)") from error
    if not known or not all(parts):
        raise Failure(f"{place} payload: unknown statement or predicate type")
    return body, statement, signatures


def _parse_leaf(raw: bytes, index: int, place: str) -> Leaf:
    leaf = _json(raw, f"{place}: leaf {index}")
    form = {"at_ns": str, "commitment": str, "kind": str, "tenant": str, "v": int}
    if (
        not isinstance(leaf, dict)
        or {name: type(value) for name, value in leaf.items()} != form
        or canonical(leaf) != raw
    ):
        raise Failure(f"{place}: leaf {index} is not in canonical form")
    if not leaf["at_ns"].isascii() or not leaf["at_ns"].isdigit():
        raise Failure(f"{place}: leaf {index} has no time")
    return Leaf(index, leaf["kind"], leaf["v"], int(leaf["at_ns"]), leaf["tenant"], leaf["commitment"])


def _parse_opening(line: bytes, place: str) -> tuple[int, bytes, dict[str, Any]]:
    opening = _json(line, place)
    form = {"body": dict, "index": int, "nonce": str}
    if not isinstance(opening, dict) or {name: type(value) for name, value in opening.items()} != form:
        raise Failure(f"{place}: not an opening")
    if canonical(opening) != line or len(opening["nonce"]) != 64:
        raise Failure(f"{place}: not in canonical form")
    try:
        nonce = bytes.fromhex(opening["nonce"])
    except ValueError as error:
        raise Failure(f"{place}: the nonce is not hex") from error
    if nonce.hex() != opening["nonce"]:
        raise Failure(f"{place}: not in canonical form")
    return opening["index"], nonce, opening["body"]


def _check_fields(body: dict[str, Any], fields: str, place: str) -> None:
    wanted = dict(text.split(":") for text in fields.split())
    if set(wanted) != set(body):
        raise Failure(f"{place}: fields are {sorted(body)}, not {sorted(wanted)}")
    for name, letter in wanted.items():
        value = body[name]
        good = {
            "s": isinstance(value, str),
            "i": type(value) is int,
            "b": isinstance(value, bool),
            "d": isinstance(value, str) and value.isascii() and value.isdigit(),
            "l": isinstance(value, list) and all(isinstance(item, str) for item in value),
        }[letter]
        if not good:
            raise Failure(f"{place}: {name} has the wrong type")
    if "outcome" in body and body["outcome"] not in OUTCOMES:
        raise Failure(f"{place}: outcome {body['outcome']!r} is unknown")


def canonical(value: dict[str, Any]) -> bytes:
    """RFC 8785 for what occurs here: ASCII names, no floats."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def _json(raw: bytes, place: str) -> Any:
    def refuse(text: str) -> Any:
        raise Failure(f"{place}: {text} is no whole number")

    try:
        return json.loads(raw.decode(), parse_float=refuse, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Failure(f"{place}: not JSON") from error


def _base64(text: object, place: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except ValueError as error:
        raise Failure(f"{place}: not base64") from error
    if not isinstance(text, str) or base64.b64encode(raw).decode() != text:
        raise Failure(f"{place}: not canonical base64")
    return raw


def _root(hashes: Sequence[bytes]) -> bytes:
    """RFC 6962 section 2.1 over hashes, level by level: pairs are hashed, an odd last one moves up unchanged."""
    if not hashes:
        return hashlib.sha256(b"").digest()
    row = list(hashes)
    while len(row) > 1:
        pairs = [hashlib.sha256(b"\x01" + row[i] + row[i + 1]).digest() for i in range(0, len(row) - 1, 2)]
        row = pairs + row[len(row) - len(row) % 2 :]
    return row[0]


def _index_path(n: int) -> str:
    groups = [f"{n % 1000:03d}"]
    while n := n // 1000:
        groups.append(f"x{n % 1000:03d}")
    return "/".join(reversed(groups))


def _tile_name(level: str, n: int, width: int) -> str:
    return f"tile/{level}/{_index_path(n)}" + (f".p/{width}" if width < 256 else "")


def _read_tile(folder: str, level: str, n: int, width: int) -> tuple[str, bytes]:
    """A tile, or the full tile that has replaced a partial one since (it begins with the same bytes)."""
    name = _tile_name(level, n, width)
    full = _tile_name(level, n, 256)
    if not os.path.exists(os.path.join(folder, name)) and os.path.exists(os.path.join(folder, full)):
        name = full
    return name, _read(folder, name, Failure)


def _read(folder: str, name: str, error_type: type[Exception] = Unusable) -> bytes:
    try:
        with open(os.path.join(folder, name), "rb") as file:
            return file.read()
    except OSError as error:
        raise error_type(f"{os.path.join(folder, name)}: {error.strerror}") from error


def _lines(blob: bytes, place: str) -> list[bytes]:
    if blob and not blob.endswith(b"\n"):
        raise Failure(f"{place}: the last line is cut off")
    return blob.split(b"\n")[:-1]


def _head(log: Log) -> Head:
    if log.head is None:
        raise Failure("no checkpoint was read")
    return log.head


def _opened(leaves: Iterable[Leaf], *kinds: str) -> list[tuple[Leaf, dict[str, Any]]]:
    return [(leaf, leaf.body) for leaf in leaves if leaf.kind in kinds and leaf.body is not None]


def _scalars(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _scalars(item)
    elif isinstance(value, list):
        for item in value:
            yield from _scalars(item)
    else:
        yield value


def _differences(stated: Any, counted: Any, place: str) -> Iterable[str]:
    if isinstance(stated, dict) and isinstance(counted, dict):
        for name in sorted(stated.keys() | counted.keys()):
            yield from _differences(stated.get(name), counted.get(name), f"{place}.{name}")
    elif isinstance(stated, list) and isinstance(counted, list) and len(stated) == len(counted):
        for i, (a, b) in enumerate(zip(stated, counted, strict=True)):
            yield from _differences(a, b, f"{place}[{i}]")
    elif stated != counted or type(stated) is not type(counted):
        yield f"{place}: the report says {stated!r}, the log gives {counted!r}"


# ---------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="verify", description="Verify a Bulkhead log or report offline.")
    commands = parser.add_subparsers(dest="command", required=True)
    log_parser = commands.add_parser("log", help="a log folder")
    log_parser.add_argument("folder")
    log_parser.add_argument("--since-checkpoint", metavar="FILE", help="a checkpoint that you kept from earlier")
    report_parser = commands.add_parser("report", help="a signed report")
    report_parser.add_argument("file")
    report_parser.add_argument("--log", metavar="FOLDER", help="the log, to count every figure again")
    for sub in (log_parser, report_parser):
        sub.add_argument("--key", metavar="VKEY", action="append", default=[], help="a key that you trust, or a file")
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:
        return 2 if stop.code else 0
    try:
        if arguments.command == "log":
            findings = verify_log(arguments.folder, arguments.key, arguments.since_checkpoint).findings
        else:
            findings = verify_report(arguments.file, arguments.log, arguments.key)
    except Unusable as error:
        print(f"nothing could be checked: {error}", file=sys.stderr)
        return 2
    print_findings(findings)
    return 0 if findings.ok else 1


def print_findings(findings: Findings) -> None:
    for number, text in findings.passed:
        print(f"  ok    ({number}) {text}")
    for number, text in findings.failed:
        print(f"  FAIL  ({number}) {text}")
    for text in findings.notes:
        print(f"  note  {text}")
    for key in findings.keys:
        print(f"  key   {key.label}, sha256 {key.fingerprint}, {'pinned' if key.pinned else 'NOT pinned'}")
    print("\nNot proven by this run:")
    for text in findings.not_proven:
        print(f"  -     {text}")
    verdict = "VERIFIED" if findings.ok else "NOT VERIFIED"
    print(f"\n{verdict}: {len(findings.passed)} checks hold, {len(findings.failed)} fail")


if __name__ == "__main__":
    sys.exit(main())
