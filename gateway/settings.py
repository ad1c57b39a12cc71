"""Settings: read once from BULKHEAD_* variables, all errors reported together, unknown names refused.

Every setting is described in docs/settings.md; a test fails when one is missing there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

PREFIX = "BULKHEAD_"
SCHEDULING = ("fair", "fcfs", "round_robin", "sjf", "bounded")  # the engine's policies by name
LOG_LEVELS = ("debug", "info", "warning", "error")
FOREIGN = {  # read by tests, snippets and commands
    "BULKHEAD_TEST_PROFILE",
    "BULKHEAD_TEST_MODEL_DIR",
    "BULKHEAD_TEST_DATABASE",
    "BULKHEAD_KEY",
    "BULKHEAD_PROBE_KEY_A",
    "BULKHEAD_PROBE_KEY_B",
}


class SettingsError(Exception):
    """One or more BULKHEAD_* variables are wrong; the message lists every one of them."""


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65_535:
        raise ValueError("a port is 0 (any free port) to 65535")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise ValueError("must be greater than 0")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError("must be 0 or greater")
    return value


def _percent(least: int, most: int) -> Callable[[str], int]:
    def cast(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise ValueError(f"must be between {least} and {most}")
        return value

    return cast


def _pad(text: str) -> int:
    value = int(text)
    if not 16 <= value <= 16_384:
        raise ValueError("must be between 16 and 16384, the size of a TLS record")
    return value


def _boolean(text: str) -> bool:
    values = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if text.lower() not in values:
        raise ValueError("use 1 or 0")
    return values[text.lower()]


def _scheduling(text: str) -> str:
    if text not in SCHEDULING:
        raise ValueError(f"use one of {', '.join(SCHEDULING)}")
    return text


def _log_level(text: str) -> str:
    if text not in LOG_LEVELS:
        raise ValueError(f"use one of {', '.join(LOG_LEVELS)}")
    return text


def _setting(default: Any, cast: Callable[[str], Any]) -> Any:
    return field(default=default, metadata={"cast": cast})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    data_dir: Path = _setting(Path("data"), Path)
    host: str = _setting("127.0.0.1", str)
    port: int = _setting(8443, _port)
    tls_certificate: str = _setting("", str)  # empty: a certificate of the local CA
    tls_key: str = _setting("", str)
    database_url: str = _setting("", str)  # empty: SQLite in data_dir
    migration_database_url: str = _setting("", str)  # of the tables' owner; `bulkhead migrate` alone reads it
    redis_url: str = _setting("", str)  # empty: embedded Valkey in data_dir
    secrets_dir: str = _setting("", str)  # empty: in data_dir
    model_dir: str = _setting("", str)  # empty: the demo model in data_dir
    num_threads: int = _setting(0, _not_negative)  # engine threads; 0: cores minus one, at least one
    kernels: str = _setting("auto", str)  # engine/config.py knows the choices
    kv_cache_dtype: str = _setting("auto", str)  # as kernels
    cuda_graphs: str = _setting("", str)  # as kernels
    max_num_seqs: int = _setting(32, _positive)
    max_batched_tokens: int = _setting(256, _positive)
    max_prompt_tokens: int = _setting(0, _not_negative)  # in a step that also generates; 0: what the budget leaves
    break_off_percent: int = _setting(3, _percent(0, 50))  # engine/scheduling/break_off.py
    kv_cache_bytes: int = _setting(512 * 1024 * 1024, _positive)
    block_size: int = _setting(32, _positive)
    scheduling: str = _setting("fair", _scheduling)  # engine/scheduling/order.py
    wait_max_tokens: int = _setting(65_536, _positive)  # engine/scheduling/rescue.py
    priority_tenants: str = _setting("", str)  # names, separated by commas; *: everybody
    prefix_cache: bool = _setting(True, _boolean)  # share computed blocks within a tenant
    cache_floor_percent: int = _setting(10, _percent(0, 50))  # engine/cache/cache_shares.py
    cache_ceiling_percent: int = _setting(100, _percent(1, 100))
    audit_slots_per_step: int = _setting(256, _not_negative)  # audit/runtime/cache_bytes.py
    audit_blocks_per_step: int = _setting(1, _not_negative)  # audit/runtime/block_digests.py
    audit_replay_percent: int = _setting(5, _percent(0, 100))  # audit/runtime/replay.py
    audit_replay_bytes_max: int = _setting(8 * 1024 * 1024, _positive)
    audit_idle_percent: int = _setting(25, _percent(1, 100))  # engine/own_runs.py
    audit_canary_interval_s: int = _setting(300, _not_negative)  # audit/runtime/canary.py
    violating_steps_max: int = _setting(3, _positive)  # engine/engine_thread.py
    body_bytes_max: int = _setting(4 * 1024 * 1024, _positive)
    header_bytes_max: int = _setting(32 * 1024, _positive)
    max_tokens_default: int = _setting(256, _positive)  # where the client names none
    hold_ttl_s: int = _setting(600, _positive)
    gateway_return_s: int = _setting(300, _positive)  # gateway/host/overdue.py
    lease_ttl_s: int = _setting(60, _positive)
    idempotency_ttl_s: int = _setting(86_400, _positive)
    idempotency_bytes_max: int = _setting(1024 * 1024, _positive)  # of one answer; a larger one is not retained
    idempotency_keys_max: int = _setting(10_000, _positive)  # of a tenant
    send_timeout_s: int = _setting(20, _positive)  # a client that reads nothing for this long is gone
    stream_cover: bool = _setting(False, _boolean)  # gateway/api/cover.py
    stream_pad_bytes: int = _setting(1_024, _pad)
    stream_pace_ms: int = _setting(100, _not_negative)
    webhook_private: bool = _setting(False, _boolean)  # gateway/webhooks/post.py
    checkpoint_interval_ms: int = _setting(2_000, _positive)
    heartbeat_interval_s: int = _setting(10, _positive)
    drain_timeout_s: int = _setting(10, _positive)
    log_origin: str = _setting("bulkhead.local/log", str)  # the log's name in its checkpoints
    log_level: str = _setting("warning", _log_level)
    demo_tenants: bool = _setting(True, _boolean)  # create acme and globex in an empty database

    @property
    def effective_database_url(self) -> str:
        return self.database_url or f"sqlite+aiosqlite:///{self.data_dir.absolute() / 'bulkhead.db'}"

    def may_use_priority(self, tenant_name: str) -> bool:
        """Whether the operator lets this tenant go before all others (service tier ``priority``)."""
        names = [name.strip() for name in self.priority_tenants.split(",")]
        return bool(tenant_name) and ("*" in names or tenant_name in names)

    @property
    def effective_model_dir(self) -> Path:
        return Path(self.model_dir) if self.model_dir else self.data_dir / "models" / "smollm2-135m-instruct"


def load_settings(environ: Mapping[str, str]) -> Settings:
    """Build settings from the environment.

    Raises SettingsError naming every unknown variable and every value that does not parse.
    """
    known = {PREFIX + f.name.upper(): f for f in fields(Settings)}
    problems = [
        f"{name}: there is no such setting (see docs/settings.md)"
        for name in sorted(environ)
        if name.startswith(PREFIX) and name not in known and name not in FOREIGN
    ]
    values: dict[str, Any] = {}
    for name, f in known.items():
        if name not in environ:
            continue
        try:
            values[f.name] = f.metadata["cast"](environ[name])
        except ValueError as error:
            problems.append(f"{name}={environ[name]!r}: {error}")
    if problems:
        raise SettingsError("\n".join(problems))
    return Settings(**values)
