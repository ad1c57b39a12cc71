"""The engine worker's process: the engine's loop with the auditor listening. The only process that imports torch."""

import argparse
import os
import signal
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

import msgspec

from audit.runtime.isolation import BLOCKS_PER_STEP, SLOTS_PER_STEP
from gateway.audit_observer import observer_of
from gateway.own_runs import OwnRunSettings


def main() -> int:
    parser = argparse.ArgumentParser(prog="bulkhead worker", description="Run one engine worker on a unix socket.")
    parser.add_argument("--config", required=True, help="WorkerConfig as a JSON object, and audit_*")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the gateway, which stops its workers in order
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # The imports wait until here: torch takes seconds, and a wrong command line should not.
    from engine.config import WorkerConfig
    from engine.worker import run_worker
    from engine.worker_log import log
    from gateway.world import real_world

    raw = msgspec.json.decode(arguments.config.encode())
    slots_per_step = raw.pop("audit_slots_per_step", SLOTS_PER_STEP)
    blocks_per_step = raw.pop("audit_blocks_per_step", BLOCKS_PER_STEP)
    own = OwnRunSettings(
        **{f.name: raw.pop(f"audit_{f.name}") for f in fields(OwnRunSettings) if f"audit_{f.name}" in raw}
    )
    paths = {name: Path(raw[name]) for name in ("model_dir", "socket_path", "journal_dir")}
    config = WorkerConfig(**{**raw, **paths})
    seed = int.from_bytes(real_world().entropy(15))
    rates = {"slots_per_step": slots_per_step, "blocks_per_step": blocks_per_step}
    observe = partial(observer_of, **rates, own=own, seed=seed, log=log)
    return run_worker(config, observe)


if __name__ == "__main__":
    sys.exit(main())
