"""bulkhead audit: log, report, verify."""

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

import gateway
from audit.transparency.checkpoint import parse_checkpoint, parse_note
from audit.transparency.entry import Entry
from audit.transparency.keyring import Keyring, load_keyring
from audit.transparency.log import publish, sequence
from audit.transparency.outbox import append
from audit.transparency.tables import log_leaf, log_opening
from gateway.commands.audit_probe import audit_probe
from gateway.commands.bench_process import speak
from gateway.commands.session import CommandError, Session, in_transaction, open_session
from gateway.host.folders import FolderError, only_server
from tenancy.access.directory import list_tenants

app = typer.Typer(no_args_is_help=True, help="The transparency log, reports and their verification; probes.")
app.command("probe")(audit_probe)

KILL_MATRIX_TIMEOUT_S = 4 * 3_600  # a million clean steps take a good half of an hour
PUBLISH_TIMEOUT_NS = 30 * 10**9
HEARTBEATS_MISSED_MAX = 3  # a gap longer than this many intervals is reported as blind

# What a reader of a report must know about this version's engine; the rest of the limits is the report's own text.
ENGINE_EXCLUSIONS = (
    (
        "Bitwise non-interference is promised only for the time that the engine ran in bitwise mode, per instruction "
        "set; in relaxed mode a batch's other sequences can change a row's last bits."
    ),
    "Sequences of one tenant that begin with the same tokens share KV blocks; heavy use by one tenant evicts others'.",
    (
        "Bytes of the KV cache are read in samples: a few words of each slot, at one layer, when it is written, when "
        "its block is shared and when a block is said to be zero, and of at most {slots} slots before each step "
        "(by the settings with which this report was made)."
    ),
    (
        "What a kernel does with correct arrays is tested before a release. At run time it shows only in answers that "
        "are run again alone, at the rate that this report states, and after they have left. The last product is the "
        "exception, for models that the engine's own code runs on a CPU: there each drawn token's logit is computed "
        "again before it leaves. For other models, and on a GPU, the head is not witnessed; /readyz says which it is."
    ),
    "Queueing delay and load are not hidden from tenants.",
)


@app.command("log")
def audit_log(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="how many entries")] = 20,
    kind: Annotated[str, typer.Option(help="only entries of this kind")] = "",
) -> None:
    """Print the newest sequenced entries as JSON lines, oldest first."""
    session = open_session()

    async def work(conn: AsyncConnection) -> list[str]:
        query = (
            select(
                log_leaf.c.leaf_index, log_leaf.c.kind, log_leaf.c.at_ns, log_opening.c.tenant_id, log_opening.c.body
            )
            .select_from(log_leaf.outerjoin(log_opening, log_leaf.c.leaf_index == log_opening.c.leaf_index))
            .order_by(log_leaf.c.leaf_index.desc())
            .limit(limit)
        )
        if kind:
            query = query.where(log_leaf.c.kind == kind)
        rows = (await conn.execute(query)).all()
        return [
            json.dumps(
                {
                    "index": row.leaf_index,
                    "at": datetime.fromtimestamp(row.at_ns // 10**9, UTC).isoformat(),
                    "kind": row.kind,
                    "tenant": row.tenant_id,
                    "body": None if row.body is None else json.loads(row.body),
                }
            )
            for row in reversed(rows)
        ]

    for line in in_transaction(session, work):
        typer.echo(line)


@app.command("report")
def audit_report(
    since: Annotated[str, typer.Option(help="ISO 8601, UTC unless it says otherwise; default: the beginning")] = "",
    until: Annotated[str, typer.Option(help="ISO 8601; default: now")] = "",
    out: Annotated[Path | None, typer.Option(help="folder; default: reports in the data folder")] = None,
) -> None:
    """Write a signed report of a period as DSSE JSON and PDF."""
    from audit.reports.report import Report, build_report, write_report  # loads typst, which other commands do not need

    session = open_session()
    now_ns = session.world.now_ns()
    since_ns = parse_time(since, "--since") if since else 0
    until_ns = min(parse_time(until, "--until"), now_ns) if until else now_ns
    if since_ns >= until_ns:
        raise CommandError(f"--since {since or 'the beginning'} is not before --until {until or 'now'}")
    settings = session.settings
    folder = out or session.folders.reports
    keyring = load_keyring(session.folders.log_keys, origin=session.settings.log_origin, entropy=session.world.entropy)

    async def build(conn: AsyncConnection) -> Report:
        # What waits in the outbox belongs to the period: sequence it first, so that the report covers it.
        while await sequence(conn, signer=keyring, origin=session.settings.log_origin, now_ns=now_ns):
            pass
        return await build_report(
            conn,
            since_ns or await first_entry_ns(conn),
            until_ns,
            signer=keyring,
            now_ns=now_ns,
            heartbeat_gap_max_ns=HEARTBEATS_MISSED_MAX * session.settings.heartbeat_interval_s * 10**9,
            tenant_names={tenant.tenant_id: tenant.name for tenant in await list_tenants(conn)},
            exclusions=tuple(text.format(slots=settings.audit_slots_per_step) for text in ENGINE_EXCLUSIONS),
        )

    report = in_transaction(session, build)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"isolation-report-{datetime.fromtimestamp(now_ns // 10**9, UTC):%Y%m%dT%H%M%SZ}"
    written = write_report(report, folder, name, signer=keyring)
    body: dict[str, str | int | bool | list[str]] = {
        "name": name,
        "statement_sha256": written.statement_sha256,
        "since_ns": report.scope.since_ns,
        "until_ns": until_ns,
    }

    async def record(conn: AsyncConnection) -> None:
        entry = Entry("report.issued", "", session.world.now_ns(), body)
        await append(conn, entry, entropy=session.world.entropy)

    in_transaction(session, record)
    bring_log_up_to(session, keyring, report.head.size)
    typer.echo(written.dsse_path)
    typer.echo(written.pdf_path)


@app.command("kill-matrix")
def audit_kill_matrix(
    seeds: Annotated[int, typer.Option(min=1, max=1_000, help="random loads for each fault")] = 8,
    clean_steps: Annotated[int, typer.Option(min=1, help="audited steps of the clean engine, at least")] = 20_000,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the whole table here")] = None,
) -> None:
    """Plant known faults in the engine, on a small model, and show which of them the run-time auditor catches. The
    faults are part of the tests: this needs a checkout of the source."""
    numbers = ("--seeds", str(seeds), "--clean-steps", str(clean_steps))
    found = speak("tests.faults", *numbers, folder=checkout(), timeout_s=KILL_MATRIX_TIMEOUT_S)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1))
    for row in found["faults"]:
        verdict = "caught" if row["detected"] else "MISSED"
        typer.echo(f"{row['id']} {verdict} {row['severity']:<10} {row['name']}: {', '.join(row['detectors'][:3])}")
    typer.echo(f"{found['summary']}")
    typer.echo(f"{found['baselines']}; {found['false_alarms']} false alarms in {found['steps_audited']} clean steps")


def checkout() -> Path:
    """The folder of the source that this program runs from, tests included. Raises CommandError where it is not
    there."""
    folder = Path(gateway.__file__).parent.parent
    if not (folder / "tests" / "faults" / "__main__.py").is_file():
        raise CommandError(
            f"the planted faults are part of the source's tests and are not installed ({folder} has none): "
            "get the source of this version, run `make setup` in it, and there `.venv/bin/bulkhead audit kill-matrix`"
        )
    return folder


@app.command("verify")
def audit_verify(
    log: Annotated[Path | None, typer.Option(help="the log's folder; default: the data folder's log")] = None,
    report: Annotated[Path | None, typer.Option(help="a report to check against the log")] = None,
    key: Annotated[list[str] | None, typer.Option(help="a verifier key to trust, or a file of them")] = None,
    since_checkpoint: Annotated[Path | None, typer.Option(help="an earlier checkpoint that you kept")] = None,
) -> None:
    """Check the published log, and a report, offline; exit code 1 when something does not hold."""
    from audit import verify as verifier

    pinned = list(key or [])
    if log is None:
        session = open_session()
        log = session.folders.log
        pinned = pinned or own_keys(session)
    keys = [argument for one in pinned for argument in ("--key", one)]
    code = 0
    if report is not None:
        code = verifier.main(["report", str(report), "--log", str(log), *keys])
    else:
        since = ["--since-checkpoint", str(since_checkpoint)] if since_checkpoint is not None else []
        code = verifier.main(["log", str(log), *since, *keys])
    raise typer.Exit(code)


async def first_entry_ns(conn: AsyncConnection) -> int:
    """When the log began: the start of a report that names none."""
    return int(await conn.scalar(select(log_leaf.c.at_ns).where(log_leaf.c.leaf_index == 0)) or 0)


def bring_log_up_to(session: Session, keyring: Keyring, num_leaves: int) -> None:
    """Have the published log cover `num_leaves`: by the running server, which publishes alone, or else by us."""
    try:
        with only_server(session.folders):
            in_transaction(session, lambda conn: publish(conn, session.folders.log, signer=keyring))
            return
    except FolderError:
        pass  # a server is running: it publishes every few seconds
    deadline_ns = session.world.monotonic_ns() + PUBLISH_TIMEOUT_NS
    while published_size(session.folders.log) < num_leaves:
        if session.world.monotonic_ns() > deadline_ns:
            raise CommandError(f"the running server has not published the log in {session.folders.log}; see its errors")
        time.sleep(0.1)


def published_size(folder: Path) -> int:
    try:
        return parse_checkpoint(parse_note((folder / "checkpoint").read_text()).body).size
    except FileNotFoundError:
        return 0


def own_keys(session: Session) -> list[str]:
    """The verifier keys of this data folder's own secrets: here there is no need to trust the log's copy."""
    keyring = load_keyring(session.folders.log_keys, origin=session.settings.log_origin, entropy=session.world.entropy)
    return [vkey for vkeys in keyring.public().values() for vkey in vkeys]


def parse_time(text: str, option: str) -> int:
    """Nanoseconds since the epoch of an ISO 8601 time."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise CommandError(f"{option} {text!r} is not an ISO 8601 time, such as 2026-11-01T12:00") from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return int(moment.timestamp()) * 10**9
