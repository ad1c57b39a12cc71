"""Where the time of a benchmark's requests went: by stage inside the gateway, and by process on the machine's cores."""

import os
from collections.abc import Sequence
from typing import Any, Final

from gateway.bench.cpu import Used, used_by
from gateway.bench.servers import GatewayProcess, Place
from gateway.stages import STAGES, read_passages
from gateway.world import World

CHARGED: Final = ("authenticate", "quota", "hold", "settle")  # authentication + quota + hold + capture + outbox


class Breakdown:
    """Between `begin` and `end`; the gateway was started with stages."""

    def __init__(self, world: World, here: Place, gateway: GatewayProcess, engine_pid: int) -> None:
        assert gateway.stages is not None
        self._monotonic_ns = world.monotonic_ns
        self._path = gateway.stages
        pids = {
            "load": os.getpid(),
            "gateway": gateway.pid,
            "engine": engine_pid,
            "valkey": here.valkey_pid,
            "database": here.postgres_pid,
        }
        self._pids = {name: pid for name, pid in pids.items() if pid is not None}
        self._began_ns = 0
        self._before: dict[str, Used] = {}

    def begin(self) -> None:
        self._began_ns = self._monotonic_ns()
        self._before = used_by(self._pids)

    def end(self, num_requests: int) -> dict[str, Any]:
        """`stages_ms`: [p50, p99] of each stage, of all of them (`inside`) and of what the gateway is for (`charged`);
        `cores_ms`: for each request [used, waited for] by each process."""
        used = used_by(self._pids)
        passages = [one.stages_ns for one in read_passages(self._path) if one.began_ns >= self._began_ns]
        parts = {name: [one[name] for one in passages] for name in STAGES}
        parts["charged"] = [sum(one[name] for name in CHARGED) for one in passages]
        parts["inside"] = [sum(one.values()) for one in passages]
        cores = {name: after - self._before[name] for name, after in used.items()}
        return {
            "stages_ms": {
                name: [_ms(nearest_rank(times, 50)), _ms(nearest_rank(times, 99))] for name, times in parts.items()
            },
            "cores_ms": {
                name: [_ms(one.cpu_ns / num_requests), _ms(one.waited_ns / num_requests)] for name, one in cores.items()
            },
        }


def nearest_rank(values: Sequence[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)] if ordered else float("inf")


def _ms(nanoseconds: float) -> float:
    return round(nanoseconds / 1e6, 2)
