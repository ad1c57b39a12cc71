"""Each fault under random loads, once unwatched and once under the run-time auditor: was it reached, did it harm, who
noticed and when."""

from typing import Any

from engine import core
from tests.faults.catalogue import FAULTS, Fault
from tests.faults.known_faults import KNOWN, NONE
from tests.faults.stage import Run, load, perform, prepare, with_forks

engine_core: Any = core


def play(fault: Fault | None, seed: int, *, audited: bool) -> Run:
    run = prepare(audited)
    build = engine_core.build_batch
    if fault is not None:
        fault.plant(run)
    change = run.change_batch
    if change is not None:
        engine_core.build_batch = lambda *arguments: change(build(*arguments))
    try:
        perform(run, load(seed))
    finally:
        engine_core.build_batch = build
    return run


def row_of(fault: Fault, num_seeds: int, enough: int = 0) -> dict[str, Any]:
    """`detected`: by the auditor, in every load in which the fault was reached there and did harm unwatched.
    ``enough``: stop after so many of those loads, 0 never."""
    reached = infected = output_only = sum_only = False
    caught, missed, released_wrong, step, late, num_harmful = set[str](), 0, 0, -1, 0, 0
    for seed in range(num_seeds):
        if enough and num_harmful >= enough:
            break
        bare, watched = play(fault, seed, audited=False), play(fault, seed, audited=True)
        if bare.reached_step < 0:
            continue
        reached = True
        harm = max(bare.wrong_output_step, bare.wrong_count_step) >= 0 or bare.wrong_end
        infected |= harm
        num_harmful += harm
        output_only |= bare.wrong_output_step >= 0
        sum_only |= bare.wrong_sum_step >= 0
        if watched.detected_step >= 0:
            caught |= set(watched.detectors)
            step = watched.detected_step - watched.reached_step if step < 0 else step
        elif harm:
            missed += 1
        released_wrong += watched.wrong_output_step >= 0
        first = min((s for s in (bare.wrong_output_step, bare.wrong_count_step) if s >= 0), default=-1)
        late += watched.detected_step > first >= 0
    return {
        "id": fault.fault_id,
        "name": fault.name,
        "severity": fault.severity,
        "known": fault.known,
        "reached": reached,
        "infected": infected,
        "detected": bool(caught) and not missed,
        "detectors": sorted(caught),
        "step_of_detection": step,  # after the step in which it was reached; -1 never
        "loads_missed": missed,
        "loads_detected_after_harm": late,
        "loads_with_a_wrong_byte_released": released_wrong,
        "before_release": bool(caught) and not (missed or late or released_wrong),
        "baselines": {
            "output_comparison": output_only,
            "accounting_sum": sum_only,
            "salt": fault.fault_id in ("C01", "C02"),
        },
    }


def planted_as(known: str) -> str:
    """The plants that stand for a known fault."""
    return ", ".join(fault.fault_id for fault in FAULTS if fault.known == known)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the table says in a few numbers. A disclosure counts as caught in its step when nothing wrong left."""
    disclosures = [row for row in rows if row["severity"] == "disclosure"]
    in_step = [row for row in disclosures if row["detected"] and not row["loads_detected_after_harm"]]
    return {
        "faults": len(rows),
        "reached": sum(row["reached"] for row in rows),
        "infected": sum(row["infected"] for row in rows),
        "detected": sum(row["detected"] for row in rows),
        "missed": [row["id"] for row in rows if not row["detected"]],
        "harmless_on_these_loads": [row["id"] for row in rows if row["reached"] and not row["infected"]],
        "disclosures": len(disclosures),
        "disclosures_detected_before_harm": len(in_step),
    }


def kill_matrix(num_seeds: int) -> dict[str, Any]:
    rows = [row_of(fault, num_seeds) for fault in FAULTS]
    planted = {name: planted_as(name) for name in KNOWN if planted_as(name)}
    known = {name: planted.get(name, text) for name, (_, text) in KNOWN.items()}
    names = ("output_comparison", "accounting_sum", "salt")
    return {
        "faults": rows,
        "known": known,
        "not_applicable": {name: text for name, text in known.items() if text.startswith(NONE)},
        "summary": summary(rows),
        "baselines": {name: sum(row["baselines"][name] for row in rows) for name in names}
        | {"auditor": sum(row["detected"] for row in rows), "faults": len(rows)},
    }


def clean_steps(num_steps: int, first_seed: int = 1_000_000) -> dict[str, Any]:
    """The clean engine under the auditor, with aborts, preemption, forks and canaries, and everything run again alone:
    every detection is a false alarm. ``first_seed``: of the loads, which are numbered on from there."""
    seed = first_seed
    found = dict.fromkeys(("steps_audited", "false_alarms", "clean_runs_wrong", "clean_runs"), 0)
    happened = dict.fromkeys(("aborts", "preemptions", "forks", "replays", "canaries"), 0)
    while found["steps_audited"] < num_steps:
        arrivals = with_forks(load(seed), seed)
        run = prepare(audited=True, canaries=True)
        perform(run, arrivals)
        seed += 1
        found["steps_audited"] += run.num_steps
        found["false_alarms"] += len(run.detectors)
        found["clean_runs_wrong"] += run.wrong_output_step >= 0 or run.wrong_count_step >= 0 or run.wrong_end
        found["clean_runs"] += 1
        counters = run.core.observer.counters()
        happened["aborts"] += run.num_aborts
        happened["preemptions"] += run.core.scheduler.num_preemptions
        happened["forks"] += sum("." in one.submit.sequence_id for one in arrivals)
        happened["replays"] += counters["num_replays"]
        happened["canaries"] += counters["num_canaries"]
    return found | {"clean_happened": happened}
