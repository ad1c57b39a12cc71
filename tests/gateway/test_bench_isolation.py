"""`bulkhead bench isolation`: its sums, and that each level samples what it says."""

from typing import Any

import numpy as np
import pytest

from engine.events import Watched
from gateway.audited_bench import LEVELS
from gateway.commands.bench_isolation import Level, summary
from tests.strategies.tiny_model import write_tiny_model


def row(level: str, concurrency: int, share: float, **counters: int) -> dict[str, Any]:
    counted = {"num_steps": 10, "num_violations": 0, "num_replays": 0, "num_replay_bits_differing": 0} | counters
    return {"level": level, "concurrency": concurrency, "audit_share": share, "observer": counted}


def test_shares_are_by_level_and_everything_else_is_summed() -> None:
    rows = [row("books", 8, 0.01), row("full", 8, 0.03, num_replays=7), row("full", 32, 0.02, num_violations=2)]
    rows.append(row("default", 8, 0.02, num_replays=1, num_replay_bits_differing=64))
    assert summary(rows) == {
        "audit_cost_share": {"books": {"8": 0.01}, "full": {"8": 0.03, "32": 0.02}, "default": {"8": 0.02}},
        "steps_audited": 40,
        "false_alarms": 2,
        "traces_compared": 8,
        "differing_bits": 64,
    }


@pytest.mark.parametrize(("level", "slots", "percent"), [("books", 0, 0), ("default", 256, 5), ("full", 2**31, 100)])
def test_a_level_is_what_it_says(tmp_path: Any, level: str, slots: int, percent: int) -> None:
    write_tiny_model(tmp_path)
    observer = LEVELS[level](Watched(4, 4, tmp_path, (np.zeros((1, 4, 4, 1), np.uint64),)))
    counters = observer.counters()
    assert (counters["slots_per_step"], counters["replay_percent"]) == (slots, percent)
    assert set(LEVELS) == set(Level)
