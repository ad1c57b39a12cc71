"""The engine worker's process: the engine's loop with the auditor listening. The only process that imports torch.

Translation only: engine evidence in, plain values to the auditor, plain findings back. Neither room knows the other.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import msgspec

from audit.isolation import IsolationAuditor
from engine.events import EngineEvent, StepEvidence, Violation

SELF_TEST_INTERVAL_STEPS = 256  # how often the auditor must prove that it is awake while the engine is busy
SELF_TEST_INTERVAL_S = 5.0  # and at the latest after this long, so that an idle engine is covered too


class AuditObserver:
    """The engine's Observer, backed by the isolation auditor."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._auditor = IsolationAuditor(num_blocks, block_size)
        self._last_self_test_s = float("-inf")
        self._steps_since_self_test = 0

    def on_events(self, events: list[EngineEvent]) -> None:
        for event in events:
            self._auditor.on_event(
                kind=event.kind,
                step=event.step,
                block_id=event.block_id,
                generation=event.generation,
                domain=event.domain,
                sequence_id=event.sequence_id,
                token_ids=event.token_ids,
                cache_salt=event.cache_salt,
            )

    def before_launch(self, evidence: StepEvidence) -> list[Violation]:
        violations = self._auditor.check_step(
            step=evidence.step,
            sequence_ids=evidence.sequence_ids,
            domains=evidence.domains,
            token_ids=evidence.token_ids,
            cu_seqlens=evidence.cu_seqlens,
            kv_lens=evidence.kv_lens,
            block_tables=evidence.block_tables,
            slot_mapping=evidence.slot_mapping,
        )
        self._steps_since_self_test += 1
        return [(v.kind, v.sequence_ids, v.domains, v.block_id, v.detail) for v in violations]

    def counters(self) -> dict[str, int]:
        """The auditor's counts, after a self-test if one is due. Called by the worker once a second."""
        now_s = time.monotonic()
        due = now_s - self._last_self_test_s >= SELF_TEST_INTERVAL_S
        if due or self._steps_since_self_test >= SELF_TEST_INTERVAL_STEPS:
            self._auditor.self_test()
            self._last_self_test_s = now_s
            self._steps_since_self_test = 0
        return self._auditor.counters()


def main() -> int:
    parser = argparse.ArgumentParser(prog="bulkhead worker", description="Run one engine worker on a unix socket.")
    parser.add_argument("--config", required=True, help="WorkerConfig as a JSON object")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the gateway, which stops its workers in order
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # The imports wait until here: torch takes seconds, and a wrong command line should not.
    from engine.config import WorkerConfig
    from engine.worker import run_worker

    raw = msgspec.json.decode(arguments.config.encode())
    paths = {name: Path(raw[name]) for name in ("model_dir", "socket_path", "journal_dir")}
    config = WorkerConfig(**{**raw, **paths})
    return run_worker(config, AuditObserver)


if __name__ == "__main__":
    sys.exit(main())
