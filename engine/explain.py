"""`python -m engine.explain --config JSON`: who would compute what if a worker started with this config, as one JSON
object on standard output. Nothing is served: no socket, no journal, no KV cache.

The kernels are chosen and the model is loaded by the very functions that a worker calls, because whether isolation is
bitwise is tried on the model's own products: what is said here is what /readyz says of such a worker.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from engine.build import isolation_of
from engine.config import WorkerConfig
from engine.errors import ConfigError
from engine.model_runner import cache_dtype, check_graphs
from engine.models.llama import LlamaModel
from engine.models.load import load_model
from kernels.backend import KernelError
from kernels.choice import choose
from kernels.explain import Heads, instruction_set, ops_of

PATHS = ("model_dir", "socket_path", "journal_dir")


def explain(config: WorkerConfig) -> dict[str, Any]:
    """Raises ConfigError or KernelError where a worker would not start."""
    notes: list[str] = []
    torch.set_num_threads(config.effective_num_threads)
    chosen = choose(config.kernels, config.effective_num_threads, notes.append)
    model = load_model(config.model_dir, dtype=config.dtype, backend=chosen, log=notes.append)
    backend, kept = model.backend, cache_dtype(model, config.kv_cache_dtype)
    check_graphs(model, config.graph_sizes)
    isolation, reason = isolation_of(model)
    if not isinstance(model, LlamaModel):  # transformers' code takes attention alone from us
        ops = [op for op in ops_of(backend, set()) if op.op == "attend"]
    else:
        query_bytes, cache_bytes = model.dtype.itemsize, kept.itemsize
        heads = {
            Heads(
                model.config.num_heads // layer.num_kv_heads,
                layer.head_size,
                config.block_size,
                query_bytes,
                cache_bytes,
            )
            for layer in model.cache_layers
        }
        ops = ops_of(backend, heads)
    return {
        "kernels": backend.name,
        "device": backend.device.type,
        "instruction_set": instruction_set(backend),
        "num_threads": config.effective_num_threads,
        "dtype": str(model.dtype).removeprefix("torch."),
        "kv_cache_dtype": "fp8_e4m3" if kept == torch.uint8 else str(kept).removeprefix("torch."),
        "cuda_graphs": list(config.graph_sizes),
        "model_code": "engine/models/llama.py" if isinstance(model, LlamaModel) else "transformers",
        "isolation": isolation,
        "reason": reason,
        "ops": [asdict(op) for op in ops],
        "notes": notes,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="engine.explain", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, help="WorkerConfig as a JSON object")
    raw = json.loads(parser.parse_args(arguments).config)
    try:
        config = WorkerConfig(**{**raw, **{name: Path(raw[name]) for name in PATHS}})
        sys.stdout.write(json.dumps(explain(config)) + "\n")
    except (ConfigError, KernelError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
