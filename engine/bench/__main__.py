"""`bulkhead bench engine | policies | fairness` in a process of its own, so that the command itself stays free of torch
and each measurement has its own memory and threads. Writes one JSON object to standard output.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from engine.bench import engine_row, fairness, policies, scheduler_time
from engine.bench.calibrate import calibrate
from engine.bench.traces import TRACES
from engine.bench.workloads import WORKLOADS
from engine.build import MakeObserver, unobserved
from engine.config import KERNELS
from engine.models.load import DTYPES
from engine.scheduling.order import POLICIES

SEED = 1
SCHEDULER_STEPS = 1_000


def main(make_observer: MakeObserver = unobserved) -> None:
    """``make_observer`` brings whoever watches the engine of an `engine` row."""
    arguments = _arguments()
    now = time.perf_counter
    if arguments.what == "engine":
        answer = engine_row.measure(
            engine_row.Setup(
                model_dir=arguments.model_dir,
                mode=arguments.mode,
                workload=arguments.workload,
                concurrency=arguments.concurrency,
                num_requests=arguments.requests,
                num_threads=arguments.threads,
                dtype=arguments.dtype,
                kernels=arguments.kernels,
                num_logprobs=arguments.logprobs,
            ),
            now,
            make_observer,
        )
    else:
        _tell("measuring the cost of a step")
        cost = calibrate(arguments.model_dir, num_threads=arguments.threads, now=now)
        if arguments.what == "policies":
            rows = policies.rows(
                sorted(POLICIES),
                sorted(TRACES),
                num_requests=arguments.requests,
                load=arguments.load,
                cost=cost,
                seed=SEED,
                max_prompt_tokens=arguments.max_prompt_tokens,
                progress=_tell,
            )
        else:
            rows = fairness.rows(
                sorted(POLICIES),
                arguments.domains,
                num_steps=arguments.steps,
                cost=cost,
                seed=SEED,
                max_prompt_tokens=arguments.max_prompt_tokens,
                break_off_percent=arguments.break_off_percent,
                progress=_tell,
            )
        answer = {"step_cost": asdict(cost), "rows": rows}
        if arguments.what == "policies":
            answer["scheduler"] = scheduler_time.rows(
                sorted(POLICIES), num_steps=SCHEDULER_STEPS, seed=SEED, now=now, progress=_tell
            )
    sys.stdout.write(json.dumps(answer) + "\n")


def _tell(line: str) -> None:
    sys.stderr.write(f"progress: {line}\n")
    sys.stderr.flush()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m engine.bench", description=__doc__)
    parser.add_argument("--model-dir", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    what = parser.add_subparsers(dest="what", required=True)
    row = what.add_parser("engine")
    row.add_argument("--mode", choices=engine_row.MODES, required=True)
    row.add_argument("--workload", choices=sorted(WORKLOADS), required=True)
    row.add_argument("--concurrency", type=int, required=True)
    row.add_argument("--requests", type=int, required=True)
    row.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    row.add_argument("--kernels", choices=KERNELS, default="auto")
    row.add_argument("--logprobs", type=int, default=-1)
    order = what.add_parser("policies")
    order.add_argument("--requests", type=int, required=True)
    order.add_argument("--load", type=float, required=True)
    shares = what.add_parser("fairness")
    shares.add_argument("--domains", type=int, nargs="+", required=True)
    shares.add_argument("--steps", type=int, required=True)
    shares.add_argument("--break-off-percent", type=int, default=0)
    for virtual in (order, shares):
        virtual.add_argument("--max-prompt-tokens", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
