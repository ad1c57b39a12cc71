"""`bulkhead audit probe URL`: is an OpenAI-compatible server's isolation to be seen from outside? Two keys suffice."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from audit.probes.probe_verdict import ALPHA, MARGIN, overall
from gateway.commands.session import CommandError
from gateway.probe.run import PROBES, Plan, ProbeError, run_probes
from gateway.world import real_world

EXIT_CODES = {"pass": 0, "inconclusive": 3, "leak": 4}
STYLES = {"pass": "green", "inconclusive": "yellow", "leak": "bold red"}


def audit_probe(
    url: Annotated[str, typer.Argument(help="the server, such as https://127.0.0.1:8443")],
    key_a: Annotated[str, typer.Option(envvar="BULKHEAD_PROBE_KEY_A", help="API key of one tenant")],
    key_b: Annotated[str, typer.Option(envvar="BULKHEAD_PROBE_KEY_B", help="API key of another tenant")],
    ca: Annotated[Path | None, typer.Option(help="certificate authority to trust; left out: the system's")] = None,
    model: Annotated[str, typer.Option(help="left out: the first that the server lists")] = "",
    probe: Annotated[list[str] | None, typer.Option(help="only this one; may be repeated")] = None,
    rounds: Annotated[int, typer.Option(min=4, max=200, help="of the three timed arms, six requests each")] = 14,
    words: Annotated[int, typer.Option(min=16, max=20_000, help="length of a timed prefix")] = 300,
    answers: Annotated[int, typer.Option(min=4, max=10_000, help="of each tenant, in the canary probe")] = 40,
    questions: Annotated[int, typer.Option(min=1, max=1_000, help="in the invariance probe")] = 4,
    seconds: Annotated[int, typer.Option(min=10, max=86_400, help="the whole run ends after this time")] = 600,
    json_file: Annotated[Path | None, typer.Option("--json", help="write plan, figures and verdicts here")] = None,
) -> None:
    """Probe a server for leaks between two tenants. Only for servers that you run or may test."""
    if unknown := sorted(set(probe or ()) - set(PROBES)):
        raise CommandError(f"there is no probe {', '.join(unknown)}: choose from {', '.join(PROBES)}")
    if key_a == key_b:
        raise CommandError("--key-a and --key-b are the same key: the probes need two tenants")
    plan = Plan(rounds=rounds, words=words, answers=answers, questions=questions, seconds=float(seconds))
    if probe:
        plan = replace(plan, probes=tuple(name for name in PROBES if name in probe))
    with Console(stderr=True).status("connecting") as status:
        try:
            findings = run_probes(
                url,
                key_a,
                key_b,
                ca=ca,
                plan=plan,
                entropy=real_world().entropy,
                model=model,
                progress=status.update,
            )
        except ProbeError as error:
            raise CommandError(str(error)) from error
    verdict = overall(findings)
    if json_file is not None:
        told = {
            "url": url,
            "verdict": verdict,
            "alpha": ALPHA,
            "margin": MARGIN,
            "plan": asdict(plan),
            "findings": [asdict(finding) for finding in findings],
        }
        json_file.write_text(json.dumps(told, indent=1))
    table = Table("probe", "verdict", "why", box=None)
    for finding in findings:
        table.add_row(finding.probe, f"[{STYLES[finding.verdict]}]{finding.verdict}[/]", finding.why)
    console = Console()
    console.print(table)
    console.print(f"\nverdict: [{STYLES[verdict]}]{verdict}[/]", highlight=False)
    raise typer.Exit(EXIT_CODES[verdict])
