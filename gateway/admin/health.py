"""The four facts about the whole house: is the audit awake, the worker up, the log signed, are the stores there.

"Blind" is the word for an auditor that cannot see: no heartbeat for HEARTBEATS_MISSED_MAX intervals, or no worker to
look into. It is shown as a fault, never as an absence of news.
"""

from dataclasses import dataclass
from typing import Literal

from gateway.admin.audit_queries import LoggedEntry, LogState
from gateway.admin.wording import NS_PER_S, count, duration, moment, plural
from gateway.engine_link import EngineStatus
from gateway.rights.standing import Standing

HEARTBEATS_MISSED_MAX = 3
CHECKPOINTS_MISSED_MAX = 5

State = Literal["good", "warn", "bad"]


@dataclass(frozen=True, slots=True)
class Fact:
    state: State
    word: str
    lines: dict[str, str]  # the lines below the word, by name; the template names the same ones


def audit_fact(
    heartbeat: LoggedEntry | None,
    num_violations: int,
    engine: EngineStatus,
    *,
    heartbeat_interval_s: int,
    now_ns: int,
) -> Fact:
    """`num_violations` counts the log's isolation.violation entries, ever."""
    body = heartbeat.body if heartbeat else {}
    in_epoch = int(body.get("num_violations", 0))
    lines = {
        "heartbeat": "No heartbeat has been logged.",
        "violations": f"{plural(num_violations, 'violation')} ever, {count(in_epoch)} under this worker",
        "checked": f"{plural(int(body.get('num_steps', 0)), 'step')}, "
        f"{plural(int(body.get('num_slots_checked', 0)), 'KV slot')} checked",
        "self_test": "No self-test has been logged.",
    }
    is_late = True
    if heartbeat is not None:
        age_ns = now_ns - heartbeat.at_ns
        is_late = age_ns > HEARTBEATS_MISSED_MAX * heartbeat_interval_s * NS_PER_S
        lines["heartbeat"] = f"Last heartbeat {duration(age_ns)} ago, {moment(heartbeat.at_ns, now_ns)}"
    if "last_self_test_ok" in body:
        passed = "passed" if body["last_self_test_ok"] else "FAILED"
        lines["self_test"] = f"{plural(int(body['num_self_tests']), 'self-test')}, the last one {passed}"
    if num_violations or in_epoch:
        return Fact("bad", "Isolation was violated", lines)
    if engine.state != "ready":
        return Fact("bad", "Blind: no worker to audit", lines)
    if is_late:
        return Fact("bad", "Blind: no recent heartbeat", lines)
    if engine.ready is not None and body.get("epoch") != engine.ready.epoch:
        return Fact("warn", "Waking: this worker has sent no heartbeat yet", lines)
    if not body.get("last_self_test_ok", False):
        return Fact("bad", "Blind: self-test failed" if "last_self_test_ok" in body else "Blind: no self-test", lines)
    return Fact("good", "Awake", lines)


def worker_fact(engine: EngineStatus, started: LoggedEntry | None, num_ownerless: int, now_ns: int) -> Fact:
    """`started` is the newest worker.started entry; `num_ownerless` counts blocks that belong to no known tenant."""
    restarts = plural(engine.num_restarts, "restart")
    ready, stats = engine.ready, engine.stats
    if ready is None or engine.state != "ready":
        word: tuple[State, str] = ("warn", "Starting") if engine.state == "starting" else ("bad", "Lost")
        lines = {"isolation": "Isolation: nothing is running", "uptime": restarts, "model": "", "kernels": ""}
        return Fact(word[0], word[1], {**lines, "blocks": "No requests are served."})
    uptime = ""
    if started is not None and started.body.get("epoch") == ready.epoch:
        uptime = f"up {duration(now_ns - started.at_ns)}, "
    blocks = "KV blocks: not reported yet"
    if stats is not None:
        used = stats.num_blocks - stats.num_blocks_free
        blocks = f"{count(used)} of {plural(stats.num_blocks, 'KV block')} in use"
        if num_ownerless:
            blocks += f", {count(num_ownerless)} by no tenant"
    lines = {
        "isolation": f"Isolation mode: {ready.isolation}",
        "uptime": f"Epoch {ready.epoch}, {uptime}{restarts}",
        "model": f"{ready.model_id}, {ready.dtype} on {ready.device}",
        "kernels": f"Kernels: {ready.kernels}",
        "blocks": blocks,
    }
    if ready.isolation == "relaxed":
        return Fact("warn", "Ready, isolation relaxed", lines)
    return Fact("good", "Ready", lines)


def log_fact(log: LogState, *, checkpoint_interval_ms: int, now_ns: int) -> Fact:
    lag = "Nothing waits to be signed"
    is_behind = False
    if log.oldest_waiting_ns is not None:
        lag_ns = now_ns - log.oldest_waiting_ns
        is_behind = lag_ns > CHECKPOINTS_MISSED_MAX * checkpoint_interval_ms * 10**6
        lag = f"{plural(log.num_waiting, 'entry', 'entries')} waiting, the oldest for {duration(lag_ns)}"
    if log.signed_ns is None:
        lines = {"size": "No checkpoint has been signed.", "signed": "", "lag": lag}
        return Fact("bad" if is_behind else "warn", "Unsigned", lines)
    lines = {
        "size": f"{plural(log.num_leaves, 'leaf', 'leaves')} under the last checkpoint",
        "signed": f"Signed {duration(now_ns - log.signed_ns)} ago, {moment(log.signed_ns, now_ns)}",
        "lag": lag,
    }
    return Fact("bad", "Behind", lines) if is_behind else Fact("good", "Signed", lines)


def stores_fact(database_name: str, database_us: int, valkey_us: int, standing: Standing | None) -> Fact:
    """Both answered, or this page would not exist; so this says how fast, and by what the books are held. Times in
    microseconds."""
    lines = {
        "database": f"{database_name} answered in {_milliseconds(database_us)}",
        "valkey": f"Valkey answered in {_milliseconds(valkey_us)}",
        "append_only": "",
    }
    if standing is None:
        return Fact("good", "Both answer", lines)
    lines["append_only"] = f"Append-only is held by {standing.append_only}"
    if standing.append_only == "nothing":
        return Fact("bad", "Both answer, books unguarded", lines)
    if standing.role and standing.append_only == "triggers":
        return Fact("warn", "Both answer, append-only by triggers alone", lines)
    return Fact("good", "Both answer", lines)


def _milliseconds(microseconds: int) -> str:
    return f"{microseconds // 1000}.{microseconds % 1000 // 100} ms"
