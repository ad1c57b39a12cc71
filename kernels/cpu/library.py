"""The native library through ctypes: structs as in src/ops.h, loaded once, the GIL released during every call."""

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kernels.backend import KernelError

PATH = Path(__file__).parent / "_native.so"
ABI = 9
DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class NormArgs(Structure):
    _fields_ = (
        ("x", c_void_p),
        ("weight", c_void_p),
        ("residual", c_void_p),
        ("total", c_void_p),
        ("out", c_void_p),
        ("num_tokens", c_int64),
        ("size", c_int64),
        ("epsilon", c_float),
        ("dtype", c_int32),
    )


class ActivationArgs(Structure):
    _fields_ = (
        ("gate_up", c_void_p),
        ("out", c_void_p),
        ("num_tokens", c_int64),
        ("size", c_int64),
        ("dtype", c_int32),
        ("kind", c_int32),
    )


class RopeArgs(Structure):
    _fields_ = (
        ("qkv", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("key_cache", c_void_p),
        ("value_cache", c_void_p),
        ("slots", c_void_p),
        ("token_tags", c_void_p),
        ("block_tags", c_void_p),
        ("flags", c_void_p),
        ("refused", c_void_p),
        ("num_tokens", c_int64),
        ("num_blocks", c_int64),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_size", c_int32),
        ("block_size", c_int32),
        ("dtype", c_int32),
    )


class AttentionArgs(Structure):
    _fields_ = (
        ("query", c_void_p),
        ("key_cache", c_void_p),
        ("value_cache", c_void_p),
        ("out", c_void_p),
        ("cu_seqlens", c_void_p),
        ("kv_lens", c_void_p),
        ("block_tables", c_void_p),
        ("items", c_void_p),
        ("row_tags", c_void_p),
        ("block_tags", c_void_p),
        ("flags", c_void_p),
        ("refused", c_void_p),
        ("query_stride", c_int64),
        ("num_blocks", c_int64),
        ("num_items", c_int64),
        ("sinks", c_void_p),
        ("table_width", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_size", c_int32),
        ("block_size", c_int32),
        ("dtype", c_int32),
        ("scale", c_float),
        ("soft_cap", c_float),
        ("item_tokens_max", c_int32),
        ("window", c_int32),
        ("items_apart", c_int32),
    )


class ProductArgs(Structure):
    _fields_ = (
        ("x", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("x_ready", c_void_p),
        ("num_rows", c_int64),
        ("num_inputs", c_int64),
        ("num_outputs", c_int64),
        ("weight_dtype", c_int32),
        ("y_dtype", c_int32),
        ("gated", c_int32),
    )


class BlocksArgs(Structure):
    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("block_ids", c_void_p),
        ("digests", c_void_p),
        ("num_blocks", c_int64),
        ("num_ids", c_int64),
        ("block_bytes", c_int64),
        ("key", c_uint64 * 2),
        ("fill", c_int32),
    )


class TopArgs(Structure):
    _fields_ = (
        ("logits", c_void_p),
        ("ids", c_void_p),
        ("finite", c_void_p),
        ("num_rows", c_int64),
        ("num_columns", c_int64),
        ("count", c_int64),
    )


class Library:
    """The functions, with their types."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise KernelError("the native kernels are not built")
        try:
            loaded = ctypes.CDLL(str(path))
            abi = loaded.bulkhead_abi()
        except (OSError, AttributeError) as error:
            raise KernelError(f"the native kernels do not load ({error})") from error
        if abi != ABI:
            raise KernelError(f"the native kernels are of another version ({abi}, not {ABI})")
        loaded.bulkhead_isa_name.restype = ctypes.c_char_p
        self._loaded = loaded
        self.rms_norm = loaded.bulkhead_rms_norm
        self.activate_and_mul = loaded.bulkhead_activate_and_mul
        self.attend = loaded.bulkhead_attend
        self.product = loaded.bulkhead_product
        self.normed_product = loaded.bulkhead_normed_product
        self.top = loaded.bulkhead_top
        for function, args in (
            (self.rms_norm, NormArgs),
            (self.activate_and_mul, ActivationArgs),
            (self.top, TopArgs),
        ):
            function.argtypes = (ctypes.c_int, POINTER(args))
            function.restype = None
        self.product.argtypes = (ctypes.c_int, POINTER(ProductArgs), c_void_p, c_void_p, c_int64)
        self.normed_product.argtypes = (
            *(ctypes.c_int, POINTER(NormArgs), POINTER(ProductArgs)),
            *(c_void_p, c_void_p, c_void_p, c_void_p, c_int64),
        )
        self.attend.argtypes = (ctypes.c_int, POINTER(RopeArgs), POINTER(AttentionArgs), *(c_void_p,) * 6)
        for function in (self.product, self.normed_product, self.attend):
            function.restype = None
        self.digest_blocks = loaded.bulkhead_digest_blocks
        self.fill_blocks = loaded.bulkhead_fill_blocks
        for function in (self.digest_blocks, self.fill_blocks):
            function.argtypes = (POINTER(BlocksArgs),)
            function.restype = None

    def isas(self) -> dict[str, int]:
        """Instruction sets that this machine has, by name, best first -> their number."""
        found: dict[str, int] = {}
        index = 0
        while (name := self._loaded.bulkhead_isa_name(index)) is not None:
            if self._loaded.bulkhead_isa_supported(index):
                found[name.decode()] = index
            index += 1
        return found

    def panel(self, isa: int) -> int:
        """Columns of a panel of packed weights."""
        return int(self._loaded.bulkhead_panel(isa))

    def bf16_inputs(self, isa: int) -> int:
        """Inputs in a step of a panel of bfloat16 weights: 1, or pairs filled up to a multiple of this many."""
        return int(self._loaded.bulkhead_bf16_inputs(isa))

    def set_num_threads(self, num_threads: int) -> None:
        self._loaded.bulkhead_set_num_threads(num_threads)


@cache
def load() -> Library:
    """Raises KernelError where it is not there or does not load."""
    return Library(PATH)


def pointer(tensor: Tensor) -> int:
    assert tensor.is_contiguous()
    assert tensor.is_cpu
    return tensor.data_ptr()


def optional_pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else pointer(tensor)
