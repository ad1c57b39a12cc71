"""Blind is a fault: an auditor that has not spoken is never shown as fine."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.protocol import PROTOCOL_VERSION, Ready, Stats
from gateway.admin.audit_queries import LoggedEntry, LogState
from gateway.admin.health import audit_fact, log_fact, stores_fact, worker_fact
from gateway.admin.wording import NS_PER_S, duration, in_column, moment, plural, utc
from gateway.engine_link import EngineStatus
from gateway.rights.standing import Standing
from tenancy.money import format_nano_usd

NOW = 1_700_000_000 * NS_PER_S
READY = Ready(PROTOCOL_VERSION, "e1", 7, "m", "d", 2048, 49152, 32, 100, "bfloat16", "cpu", "torch", "strict")
STATS = Stats(5, 1, 0, 100, 90, {"ten_a": 10}, 1, 1, 0, {})
UP = EngineStatus("ready", 0, READY, STATS)
BEAT = {
    "epoch": "e1",
    "num_steps": 1,
    "num_slots_checked": 2048,
    "num_violations": 0,
    "num_self_tests": 3,
    "last_self_test_ok": True,
}


def look(age_s: int | None = 1, engine: EngineStatus = UP, num_violations: int = 0, **body: Any) -> tuple[str, str]:
    beat = None if age_s is None else LoggedEntry(NOW - age_s * NS_PER_S, BEAT | body)
    fact = audit_fact(beat, num_violations, engine, heartbeat_interval_s=10, now_ns=NOW)
    return fact.state, fact.word


def test_awake_only_when_everything_says_so() -> None:
    assert look() == ("good", "Awake")
    assert look(30) == ("good", "Awake")


@pytest.mark.parametrize(
    ("case", "word"),
    [
        ({"age_s": 31}, "Blind: no recent heartbeat"),
        ({"age_s": None}, "Blind: no recent heartbeat"),
        ({"engine": replace(UP, state="lost")}, "Blind: no worker to audit"),
        ({"engine": EngineStatus("starting", 0, None, None)}, "Blind: no worker to audit"),
        ({"last_self_test_ok": False}, "Blind: self-test failed"),
        ({"num_violations": 1}, "Isolation was violated"),
        ({"num_violations": 1, "age_s": None}, "Isolation was violated"),
    ],
)
def test_anything_else_is_bad(case: dict[str, Any], word: str) -> None:
    assert look(**case) == ("bad", word)


def test_a_heartbeat_of_the_worker_before_says_nothing_about_this_one() -> None:
    assert look(epoch="e0") == ("warn", "Waking: this worker has sent no heartbeat yet")
    assert look(31, epoch="e0") == ("bad", "Blind: no recent heartbeat")


def test_a_violation_counted_by_the_heartbeat_alone_is_bad() -> None:
    beat = LoggedEntry(NOW, BEAT | {"num_violations": 1})
    assert audit_fact(beat, 0, UP, heartbeat_interval_s=10, now_ns=NOW).state == "bad"


def test_relaxed_isolation_is_never_shown_as_good() -> None:
    relaxed = replace(UP, ready=msgspec.structs.replace(READY, isolation="relaxed"))
    assert worker_fact(UP, None, 0, NOW).state == "good"
    fact = worker_fact(relaxed, None, 0, NOW)
    assert (fact.state, fact.word, fact.lines["isolation"]) == (
        "warn",
        "Ready, isolation relaxed",
        "Isolation mode: relaxed",
    )


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_the_log_is_behind_when_the_oldest_entry_waits_too_long(signed_s: int, waiting_s: int) -> None:
    log = LogState(12, NOW - signed_s * NS_PER_S, 3, NOW - waiting_s * NS_PER_S)
    fact = log_fact(log, checkpoint_interval_ms=2000, now_ns=NOW)
    assert (fact.state == "bad") == (waiting_s > 10)
    assert log_fact(LogState(12, NOW, 0, None), checkpoint_interval_ms=2000, now_ns=NOW).state == "good"
    assert log_fact(LogState(0, None, 0, None), checkpoint_interval_ms=2000, now_ns=NOW).state == "warn"


def test_facts_of_one_kind_have_the_same_lines() -> None:
    up = worker_fact(UP, LoggedEntry(NOW, {"epoch": "e1"}), 2, NOW)
    down = worker_fact(EngineStatus("lost", 2, None, None), None, 0, NOW)
    assert up.lines.keys() == down.lines.keys()
    assert up.lines["blocks"] == "10 of 100 KV blocks in use, 2 by no tenant"
    assert down.lines["uptime"] == "2 restarts"
    never = log_fact(LogState(0, None, 0, None), checkpoint_interval_ms=2000, now_ns=NOW)
    assert never.lines.keys() == log_fact(LogState(1, NOW, 0, None), checkpoint_interval_ms=1, now_ns=NOW).lines.keys()


@pytest.mark.parametrize(
    ("seen", "state", "line"),
    [
        (None, "good", ""),
        (Standing("server"), "good", "Append-only is held by rights"),
        (Standing(""), "good", "Append-only is held by triggers"),  # SQLite: there is no more to be had
        (Standing("owner", excess=("owns the tables",)), "warn", "Append-only is held by triggers"),
        (Standing("owner", excess=("owns the tables",), unguarded=("price",)), "bad", "Append-only is held by nothing"),
    ],
)
def test_books_that_a_server_could_rewrite_are_not_shown_as_fine(seen: Standing | None, state: str, line: str) -> None:
    fact = stores_fact("PostgreSQL", 100, 100, seen)
    assert (fact.state, fact.lines["append_only"]) == (state, line)


@given(st.integers(-(10**15), 10**18))
def test_a_duration_is_short_and_never_negative(duration_ns: int) -> None:
    text = duration(duration_ns)
    assert "-" not in text
    assert len(text) <= 14


@given(st.integers(-(2**63), 2**63))
def test_amounts_in_a_column_lose_nothing_and_align(nano_usd: int) -> None:
    text = in_column(nano_usd, "USD")
    assert text.rstrip("\u2007") == format_nano_usd(nano_usd)
    assert len(text) - text.index(".") == 10


def test_wording() -> None:
    assert [duration(s * NS_PER_S) for s in (0, 59, 60, 3599, 3600, 90_061)] == [
        "0 s",
        "59 s",
        "1 min 0 s",
        "59 min 59 s",
        "1 h 0 min",
        "1 d 1 h",
    ]
    assert utc(1_763_923_445_999_999_999) == "2025-11-23 18:44:05 UTC"
    assert (plural(1, "leaf", "leaves"), plural(2_000, "leaf", "leaves")) == ("1 leaf", "2,000 leaves")
    noon = 1_763_899_200 * NS_PER_S
    assert moment(noon, noon + 1) == "12:00:00 UTC"
    assert moment(noon - 13 * 3600 * NS_PER_S, noon) == "2025-11-22 23:00:00 UTC"
