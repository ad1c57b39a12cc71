"""Log entries: the closed registry of what Bulkhead records, and the entry itself.

A kind is registered here or it does not exist. The registry gives each kind a version and typed fields; an Entry is
checked against it when it is built, so that nothing malformed can reach the outbox. Prompts and answers are never
fields: the log holds identifiers, counts, money and settings.

Canonical form (RFC 8785 JSON) of a body:
- Floats cannot occur. Field types are str, int, bool and list of str.
- Whole numbers whose name ends in ``_ns`` or ``_nano_usd`` are written as decimal strings, since times in nanoseconds
  pass 2**53, above which JSON readers lose digits. Every other number must lie within +-(2**53 - 1).
- Names are sorted and there is no white space: equal bodies have equal bytes.

Adding a field to a kind means a new version of it; old versions stay readable for ever, because old leaves do.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from audit.transparency.billing_kinds import BILLING_KINDS
from audit.transparency.entry_kind import SAFE_INT_MAX, Field, Kind
from audit.transparency.entry_kind import counts as _count
from audit.transparency.entry_kind import texts as _text
from audit.transparency.operator_kinds import OPERATOR_KINDS

Value = str | int | bool | list[str]

INT64_MAX = 2**63 - 1
TEXT_CHARS_MAX = 1_024  # an entry is a fact, not a document
LIST_ITEMS_MAX = 1_024
DECIMAL_SUFFIXES = ("_ns", "_nano_usd")
_encode = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False).encode
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


class EntryError(ValueError):
    """The entry does not fit the registry; the message names the kind, the field and what is wrong."""


_BUDGET = (
    Field("scope_kind", "str", choices=("tenant", "project", "key")),
    *_text("scope_id"),
    Field("period", "str", choices=("day", "month", "total")),
    Field("hard", "bool"),
)

_CREDIT_KIND = Field("credit_kind", "str", choices=("promotional", "paid"))

OUTCOMES = ("captured", "voided", "expired", "recovered")

_ALL = (
    Kind("gateway.started", 1, "The gateway process began to serve.", _text("version")),
    Kind("gateway.stopped", 1, "The gateway process ended in order.", _text("reason")),
    Kind(
        "worker.started",
        1,
        "An engine worker connected; its isolation mode and kernels are as it reports them.",
        _text("epoch", "model_id", "model_digest", "isolation", "kernels"),
    ),
    Kind("worker.lost", 1, "The engine worker's connection ended.", _text("epoch", "reason")),
    Kind(
        "request.admitted",
        1,
        "A request passed authentication and quota; its worst case is held in the ledger.",
        (
            *_text("request_id", "key_id", "model", "price_id"),
            *_count("num_prompt_tokens", "max_tokens", "hold_nano_usd"),
        ),
    ),
    Kind(
        "request.settled",
        1,
        "A request's hold was resolved, exactly once.",
        (
            *_text("request_id", "finish_reason"),
            *_count("num_prompt_tokens", "num_cached_tokens", "num_completion_tokens", "amount_nano_usd"),
            Field("outcome", "str", choices=OUTCOMES),
        ),
    ),
    Kind(
        "request.replayed",
        1,
        "An answer was given again under its idempotency key; nothing was run or charged.",
        _text("request_id", "original_request_id", "key_id"),
    ),
    Kind("tenant.created", 2, "A tenant was created.", _text("organisation_id", "name", "currency")),
    Kind("project.created", 1, "A project of a tenant was created.", _text("project_id", "name")),
    Kind(
        "tenant.status_changed",
        1,
        "A tenant was suspended or resumed.",
        (Field("status", "str", choices=("active", "suspended")), *_text("reason")),
    ),
    Kind(
        "tenant.deleted",
        1,
        "A tenant was deleted and its keys revoked; the credit that it had left stays on the books.",
        (*_text("name", "reason"), *_count("num_keys_revoked", "credit_nano_usd")),
    ),
    Kind(
        "cache.erased",
        1,
        "The engine's blocks with numbers of a deleted tenant were zeroed.",
        (*_text("epoch"), *_count("num_blocks")),
    ),
    Kind(
        "key.created",
        3,
        "An API key was created, its secret not logged. An expiry of 0 is none, an empty list no restriction.",
        (
            *_text("key_id", "project_id", "name"),
            Field("scopes", "list[str]"),
            *_count("expires_ns"),
            Field("models", "list[str]"),
            Field("networks", "list[str]"),
            Field("tiers", "list[str]"),
        ),
    ),
    Kind(
        "key.rotated",
        1,
        "A key got a successor with the same rules; the old key ends at its expiry. An expiry of 0 is none.",
        (*_text("key_id", "old_key_id", "project_id"), *_count("old_expires_ns", "expires_ns")),
    ),
    Kind("key.revoked", 1, "An API key was revoked.", _text("key_id", "reason")),
    *BILLING_KINDS,
    Kind(
        "credit.granted",
        2,
        "A tenant's account was credited. An expiry of 0 is none.",
        (*_text("transfer_id", "memo"), *_count("amount_nano_usd"), _CREDIT_KIND, *_count("expires_ns")),
    ),
    Kind(
        "credit.expired",
        1,
        "A credit ended and this much of it was left and not held: it is no longer there.",
        (*_text("transfer_id"), _CREDIT_KIND, *_count("amount_nano_usd", "expires_ns")),
    ),
    Kind(
        "credit.refunded",
        1,
        "Part or all of what a request cost was given back.",
        (*_text("transfer_id", "request_id", "reason"), *_count("amount_nano_usd")),
    ),
    Kind(
        "credit.adjusted",
        1,
        "A tenant's credit was corrected; corrects_id is the transaction that was wrong, or empty.",
        (
            *_text("transfer_id", "corrects_id", "reason"),
            Field("direction", "str", choices=("give", "take")),
            *_count("amount_nano_usd"),
        ),
    ),
    Kind(
        "limits.changed",
        3,
        "A scope's limits were set; -1 stands for no limit. Limits in shadow refuse nothing. The weight is a tenant's "
        "share of the engine.",
        (
            *_text("scope_kind", "scope_id"),
            *_count("requests_per_minute", "tokens_per_minute", "concurrency_max", minimum=-1),
            *_count("weight"),
            *_count("tokens_per_day", minimum=-1),
            Field("shadow", "list[str]"),
        ),
    ),
    Kind(
        "policy.changed",
        1,
        "What happens to a tenant's requests while the store of quotas is gone. Caps are open's, for each gateway; the "
        "slice is lease's, in percent of each limit.",
        (
            Field("mode", "str", choices=("closed", "lease", "open")),
            *_count("slice_percent", "requests_per_minute", "tokens_per_minute", "concurrency_max"),
        ),
    ),
    Kind(
        "quota.lost",
        1,
        "A gateway lost the store of quotas; requests follow their tenants' policies from here on.",
        _text("reason"),
    ),
    Kind(
        "quota.back",
        1,
        "A gateway has the store of quotas again. The counts are of requests that policies admitted, or nobody.",
        _count("lost_ns", "num_admitted_lease", "num_admitted_open", "num_refused"),
    ),
    Kind(
        "quota.rebuilt",
        1,
        "An organisation's counters were made anew from the ledger: for the first time, at the start of a gateway, "
        "because the store had lost them, or because policies had admitted requests without it.",
        (
            *_text("organisation_id"),
            Field("reason", "str", choices=("first", "start", "emptied", "outage")),
            *_count("num_scopes", "num_open"),
        ),
    ),
    Kind(
        "limit.would_refuse",
        1,
        "A request was admitted that a limit in shadow would have refused.",
        _text("request_id", "scope_id", "limit_name"),
    ),
    Kind(
        "budget.set",
        1,
        "A budget of a tenant, project or key was set or changed.",
        (*_BUDGET, *_count("limit_nano_usd")),
    ),
    Kind("budget.removed", 1, "A budget was removed.", _BUDGET),
    Kind(
        "budget.alert",
        1,
        "What was used of a budget reached a threshold: once for each threshold, period and limit.",
        (*_BUDGET, *_count("threshold_percent", "used_nano_usd", "limit_nano_usd", "period_start_ns")),
    ),
    Kind(
        "audit.heartbeat",
        2,
        "The isolation auditor's totals since its worker's epoch began, and its sampling rates: the cache slots whose "
        "bytes are compared before a step, and the percentage of answers that are run again alone.",
        (
            *_text("epoch"),
            *_count("num_steps", "num_slots_checked", "num_violations", "num_self_tests"),
            Field("last_self_test_ok", "bool"),
            *_count("slots_per_step", "num_slots_read", "replay_percent", "num_sequences", "num_replays"),
            *_count("num_replays_differing", "num_canaries"),
        ),
    ),
    Kind(
        "isolation.violation",
        1,
        "The isolation auditor, or as `kernel_ownership` a kernel, stopped a step; "
        "-1 as block_id stands for no single block. The rule `admission_closed` says that such steps became too many "
        "and that the worker takes nothing in until it is restarted.",
        (
            *_text("epoch", "rule", "detail"),
            *_count("step"),
            *_count("block_id", minimum=-1),
            Field("sequence_ids", "list[str]"),
            Field("domains", "list[str]"),
        ),
    ),
    Kind(
        "webhook.added",
        1,
        "An endpoint hears of entries of these kinds; the rest of its URL is not logged.",
        (*_text("endpoint_id", "host"), Field("kinds", "list[str]")),
    ),
    Kind("webhook.removed", 1, "An endpoint hears of nothing any more.", _text("endpoint_id", "reason")),
    Kind("webhook.resent", 1, "A delivery is sent again at an operator's wish.", _text("endpoint_id", "delivery_id")),
    Kind(
        "webhook.given_up",
        1,
        "The entry at log_index was not taken by an endpoint, however often it was tried.",
        (*_text("endpoint_id", "delivery_id", "event_kind", "reason"), *_count("log_index", "num_attempts")),
    ),
    *OPERATOR_KINDS,
    Kind(
        "report.issued",
        1,
        "A signed report of a period was written.",
        (*_text("name", "statement_sha256"), *_count("since_ns", "until_ns")),
    ),
    Kind(
        "opening.erased",
        1,
        "The openings of these leaves are destroyed; their commitments stay and still verify.",
        (*_text("reason"), Field("leaf_indexes", "list[str]")),
    ),
)
KINDS: Mapping[str, Kind] = MappingProxyType({kind.name: kind for kind in _ALL})


@dataclass(frozen=True, slots=True)
class Entry:
    """One fact. `tenant_id` is empty where no tenant is concerned; `at_ns` is nanoseconds since the epoch, UTC.

    Raises EntryError when kind or body do not fit the registry.
    """

    kind: str
    tenant_id: str
    at_ns: int
    body: Mapping[str, Value]

    def __post_init__(self) -> None:
        kind = KINDS.get(self.kind)
        if kind is None:
            raise EntryError(f"{self.kind!r} is not a registered entry kind (see audit/transparency/entry.py)")
        _require_text(self.tenant_id, f"{self.kind}: tenant_id")
        _require_int(self.at_ns, f"{self.kind}: at_ns", 0, INT64_MAX)
        known = {f.name for f in kind.fields}
        if missing := sorted(known - self.body.keys()):
            raise EntryError(f"{self.kind}: missing {', '.join(missing)}")
        if extra := sorted(self.body.keys() - known):
            raise EntryError(f"{self.kind}: unknown field {', '.join(map(repr, extra))}")
        for f in kind.fields:
            _require(f, self.body[f.name], f"{self.kind}: {f.name}")

    @property
    def version(self) -> int:
        return KINDS[self.kind].version

    def canonical_body(self) -> bytes:
        """The body's RFC 8785 bytes: what the commitment covers."""
        return canonical({name: _plain(name, value) for name, value in self.body.items()})


def canonical(value: Mapping[str, str | int | bool | list[str]]) -> bytes:
    """RFC 8785 bytes of a flat object with ASCII names and without floats: of such an object the standard library's
    encoder gives the same ones, eight times as fast as a general one."""
    return _encode(value).encode()


def is_decimal_field(name: str) -> bool:
    """Whether whole numbers of this name are written as decimal strings."""
    return name.endswith(DECIMAL_SUFFIXES)


def _plain(name: str, value: Value) -> Value:
    if isinstance(value, int) and not isinstance(value, bool) and is_decimal_field(name):
        return str(value)
    return value


def _require(f: Field, value: object, where: str) -> None:
    if f.type == "str":
        text = _require_text(value, where)
        if f.choices and text not in f.choices:
            raise EntryError(f"{where} is {text!r}, not one of {', '.join(f.choices)}")
    elif f.type == "int":
        _require_int(value, where, f.minimum, INT64_MAX if is_decimal_field(f.name) else SAFE_INT_MAX)
    elif f.type == "bool":
        if not isinstance(value, bool):
            raise EntryError(f"{where} must be a bool, not {type(value).__name__}")
    else:
        if not isinstance(value, list) or len(value) > LIST_ITEMS_MAX:
            raise EntryError(f"{where} must be a list of at most {LIST_ITEMS_MAX} texts")
        for item in value:
            _require_text(item, where)


def _require_text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise EntryError(f"{where} must be a str, not {type(value).__name__}")
    if len(value) > TEXT_CHARS_MAX:
        raise EntryError(f"{where} has {len(value)} characters; at most {TEXT_CHARS_MAX} are allowed")
    if _UNSTORABLE.search(value):
        raise EntryError(f"{where} holds a character that cannot be stored as UTF-8 text")
    return value


def _require_int(value: object, where: str, minimum: int, maximum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise EntryError(f"{where} must be an int, not {type(value).__name__}")
    if not minimum <= value <= maximum:
        raise EntryError(f"{where} is {value}, outside {minimum}..{maximum}")
