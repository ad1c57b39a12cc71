"""The report as a PDF for people: a pure function of the signed envelope, so it can be rendered again, byte for byte.

Typst gets only fonts that it carries and the report's own time of issue, so two machines give the same file. The PDF
is not signed; it prints the sha256 of the signed statement, and how to check it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import typst

from audit.reports.dsse import read_payload
from audit.reports.wording import SECOND_NS, seconds, utc

TEMPLATE = Path(__file__).parent / "templates" / "report.typ"

_VERDICTS = {
    "clean": ("No violation found", "good"),
    "clean_with_gaps": ("No violation found, with blind time", "warn"),
    "violations": ("Violations found", "bad"),
    "not_assessed": ("Not assessed: answers without counted steps", "bad"),
    "blind": ("Blind: not audited", "bad"),
    "no_activity": ("No activity", "idle"),
}
_ACCESS = {
    "keys_created": "API keys created",
    "keys_revoked": "API keys revoked",
    "limits_changed": "Limits changed",
    "logins": "Operator log-ins",
    "logins_failed": "Log-ins refused",
    "operators_created": "Operators created",
}
_REASONS = {
    "no_heartbeat": "The auditor sent no heartbeat",
    "self_test_failed": "The auditor's self test failed",
    "unrecorded_stop": "The service ended without an entry (crash or power loss)",
}


def render_pdf(envelope: bytes, *, file_name: str) -> bytes:
    """The PDF of a signed report. `file_name` is the envelope's name, printed in the instructions."""
    payload = read_payload(envelope)
    statement = json.loads(payload)
    data = page_data(statement, hashlib.sha256(payload).hexdigest(), file_name)
    pdf = typst.compile(
        str(TEMPLATE),
        root=str(TEMPLATE.parent),
        format="pdf",
        ignore_system_fonts=True,
        sys_inputs={"data": json.dumps(data)},
        timestamp=int(statement["predicate"]["issued_ns"]) // SECOND_NS,
    )
    return bytes(pdf)


def page_data(statement: dict[str, Any], digest: str, file_name: str) -> dict[str, Any]:
    """What the template prints: text only, formatted here."""
    predicate = statement["predicate"]
    figures, log = predicate["figures"], predicate["log"]
    coverage, requests = figures["coverage"], figures["requests"]
    label, tone = _VERDICTS[figures["verdict"]]
    blind_ns, up_ns = int(coverage["blind_ns"]), int(coverage["worker_up_ns"])
    violations = max(len(figures["incidents"]), coverage["num_violations"])
    return {
        "origin": log["origin"],
        "since": utc(int(predicate["scope"]["since_ns"])),
        "until": utc(int(predicate["scope"]["until_ns"])),
        "issued": utc(int(predicate["issued_ns"])),
        "verdict": label,
        "tone": tone,
        "result": predicate["result"],
        "tiles": [
            [f"{requests['num_settled']:,}", "requests settled", _outcomes(requests)],
            [f"{coverage['num_steps']:,}", "engine steps audited", f"{coverage['num_slots_checked']:,} cache writes"],
            [f"{violations:,}", "violations", f"{coverage['num_self_tests']:,} self tests of the auditor"],
            [seconds(blind_ns), "blind time", f"of {seconds(up_ns)} of engine time"],
        ],
        "tenants": sorted(_tenant(row, predicate["tenant_names"]) for row in figures["tenants"]),
        "total": _tenant({"tenant": "", **requests, **figures["money"]}, {}),
        "coverage": _coverage(coverage, predicate["scope"]),
        "gaps": [
            [utc(int(g["from_ns"])), seconds(int(g["until_ns"]) - int(g["from_ns"])), _REASONS[g["reason"]]]
            for g in coverage["gaps"]
        ],
        "incidents": [
            [utc(int(i["at_ns"])), f"{i['leaf_index']:,}", i["rule"], f"{i['step']:,}", i["detail"]]
            for i in figures["incidents"]
        ],
        "access": [[f"{figures['access'][name]:,}", label] for name, label in _ACCESS.items()],
        "controls": [
            [f"{c['framework']} {c['clause']}", c["title"], c["status"], c["evidence"]] for c in predicate["controls"]
        ],
        "exclusions": predicate["exclusions"],
        "limits": predicate["limits"],
        "leaves": f"{log['num_leaves']:,}",
        "erased": f"{figures['leaves']['erased']:,}",
        "root": log["root"],
        "digest": digest,
        "file_name": file_name,
        "keys": [_key(text) for texts in predicate["keys"].values() for text in texts],
    }


def _outcomes(requests: dict[str, Any]) -> str:
    names = ("captured", "voided", "expired", "recovered", "open")
    return ", ".join(f"{requests[name]:,} {name}" for name in names if requests[name]) or "none"


def _tenant(row: dict[str, Any], names: dict[str, str]) -> list[str]:
    shown = names.get(row["tenant"], "") or ("no tenant" if row["tenant"] == "" else "unnamed")
    return [
        shown,
        row["tenant"],
        f"{row['num_settled']:,}",
        f"{row['num_prompt_tokens']:,}",
        f"{row['num_cached_tokens']:,}",
        f"{row['num_completion_tokens']:,}",
        usd(int(row["charged_nano_usd"])),
        usd(int(row.get("refunded_nano_usd", 0))),  # version 1 had none
    ]


def _coverage(coverage: dict[str, Any], scope: dict[str, Any]) -> list[list[str]]:
    modes = ", ".join(coverage["isolation_modes"]) or "no engine ran"
    return [
        ["Isolation mode, as the engine reports it", modes],
        ["Model", "\n".join(_short_model(text) for text in coverage["models"]) or "none"],
        ["Kernels", ", ".join(coverage["kernels"]) or "none"],
        ["Engine epochs (starts of a worker)", f"{coverage['num_epochs']:,}"],
        ["Heartbeats of the auditor", f"{coverage['num_heartbeats']:,}"],
        ["Longest silence that does not count as blind", seconds(int(scope["heartbeat_gap_max_ns"]))],
        [
            "Self tests (a synthetic violation must be caught)",
            _self_tests(coverage),
        ],
        *_sampled(coverage),
        ["Last entry of the log", utc(int(coverage["last_entry_ns"]))],
    ]


def _sampled(coverage: dict[str, Any]) -> list[list[str]]:
    """What is checked in samples, with the rates; versions before 3 did not say."""
    if "num_replays" not in coverage:
        return []
    slots, percents = (", ".join(map(str, coverage[name])) for name in ("slots_per_step", "replay_percents"))
    again = (
        f"{coverage['num_replays']:,} of {coverage['num_sequences']:,}, {coverage['num_replays_differing']:,} differed"
    )
    return [
        [
            "Cache slots whose bytes were compared",
            f"{coverage['num_slots_read']:,}; before a step at most: {slots or 'none'}",
        ],
        ["Answers that were run again alone", f"{again}; setting in percent: {percents or 'none'}"],
        ["Canaries", f"{coverage['num_canaries']:,}"],
    ]


def _self_tests(coverage: dict[str, Any]) -> str:
    failed = coverage["num_heartbeats_self_test_failed"]
    return f"{coverage['num_self_tests']:,} run; heartbeats after a failure: {failed:,}"


def _short_model(text: str) -> str:
    name, _, digest = text.rpartition(" ")
    return f"{name} ({digest[:23]}…)" if len(digest) > 24 else text


def _key(text: str) -> list[str]:
    name, identifier, blob = text.split("+", 2)
    kind = "Ed25519" if len(blob) < 60 else "ML-DSA-44"
    return [f"{name}+{identifier}", kind, hashlib.sha256(text.encode()).hexdigest()]


def usd(amount_nano_usd: int) -> str:
    """Exact, with as many decimals as it needs, two at least: $0.000123456."""
    whole, nano = divmod(abs(amount_nano_usd), SECOND_NS)
    decimals = f"{nano:09d}".rstrip("0").ljust(2, "0")
    return f"{'-' if amount_nano_usd < 0 else ''}${whole:,}.{decimals}"
