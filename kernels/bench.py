"""`python -m kernels.bench`: how long each op takes on this machine, beside plain torch, as one JSON object.

Every case exists in enough copies that they do not fit the caches together, as a model's layers do not; a figure is
the best of several rounds over all copies, ours and the others' in turn, so that a busy neighbour hits them alike.
The shapes are one layer of SmolLM2-135M. Norms and activations take numbers that lie in the caches.

`bytes` is what must be read and written at least. `copy_share` compares with this machine's own copy of a large
tensor in the same run, in huge pages like the cache; an op that mostly reads may exceed 1. `library_us` is the part of
`ours_us` inside the library. `steps` are norms, rope and activation within whole steps (kernels/bench_step.py); `chunk`
sets the attention of a prefill chunk beside the chunk's products, in one layer.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from kernels.backend import KernelError
from kernels.bench_ops import Bench


def _gpu(num_rounds: int) -> dict[str, Any] | None:
    """The GPU kernels' figures, None where there is no GPU or no Triton."""
    if not torch.cuda.is_available():
        return None
    try:
        from kernels.gpu.bench import on_this_gpu
    except ImportError:
        return None
    return on_this_gpu(num_rounds)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--rows", default="1,8,32,256", help="numbers of rows of the products and elementwise ops")
    parser.add_argument("--context", type=int, default=300, help="tokens of each decode row")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a prefill chunk")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--working-set", type=int, default=128 << 20, help="bytes; more than the caches hold")
    asked = parser.parse_args(arguments)
    rows = [int(number) for number in asked.rows.split(",")]
    try:
        bench = Bench(asked.num_threads, asked.rounds, asked.working_set)
    except KernelError as error:
        sys.stderr.write(f"{error}: nothing to measure; `make native` builds the kernels\n")
        return 1
    with torch.inference_mode():
        bench.products(sorted({*rows, asked.chunk}), torch.bfloat16)
        bench.products(rows, torch.float32)
        bench.head([number for number in rows if number <= max(32, rows[0])])
        bench.top(min(32, rows[-1]))
        bench.elementwise(rows, torch.bfloat16)
        for num_rows in sorted({1, *(number for number in rows if number <= 32)}):
            bench.attention(num_rows, 1, asked.context, torch.bfloat16)
        bench.blocks(32, torch.bfloat16)
        bench.attention(1, asked.chunk, asked.chunk, torch.bfloat16)
        chunk = bench.chunk(asked.chunk)
        steps = [bench.step(number, asked.context) for number in rows if number <= 32]
    result = {
        "kernels": bench.ours.name,
        "num_threads": asked.num_threads,
        "copy_gb_per_s": round(bench.copy_gb_per_s, 2),
        "figures": [asdict(figure) for figure in bench.figures],
        "chunk": chunk,
        "steps": [asdict(step) for step in steps],
        "gpu": _gpu(asked.rounds),
    }
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
