"""The figures of a report: counted from the log's rows, never typed in.

Every figure is a function of the opened leaves below a checkpoint and of a scope (period, longest allowed silence), so
that the offline verifier counts the same again without us. docs/report.md defines each one; the verifier implements
the definitions a second time, on purpose, and a test compares the two.

Coverage is a walk over the worker's life. `seen` is when the auditor was last heard; a silence longer than the scope
allows is a gap, whatever the reason, and time in a gap is called blind:

    down --worker.started--> up --audit.heartbeat--> up --worker.lost | gateway.stopped--> down
    up --gateway.started | worker.started--> the stop before was never recorded: blind since `seen`
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

GapReason = Literal["no_heartbeat", "self_test_failed", "unrecorded_stop"]
Verdict = Literal["clean", "clean_with_gaps", "violations", "not_assessed", "blind", "no_activity"]

COVERAGE_KINDS = ("gateway.started", "gateway.stopped", "worker.started", "worker.lost", "audit.heartbeat")
COUNTERS = (
    "num_steps",
    "num_slots_checked",
    "num_violations",
    "num_self_tests",
    "num_slots_read",  # this and what follows: since version 2 of the heartbeat
    "num_sequences",
    "num_replays",
    "num_replays_differing",
    "num_canaries",
)
OUTCOME_NAMES = ("captured", "voided", "expired", "recovered")


@dataclass(frozen=True, slots=True)
class Scope:
    since_ns: int  # half-open: since <= at < until
    until_ns: int
    heartbeat_gap_max_ns: int  # a longer silence of the auditor counts as blind


@dataclass(frozen=True, slots=True)
class OpenLeaf:
    """A leaf with its content; `body` is None when erased. `tenant` is the pseudonym or ""."""

    leaf_index: int
    kind: str
    at_ns: int
    tenant: str
    body: Mapping[str, Any] | None


@dataclass(slots=True)
class TenantFigures:
    tenant: str
    num_admitted: int = 0
    num_settled: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0
    charged_nano_usd: int = 0
    granted_nano_usd: int = 0
    refunded_nano_usd: int = 0
    adjusted_nano_usd: int = 0  # given less taken: may be below zero
    expired_nano_usd: int = 0


@dataclass(slots=True)
class RequestFigures:
    num_admitted: int = 0
    num_settled: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0
    captured: int = 0
    voided: int = 0
    expired: int = 0
    recovered: int = 0
    open: int = 0  # admitted in the period, not settled below the checkpoint


@dataclass(slots=True)
class MoneyFigures:
    charged_nano_usd: int = 0
    granted_nano_usd: int = 0
    refunded_nano_usd: int = 0
    adjusted_nano_usd: int = 0  # given less taken: may be below zero
    expired_nano_usd: int = 0


@dataclass(slots=True)
class LeafFigures:
    in_log: int
    in_period: int = 0
    opened: int = 0
    erased: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, order=True)
class Gap:
    from_ns: int
    until_ns: int
    reason: str


@dataclass(slots=True)
class Coverage:
    num_epochs: int = 0
    num_heartbeats: int = 0
    num_steps: int = 0
    num_slots_checked: int = 0
    num_violations: int = 0
    num_self_tests: int = 0
    num_heartbeats_self_test_failed: int = 0
    num_slots_read: int = 0
    num_sequences: int = 0
    num_replays: int = 0
    num_replays_differing: int = 0
    num_canaries: int = 0
    slots_per_step: list[int] = field(default_factory=list)
    replay_percents: list[int] = field(default_factory=list)
    worker_up_ns: int = 0
    blind_ns: int = 0
    gaps: list[Gap] = field(default_factory=list)
    last_entry_ns: int = 0  # the log says nothing about the time after it
    isolation_modes: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Incident:
    leaf_index: int
    at_ns: int
    tenant: str
    epoch: str
    step: int
    rule: str
    block_id: int
    detail: str
    num_sequences: int


@dataclass(slots=True)
class AccessFigures:
    operators_created: int = 0
    logins: int = 0
    logins_failed: int = 0
    keys_created: int = 0
    keys_revoked: int = 0
    limits_changed: int = 0


@dataclass(slots=True)
class Figures:
    leaves: LeafFigures
    requests: RequestFigures
    money: MoneyFigures
    tenants: list[TenantFigures]
    coverage: Coverage
    incidents: list[Incident]
    access: AccessFigures
    verdict: Verdict


_CREDIT = {
    "credit.granted": "granted_nano_usd",
    "credit.refunded": "refunded_nano_usd",
    "credit.adjusted": "adjusted_nano_usd",
    "credit.expired": "expired_nano_usd",
}
_ACCESS = {
    "operator.created": "operators_created",
    "operator.logged_in": "logins",
    "operator.login_failed": "logins_failed",
    "key.created": "keys_created",
    "key.revoked": "keys_revoked",
    "limits.changed": "limits_changed",
}


def count_figures(
    period: Sequence[OpenLeaf],
    coverage_leaves: Iterable[OpenLeaf],
    settled_requests: frozenset[str],
    *,
    num_leaves: int,
    last_entry_ns: int,
    scope: Scope,
) -> Figures:
    """Count everything.

    `period`: the leaves of the period in log order. `coverage_leaves`: those of COVERAGE_KINDS before its end, from the
    beginning of the log. `settled_requests`: request ids settled anywhere below the checkpoint. `num_leaves` and
    `last_entry_ns` (latest time of any leaf; the period's start when there is none) are the log's.
    """
    leaves = LeafFigures(num_leaves, in_period=len(period))
    requests, money, access = RequestFigures(), MoneyFigures(), AccessFigures()
    tenants: dict[str, TenantFigures] = {}
    incidents: list[Incident] = []
    for leaf in period:
        leaves.by_kind[leaf.kind] = leaves.by_kind.get(leaf.kind, 0) + 1
        if leaf.kind in _ACCESS:
            setattr(access, _ACCESS[leaf.kind], getattr(access, _ACCESS[leaf.kind]) + 1)
        body = leaf.body
        if body is None:
            leaves.erased += 1
            continue
        leaves.opened += 1
        if leaf.kind == "isolation.violation":
            incidents.append(_incident(leaf, body))
        elif leaf.kind in ("request.admitted", "request.settled") or leaf.kind in _CREDIT:
            tenant = tenants.setdefault(leaf.tenant, TenantFigures(leaf.tenant))
            _count_money_leaf(leaf.kind, body, tenant, requests, money, settled_requests)
    coverage = _count_coverage(coverage_leaves, scope, last_entry_ns)
    num_violation_leaves = leaves.by_kind.get("isolation.violation", 0)
    return Figures(
        leaves,
        requests,
        money,
        sorted(tenants.values(), key=lambda t: t.tenant),
        coverage,
        incidents,
        access,
        _verdict(coverage, num_violation_leaves, requests.num_completion_tokens),
    )


def _count_money_leaf(
    kind: str,
    body: Mapping[str, Any],
    tenant: TenantFigures,
    requests: RequestFigures,
    money: MoneyFigures,
    settled_requests: frozenset[str],
) -> None:
    if name := _CREDIT.get(kind):
        amount = int(body["amount_nano_usd"]) * (-1 if body.get("direction") == "take" else 1)
        setattr(tenant, name, getattr(tenant, name) + amount)
        setattr(money, name, getattr(money, name) + amount)
        return
    if kind == "request.admitted":
        tenant.num_admitted += 1
        requests.num_admitted += 1
        requests.open += body["request_id"] not in settled_requests
        return
    for name in ("num_prompt_tokens", "num_cached_tokens", "num_completion_tokens"):
        setattr(tenant, name, getattr(tenant, name) + body[name])
        setattr(requests, name, getattr(requests, name) + body[name])
    tenant.num_settled += 1
    requests.num_settled += 1
    setattr(requests, body["outcome"], getattr(requests, body["outcome"]) + 1)
    tenant.charged_nano_usd += int(body["amount_nano_usd"])
    money.charged_nano_usd += int(body["amount_nano_usd"])


def _incident(leaf: OpenLeaf, body: Mapping[str, Any]) -> Incident:
    return Incident(
        leaf_index=leaf.leaf_index,
        at_ns=leaf.at_ns,
        tenant=leaf.tenant,
        epoch=body["epoch"],
        step=body["step"],
        rule=body["rule"],
        block_id=body["block_id"],
        detail=body["detail"],
        num_sequences=len(body["sequence_ids"]),
    )


class _Walk:
    """The worker's life as the log tells it."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.up_ns: int | None = None
        self.seen_ns = 0
        self.gaps: list[Gap] = []
        self.num_up_ns = 0

    def silence(self, now_ns: int, reason: GapReason, *, always: bool = False) -> None:
        if always or now_ns - self.seen_ns > self.scope.heartbeat_gap_max_ns:
            begin, end = max(self.seen_ns, self.scope.since_ns), min(now_ns, self.scope.until_ns)
            if begin < end:
                self.gaps.append(Gap(begin, end, reason))

    def start(self, now_ns: int) -> None:
        self.up_ns = self.seen_ns = now_ns

    def stop(self, now_ns: int, reason: GapReason) -> None:
        if self.up_ns is None:
            return
        self.silence(now_ns, reason)
        self.num_up_ns += max(0, min(now_ns, self.scope.until_ns) - max(self.up_ns, self.scope.since_ns))
        self.up_ns = None

    def heartbeat(self, now_ns: int, *, awake: bool) -> None:
        if self.up_ns is None:
            self.start(now_ns)
        self.silence(now_ns, "no_heartbeat")
        if not awake:
            self.silence(now_ns, "self_test_failed", always=True)
        self.seen_ns = now_ns

    def blind_ns(self) -> int:
        """Time in gaps; overlapping gaps count once."""
        total = reached = 0
        for gap in sorted(self.gaps):
            total += max(0, gap.until_ns - max(gap.from_ns, reached))
            reached = max(reached, gap.until_ns)
        return total


def _count_coverage(leaves: Iterable[OpenLeaf], scope: Scope, last_entry_ns: int) -> Coverage:
    walk, coverage = _Walk(scope), Coverage()
    first: dict[str, Mapping[str, Any]] = {}  # epoch -> last heartbeat before the period
    last: dict[str, Mapping[str, Any]] = {}  # epoch -> last heartbeat in the period
    epochs: set[str] = set()
    beats: list[Mapping[str, Any]] = []
    worker_before: list[Mapping[str, Any]] = []
    workers: list[Mapping[str, Any]] = []
    for leaf in sorted(leaves, key=lambda x: (x.at_ns, x.leaf_index)):
        body, inside = leaf.body, leaf.at_ns >= scope.since_ns
        if body is None or leaf.at_ns >= scope.until_ns:
            continue
        if leaf.kind == "audit.heartbeat":
            walk.heartbeat(leaf.at_ns, awake=body["last_self_test_ok"])
            (last if inside else first)[body["epoch"]] = body
            if inside:
                beats.append(body)
                epochs.add(body["epoch"])
                coverage.num_heartbeats += 1
                coverage.num_heartbeats_self_test_failed += not body["last_self_test_ok"]
            continue
        lost = leaf.kind in ("worker.lost", "gateway.stopped")
        walk.stop(leaf.at_ns, "no_heartbeat" if lost else "unrecorded_stop")
        if leaf.kind == "worker.started":
            walk.start(leaf.at_ns)
            if inside:
                workers.append(body)
                epochs.add(body["epoch"])
            else:
                worker_before = [body]
    end_ns = min(scope.until_ns, last_entry_ns)
    if end_ns >= walk.seen_ns:
        walk.stop(end_ns, "no_heartbeat")
    for epoch, body in last.items():
        for name in COUNTERS:
            before = first[epoch].get(name, 0) if epoch in first else 0
            setattr(coverage, name, getattr(coverage, name) + body.get(name, 0) - before)
    coverage.slots_per_step = sorted({body["slots_per_step"] for body in beats if "slots_per_step" in body})
    coverage.replay_percents = sorted({body["replay_percent"] for body in beats if "replay_percent" in body})
    in_force = worker_before + workers
    coverage.num_epochs = len(epochs)
    coverage.worker_up_ns, coverage.blind_ns, coverage.gaps = walk.num_up_ns, walk.blind_ns(), sorted(walk.gaps)
    coverage.last_entry_ns = end_ns
    coverage.isolation_modes = sorted({body["isolation"] for body in in_force})
    coverage.models = sorted({f"{body['model_id']} {body['model_digest']}" for body in in_force})
    coverage.kernels = sorted({body["kernels"] for body in in_force})
    return coverage


def _verdict(coverage: Coverage, num_violation_leaves: int, num_completion_tokens: int) -> Verdict:
    if num_violation_leaves or coverage.num_violations:
        return "violations"
    if not coverage.num_heartbeats:
        return "blind" if coverage.worker_up_ns else "no_activity"
    if num_completion_tokens and not coverage.num_steps:
        return "not_assessed"
    if coverage.blind_ns or coverage.num_heartbeats_self_test_failed:
        return "clean_with_gaps"
    return "clean"
