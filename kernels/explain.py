"""What computes each op of a backend, and with which launch parameters: what `bulkhead worker --explain` prints.

The ops are those of kernels/backend.py's face: one that is added there shows here by itself.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from kernels.backend import Backend, DeviceBackend

NOT_OPS = ("plan", "check")
PRODUCTS = ("linear", "gate_up", "head", "normed")
NATIVE = {
    "linear": "kernels/cpu/src/product.h",
    "gate_up": "kernels/cpu/src/product.h, kernels/cpu/src/gated.h",
    "head": "kernels/cpu/src/product.h",
    "normed": "kernels/cpu/src/elementwise.h, kernels/cpu/src/product.h",
    "attend": "kernels/cpu/src/elementwise.h, kernels/cpu/src/attention.h",
}
TRITON = {
    "linear": "kernels/gpu/matmul.py",
    "gate_up": "kernels/gpu/matmul.py, kernels/gpu/silu_and_mul.py",
    "head": "kernels/gpu/matmul.py",
    "rms_norm": "kernels/gpu/rms_norm.py",
    "normed": "kernels/gpu/rms_norm.py, kernels/gpu/matmul.py",
    "silu_and_mul": "kernels/gpu/silu_and_mul.py",
    "attend": "kernels/gpu/rope_and_store_kv.py, kernels/gpu/paged_attention.py",
    "top": "kernels/gpu/logits.py",
    "check": "kernels/gpu/plan.py, kernels/gpu/gather_tags.py",
    "scrub": "kernels/gpu/scrub_blocks.py",
}
ON_A_DEVICE = ("check", "scrub")


@dataclass(frozen=True, slots=True)
class Heads:
    """What decides the launch of attention, of one or more layers: query heads for each key head, and a head's size;
    bytes of a number in queries and in the cache."""

    ratio: int
    head_size: int
    block_size: int
    query_bytes: int
    cache_bytes: int


@dataclass(frozen=True, slots=True)
class Op:
    op: str
    source: str
    launches: list[dict[str, Any]] = field(default_factory=list)  # none: nothing to choose


def instruction_set(backend: Backend) -> str:
    """Of the kernels: a set of the processor's, sm_ and the GPU's compute capability, or whatever torch takes."""
    family, _, name = backend.name.partition("-")
    if family == "native":
        return name
    return name.replace("sm", "sm_") if family == "triton" else "torch's own choice"


def ops_of(backend: Backend, heads: set[Heads]) -> list[Op]:
    names = [name for name in vars(Backend) if not name.startswith("_") and callable(getattr(Backend, name))]
    names = [name for name in names if name not in NOT_OPS]
    if isinstance(backend, DeviceBackend):
        names += ON_A_DEVICE
    family = backend.name.partition("-")[0]
    found = []
    for name in names:
        if family == "triton":
            found.append(Op(name, TRITON.get(name, "kernels/gpu/backend.py"), _launches(name, backend, heads)))
        elif family == "native":
            found.append(Op(name, NATIVE.get(name, "kernels/cpu/src/elementwise.h")))
        else:
            found.append(Op(name, "kernels/products.py" if name in PRODUCTS else "kernels/torch_cpu.py"))
    return found


def _launches(name: str, backend: Backend, heads: set[Heads]) -> list[dict[str, Any]]:
    """Imported here alone: the CPU's kernels know no Triton."""
    from kernels.gpu import matmul, rope_and_store_kv, silu_and_mul
    from kernels.gpu.backend import TritonBackend
    from kernels.gpu.launch import SPLIT
    from kernels.gpu.launch_table import attention_shape

    assert isinstance(backend, TritonBackend)
    tile = {"block_m": matmul.BLOCK_M, "block_n": matmul.BLOCK_N, "block_k": matmul.BLOCK_K}
    match name:
        case "linear" | "gate_up" | "normed":
            return [{**tile, "num_warps": matmul.NUM_WARPS, "num_stages": matmul.NUM_STAGES}]
        case "head":
            return [{**tile, "num_warps": matmul.NUM_WARPS_HEAD, "num_stages": matmul.NUM_STAGES}]
        case "silu_and_mul":
            return [{"block": silu_and_mul.BLOCK}]
        case "attend":
            capability = backend.capability
            shapes = [
                {**asdict(one), **asdict(attention_shape(capability, **asdict(one))), "split": SPLIT}
                for one in sorted(heads, key=lambda one: (one.head_size, one.ratio))
            ]
            return [{"heads": rope_and_store_kv.HEADS}, *shapes]
        case _:
            return []
