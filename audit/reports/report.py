"""The isolation report: one signed statement about a period, made from the log and nothing else.

    build_report    database rows below the newest checkpoint -> Report (figures, plain words, what is not claimed)
    sign_report     Report -> in-toto Statement v1 in a DSSE envelope, by keys that sign nothing else
    write_report    NAME.dsse.json and NAME.pdf; the PDF is rendered from the signed bytes, so both say the same

The subject of the statement is the checkpoint: a report speaks of one log at one size, and a verifier who has that log
counts every figure again. Words are the operator's: the verifier lists them as not proven.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from audit.reports import wording
from audit.reports.dsse import sign_envelope
from audit.reports.figures import COVERAGE_KINDS, Figures, OpenLeaf, Scope, count_figures
from audit.reports.report_pdf import render_pdf
from audit.reports.wording import Control
from audit.transparency.checkpoint import Checkpoint, parse_checkpoint, parse_note
from audit.transparency.commitment import pseudonym
from audit.transparency.entry import is_decimal_field
from audit.transparency.keyring import Keyring
from audit.transparency.tables import checkpoint, log_leaf, log_opening
from audit.transparency.tiles import write_file

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://bulkhead.dev/attestation/isolation-report/v3"


class ReportError(Exception):
    """The report cannot be made; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Report:
    scope: Scope
    issued_ns: int
    head: Checkpoint
    note: str  # the signed checkpoint
    figures: Figures
    tenant_names: Mapping[str, str]  # pseudonym -> name
    result: str  # one paragraph
    controls: Sequence[Control]
    exclusions: Sequence[str]  # about the engine and this deployment, from the caller
    limits: Sequence[str]  # what no report of ours covers
    keys: Mapping[str, list[str]]

    def statement(self) -> dict[str, Any]:
        """The in-toto statement. Times and money are decimal strings, everything else whole numbers or text."""
        digest = hashlib.sha256(self.head.body().encode()).hexdigest()
        return {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": f"{self.head.origin}@{self.head.size}", "digest": {"sha256": digest}}],
            "predicateType": PREDICATE_TYPE,
            "predicate": {
                "scope": plain(asdict(self.scope)),
                "issued_ns": str(self.issued_ns),
                "log": {
                    "origin": self.head.origin,
                    "num_leaves": self.head.size,
                    "root": base64.b64encode(self.head.root).decode(),
                    "checkpoint": self.note,
                },
                "result": self.result,
                "figures": plain(asdict(self.figures)),
                "tenant_names": dict(self.tenant_names),
                "controls": [asdict(control) for control in self.controls],
                "exclusions": list(self.exclusions),
                "limits": list(self.limits),
                "keys": {name: list(texts) for name, texts in self.keys.items()},
            },
        }


@dataclass(frozen=True, slots=True)
class WrittenReport:
    dsse_path: Path
    pdf_path: Path
    statement_sha256: str


def plain(value: Any, name: str = "") -> Any:
    """JSON form of dataclass content: whole numbers named ``*_ns`` or ``*_nano_usd`` become decimal strings."""
    if isinstance(value, dict):
        return {key: plain(item, key) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, name) for item in value]
    if isinstance(value, int) and not isinstance(value, bool) and is_decimal_field(name):
        return str(value)
    return value


async def build_report(
    conn: AsyncConnection,
    since_ns: int,
    until_ns: int,
    *,
    signer: Keyring,
    now_ns: int,
    heartbeat_gap_max_ns: int,
    tenant_names: Mapping[str, str],
    exclusions: Sequence[str],
) -> Report:
    """Count the period [since_ns, until_ns) below the newest checkpoint.

    `tenant_names` maps tenant ids to names for the reader; `exclusions` says what this engine and deployment do not
    cover. Raises ReportError when the period is empty or nothing has been signed yet.
    """
    if not 0 <= since_ns < until_ns:
        raise ReportError(f"the period is empty: it starts at {since_ns} and ends before {until_ns}")
    row = (await conn.execute(select(checkpoint).order_by(checkpoint.c.num_leaves.desc()).limit(1))).one_or_none()
    if row is None:
        raise ReportError("the log has no checkpoint yet: wait for the first one and try again")
    head = parse_checkpoint(parse_note(row.note).body)
    scope = Scope(since_ns, until_ns, heartbeat_gap_max_ns)
    below = log_leaf.c.leaf_index < head.size
    period = await _read(conn, below, log_leaf.c.at_ns >= since_ns, log_leaf.c.at_ns < until_ns)
    coverage = await _read(conn, below, log_leaf.c.at_ns < until_ns, log_leaf.c.kind.in_(COVERAGE_KINDS))
    settled = await _read(
        conn, below, log_leaf.c.kind == "request.settled", log_leaf.c.leaf_index > _first_admitted(period, head.size)
    )
    last = (await conn.execute(select(func.max(log_leaf.c.at_ns)).where(below))).scalar_one()
    figures = count_figures(
        period,
        coverage,
        frozenset(leaf.body["request_id"] for leaf in settled if leaf.body is not None),
        num_leaves=head.size,
        last_entry_ns=last,
        scope=scope,
    )
    names = {pseudonym(signer.pseudonym_key, tenant_id): name for tenant_id, name in tenant_names.items()}
    shown = {t.tenant: names[t.tenant] for t in figures.tenants if t.tenant in names}
    return Report(
        scope=scope,
        issued_ns=now_ns,
        head=head,
        note=row.note,
        figures=figures,
        tenant_names=shown,
        result=wording.result(figures, scope),
        controls=wording.controls(figures),
        exclusions=tuple(exclusions),
        limits=wording.LIMITS,
        keys=signer.public(),
    )


def sign_report(report: Report, signer: Keyring) -> tuple[bytes, str]:
    """The DSSE envelope and the statement's sha256 in hex."""
    payload = json.dumps(report.statement(), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return sign_envelope(payload, signer.report), hashlib.sha256(payload).hexdigest()


def write_report(report: Report, folder: Path, name: str, *, signer: Keyring) -> WrittenReport:
    """Sign and write NAME.dsse.json and NAME.pdf. CPU heavy (about a second): call it in a thread."""
    envelope, digest = sign_report(report, signer)
    written = WrittenReport(folder / f"{name}.dsse.json", folder / f"{name}.pdf", digest)
    pdf = render_pdf(envelope, file_name=written.dsse_path.name)
    write_file(written.dsse_path, envelope)
    write_file(written.pdf_path, pdf)
    return written


async def _read(conn: AsyncConnection, *conditions: Any) -> list[OpenLeaf]:
    query = (
        select(log_leaf.c.leaf_index, log_leaf.c.kind, log_leaf.c.at_ns, log_leaf.c.pseudonym, log_opening.c.body)
        .select_from(log_leaf.outerjoin(log_opening, log_leaf.c.leaf_index == log_opening.c.leaf_index))
        .where(*conditions)
        .order_by(log_leaf.c.leaf_index)
    )
    return [
        OpenLeaf(row.leaf_index, row.kind, row.at_ns, row.pseudonym, None if row.body is None else json.loads(row.body))
        for row in (await conn.execute(query)).all()
    ]


def _first_admitted(period: Sequence[OpenLeaf], default: int) -> int:
    return min((leaf.leaf_index for leaf in period if leaf.kind == "request.admitted"), default=default)
