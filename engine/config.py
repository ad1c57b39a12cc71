"""The worker's settings, checked once at construction. No torch here."""

import os
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError

DTYPES = ("bfloat16", "float32")
KV_CACHE_DTYPES = ("auto", "fp8_e4m3")
GRAPHS_MAX = 32  # each keeps arrays of its own on the device
KERNELS = ("auto", "torch", "portable", "avx2", "avx512", "avx512_bf16", "amx", "triton")


def default_num_threads() -> int:
    """All cores but one: on a small machine the HTTP process must breathe."""
    return max(1, (os.cpu_count() or 2) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """``num_blocks`` 0 derives it from ``kv_cache_bytes``; ``num_threads`` 0 means all cores but one."""

    model_dir: Path
    socket_path: Path
    journal_dir: Path
    max_batched_tokens: int = 256  # the token budget of one step
    max_num_seqs: int = 32  # rows in one step
    max_prompt_tokens: int = 0  # of prompts in a step that also generates; 0: all that the budget leaves
    break_off_percent: int = 3  # of the tokens computed, for breaking off steps: engine/scheduling/break_off.py
    num_blocks: int = 0
    kv_cache_bytes: int = 512 * 1024 * 1024
    block_size: int = 32  # tokens per KV block
    num_threads: int = 0
    dtype: str = "bfloat16"
    kv_cache_dtype: str = "auto"  # the weights', or fp8_e4m3 where the kernels take it
    cuda_graphs: str = ""  # sizes of decode batches, separated by commas: kernels/gpu/graphs.py; none: no graphs
    kernels: str = "auto"  # kernels/choice.py: auto, torch, triton, or an instruction set of the native library
    max_waiting: int = 256  # further submits are refused with "busy"
    scheduling: str = "fair"  # engine/scheduling/order.py
    wait_max_tokens: int = 65_536  # served to everybody while one starves: engine/scheduling/rescue.py
    prefix_cache: bool = True  # share computed blocks between sequences of one domain that begin alike
    cache_floor_percent: int = 10  # of the blocks, for all domains' floors together: engine/cache/cache_shares.py
    cache_ceiling_percent: int = 100  # of the blocks, for each domain's cached ones
    drain_timeout_ms: int = 10_000  # after SIGTERM
    num_failures_max: int = 3  # failed steps in a row before the worker gives up
    idle_percent: int = 25  # of idle time for the observer's own runs: engine/own_runs.py
    violating_steps_max: int = 3  # steps that broke isolation before the worker takes nothing in any more

    def __post_init__(self) -> None:
        for name in (
            "max_batched_tokens",
            "max_num_seqs",
            "block_size",
            "kv_cache_bytes",
            "wait_max_tokens",
            "num_failures_max",
            "violating_steps_max",
        ):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be greater than 0, not {getattr(self, name)}")
        for name in ("num_blocks", "num_threads", "max_waiting", "drain_timeout_ms", "max_prompt_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be 0 or greater, not {getattr(self, name)}")
        if not 0 <= self.break_off_percent <= 50:
            raise ConfigError(f"break_off_percent must be between 0 and 50, not {self.break_off_percent}")
        if not 0 <= self.cache_floor_percent <= 50:
            raise ConfigError(f"cache_floor_percent must be between 0 and 50, not {self.cache_floor_percent}")
        if not 1 <= self.cache_ceiling_percent <= 100:
            raise ConfigError(f"cache_ceiling_percent must be between 1 and 100, not {self.cache_ceiling_percent}")
        if not 1 <= self.idle_percent <= 100:
            raise ConfigError(f"idle_percent must be between 1 and 100, not {self.idle_percent}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ConfigError(
                f"kv_cache_dtype must be one of {', '.join(KV_CACHE_DTYPES)}, not {self.kv_cache_dtype!r}"
            )
        if self.kernels not in KERNELS:
            raise ConfigError(f"kernels must be one of {', '.join(KERNELS)}, not {self.kernels!r}")
        if len(self.graph_sizes) > GRAPHS_MAX:
            raise ConfigError(f"cuda_graphs must be {GRAPHS_MAX} sizes or fewer, not {len(self.graph_sizes)}")

    @property
    def graph_sizes(self) -> tuple[int, ...]:
        """Rows of a decode batch that is launched as one graph, the least first. Raises ConfigError."""
        names = [name.strip() for name in self.cuda_graphs.split(",")] if self.cuda_graphs.strip() else []
        if not all(name.isdecimal() and 0 < int(name) <= self.max_num_seqs for name in names):
            raise ConfigError(
                f"cuda_graphs must be numbers of rows from 1 to {self.max_num_seqs} (max_num_seqs), commas between, "
                f"not {self.cuda_graphs!r}"
            )
        return tuple(sorted({int(name) for name in names}))

    @property
    def effective_num_threads(self) -> int:
        return self.num_threads or default_num_threads()
