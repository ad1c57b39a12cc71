"""The report's sentences: what the figures mean, in words that a board member can read and an auditor can hold us to.

Rules: a sentence claims what was counted and no more; "supports" a control, never "satisfies" it; silence of the
auditor is called blind.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from audit.reports.figures import Coverage, Figures, Scope

SECOND_NS = 1_000_000_000

LIMITS = (
    (
        "The operator is trusted with the machine. Someone with root on the host, or in the supply chain of the "
        "software, can change what is logged before it is signed. No trusted execution environment (TEE) is used or "
        "attested."
    ),
    (
        "The log proves that its entries were not changed after their checkpoint. It cannot prove that every event was "
        "entered, nor that the operator's clock was right."
    ),
    "Timing and size of network traffic are not covered: who watches the wire may learn how long answers are.",
    "Residue in device memory outside of the cache's blocks (registers, scratch memory, drivers) is not covered.",
    (
        "The auditor checks which cache blocks each request may read and write, before every step. It reads the bytes "
        "of the cache and runs answers again alone in samples, at the rates that this report states; the arithmetic of "
        "the model and the words of answers that were not drawn are not inspected."
    ),
    (
        "Mappings to control frameworks name evidence that this report contributes. Whether a control is met is for an "
        "assessor to decide."
    ),
)

RELAXED = (
    "Isolation ran in relaxed mode: at every step the auditor checked that no request could read or write another "
    "tenant's cache blocks (logical isolation). It was not promised that an answer is bit for bit independent of "
    "which other requests were computed at the same time (bitwise non-interference)."
)


BITWISE = (
    "The engine ran in bitwise mode: by its own statement, made at each start, an answer is bit for bit independent of "
    "which other requests were computed at the same time (bitwise non-interference). The engine's tests check that "
    "before a release; at run time the auditor checks which cache blocks are read and written, and of the arithmetic "
    "only what is run again alone."
)


@dataclass(frozen=True, slots=True)
class Control:
    framework: str
    clause: str
    title: str
    status: str  # "supports" or "not assessed"
    evidence: str


def result(figures: Figures, scope: Scope) -> str:
    """The one-paragraph result."""
    requests, coverage = figures.requests, figures.coverage
    served = (
        f"Between {utc(scope.since_ns)} and {utc(scope.until_ns)} the service settled {requests.num_settled:,} "
        f"{_plural('request', requests.num_settled)} for {_tenants(figures)}. "
    )
    checked = (
        f"The isolation auditor checked {coverage.num_steps:,} engine steps and {coverage.num_slots_checked:,} cache "
        "writes, each before it ran"
    )
    blind = (
        f"For {seconds(coverage.blind_ns)} of the {seconds(coverage.worker_up_ns)} that the engine ran, nothing shows "
        "that the auditor was awake: for that time this report is blind."
    )
    match figures.verdict:
        case "clean":
            allowed = seconds(scope.heartbeat_gap_max_ns)
            verdict = f"{checked}, and found no violation. It was never silent for longer than {allowed} meanwhile."
        case "clean_with_gaps":
            verdict = f"{checked}, and found no violation. {blind}"
        case "violations":
            found = max(len(figures.incidents), coverage.num_violations)
            verdict = (
                f"{checked}, and found {found:,} {_plural('violation', found)} of isolation, listed below as logged."
            )
            verdict += f" {blind}" if coverage.blind_ns else ""
        case "not_assessed":
            verdict = (
                "Answers were settled, but the isolation auditor counted no engine step: their steps ran outside "
                "of the period, or were lost with a worker before its auditor was heard. "
                "This report says nothing about isolation in this period."
            )
        case "blind":
            verdict = (
                f"The engine ran for {seconds(coverage.worker_up_ns)}, but the isolation auditor was not heard: this "
                "report is blind and says nothing about isolation in this period."
            )
        case _:
            verdict = "No engine ran in this period, so there was nothing to check."
    again = _again(coverage) if figures.verdict in ("clean", "clean_with_gaps", "violations") else ""
    promised = _promised(frozenset(coverage.isolation_modes))
    silent_ns = scope.until_ns - max(coverage.last_entry_ns, scope.since_ns)
    silent = (
        f" The log ends {seconds(silent_ns)} before the end of the period and says nothing about that time."
        if silent_ns > scope.heartbeat_gap_max_ns
        else ""
    )
    return served + verdict + again + promised + silent


def _again(coverage: Coverage) -> str:
    """What was run again alone, as one in so many."""
    num, answers = coverage.num_replays, coverage.num_sequences
    if not answers:
        return ""
    if not num:
        return f" None of its {answers:,} {_plural('answer', answers)} was run again alone."
    differing = coverage.num_replays_differing
    found = f"{differing:,} {_plural('difference', differing)}"
    return (
        f" Of its {answers:,} {_plural('answer', answers)}, {num:,} {'was' if num == 1 else 'were'} run again alone "
        f"and compared bit by bit, 1 in {max(1, round(answers / num)):,}: {found}."
    )


def _promised(modes: frozenset[str]) -> str:
    """What the engine promised in the weakest mode that it ran in."""
    if modes == {"bitwise"}:
        return f" {BITWISE}"
    if modes == {"relaxed"}:
        return f" {RELAXED}"
    return f" For a part of this period: {RELAXED[0].lower()}{RELAXED[1:]}" if "relaxed" in modes else ""


def controls(figures: Figures) -> Sequence[Control]:
    """The small mapping table; each status is computed from the presence of evidence."""
    access, coverage, leaves = figures.access, figures.coverage, figures.leaves

    def control(framework: str, clause: str, title: str, present: bool, evidence: str) -> Control:
        status = "supports" if present else "not assessed"
        return Control(framework, clause, title, status, evidence if present else "no entries in this period")

    blind = seconds(coverage.blind_ns)
    heard = f"{coverage.num_heartbeats:,} heartbeats, {coverage.num_self_tests:,} self tests, {blind} blind"
    return (
        control(
            "SOC 2",
            "CC6.1",
            "Logical access",
            bool(figures.requests.num_admitted or access.keys_created or access.logins),
            f"{figures.requests.num_admitted:,} requests, each with its key's id; keys created: "
            f"{access.keys_created:,}, revoked: {access.keys_revoked:,}; log-ins: {access.logins:,}, "
            f"refused: {access.logins_failed:,}",
        ),
        control("SOC 2", "CC7.2", "Monitoring for anomalies", bool(coverage.num_heartbeats), heard),
        control(
            "ISO/IEC 27001:2022",
            "A.8.15",
            "Logging",
            bool(leaves.in_period),
            f"{leaves.in_period:,} entries under a signed Merkle root, {leaves.erased:,} erased with a receipt",
        ),
        control(
            "ISO/IEC 27001:2022",
            "A.8.22",
            "Segregation (here: of tenants in one cache)",
            bool(coverage.num_steps),
            f"{coverage.num_steps:,} steps and {coverage.num_slots_checked:,} cache writes checked, "
            f"{coverage.num_violations:,} violations",
        ),
        control(
            "EU AI Act",
            "Art. 12",
            "Record-keeping",
            bool(leaves.in_period),
            f"{leaves.in_period:,} events recorded automatically, of {len(leaves.by_kind)} kinds",
        ),
    )


def utc(at_ns: int) -> str:
    """Such as 23 November 2026, 18:00:05 UTC."""
    at = datetime.fromtimestamp(at_ns // SECOND_NS, UTC)
    return f"{at.day} {at:%B %Y, %H:%M:%S} UTC"


def seconds(duration_ns: int) -> str:
    """A duration in words, rounded up to whole seconds so that a gap never reads as nothing."""
    total = -(-duration_ns // SECOND_NS)
    hours, minutes = total // 3600, total % 3600 // 60
    parts = [(hours, "h"), (minutes, "min"), (total % 60, "s")]
    return " ".join(f"{n:,} {unit}" for n, unit in parts if n) or "0 s"


def _tenants(figures: Figures) -> str:
    num = sum(1 for tenant in figures.tenants if tenant.num_settled)
    return f"{num:,} {_plural('tenant', num)}"


def _plural(noun: str, num: int) -> str:
    return noun if num == 1 else noun + "s"
