"""The engine worker's process: the engine's loop with the auditor listening. The only process that imports torch."""

import argparse
import os
import signal
import sys
from pathlib import Path

import msgspec

from gateway.audit_observer import AuditObserver


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
