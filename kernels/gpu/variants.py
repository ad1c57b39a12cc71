"""What the gate compiles: every kernel as a model of each size launches it."""

from dataclasses import dataclass, field
from typing import Any

from kernels.gpu import gather_tags, launch, logits, matmul, paged_attention, rms_norm, rope_and_store_kv, scrub_blocks
from kernels.gpu import silu_and_mul as silu
from kernels.gpu.launch_table import attention_shape

CAPABILITIES = (80, 90, 100, 120)  # A100, H100 and H200, B200, RTX 50: compute capability x 10
BLOCK_SIZE = 32


@dataclass(frozen=True, slots=True)
class Model:
    """One layer's sizes, and the vocabulary's."""

    name: str
    vocabulary: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_size: int

    @property
    def ratio(self) -> int:
        return self.num_heads // self.num_kv_heads


SMOLLM2_135M = Model("SmolLM2-135M", 49152, 576, 1536, 9, 3, 64)
LLAMA_8B = Model("Llama-3-8B", 128256, 4096, 14336, 32, 8, 128)
LLAMA_70B = Model("Llama-3-70B", 128256, 8192, 28672, 64, 8, 128)


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel with its constants and the types of its other arguments, as Triton's compiler names them."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    multiplies: bool = False  # a matrix instruction is expected
    is_quick: bool = field(default=False)  # compiled by `make test` too


def variants(capability: int) -> list[Variant]:
    listed = []
    for model, dtypes in ((LLAMA_8B, ("bf16", "fp16")), (SMOLLM2_135M, ("bf16", "fp32"))):
        for dtype in dtypes:
            listed += of_model(capability, model, dtype)
        listed += of_logits(model)
    listed.append(
        attention(capability, LLAMA_8B, "bf16", "window, cap, sinks", HAS_WINDOW=True, HAS_CAP=True, HAS_SINKS=True)
    )
    for extra, changes in (("unchecked", {"CHECK": False}), ("e4m3 cache", {"FP8": True})):
        listed.append(attention(capability, LLAMA_8B, "bf16", extra, **changes))
        listed.append(rope(LLAMA_8B, "bf16", extra, **changes))
    listed.append(scrub(LLAMA_8B, "u8", "e4m3 cache"))
    listed.append(attention(capability, LLAMA_8B, "fp16", "e4m3 cache", FP8=True))
    listed.append(attention(capability, SMOLLM2_135M, "bf16", "e4m3 cache", FP8=True))
    listed.append(attention(capability, LLAMA_70B, "bf16"))
    return listed


def of_model(capability: int, model: Model, dtype: str) -> list[Variant]:
    pointer, label = f"*{dtype}", f"{model.name} {dtype}"
    norm_block = launch.power_of_two(model.hidden)
    return [
        Variant(
            f"rms_norm {label}",
            rms_norm.rms_norm_kernel,
            {
                "x_ptr": pointer,
                "weight_ptr": pointer,
                "residual_ptr": "*fp32",
                "total_ptr": "*fp32",
                "out_ptr": pointer,
                "epsilon": "fp32",
            },
            {"SIZE": model.hidden, "BLOCK": norm_block, "HAS_RESIDUAL": True},
            launch.options(rms_norm.norm_warps(norm_block)),
        ),
        Variant(
            f"silu_and_mul {label}",
            silu.silu_and_mul_kernel,
            {"gate_up_ptr": pointer, "out_ptr": pointer, "size": "i32"},
            {"BLOCK": silu.BLOCK},
            launch.options(),
        ),
        rope(model, dtype),
        attention(capability, model, dtype),
        Variant(
            f"merge {label}",
            paged_attention.merge_kernel,
            {
                "out_ptr": pointer,
                "partial_ptr": "*fp32",
                "partial_top_ptr": "*fp32",
                "partial_total_ptr": "*fp32",
                "tokens_ptr": "*i32",
                "places_ptr": "*i64",
                "ends_ptr": "*i32",
                "sinks_ptr": "*fp32",
            },
            {
                "HKV": model.num_kv_heads,
                "RATIO": model.ratio,
                "RATIO_PAD": launch.power_of_two(model.ratio),
                "D": model.head_size,
                "D_PAD": max(16, launch.power_of_two(model.head_size)),
                "SPLIT": launch.SPLIT,
                "HAS_SINKS": False,
            },
            launch.options(),
        ),
        product(model, dtype),
        product(model, dtype, is_head=True),
        scrub(model, dtype, dtype),
        Variant(
            f"gather_tags {label}",
            gather_tags.gather_tags_kernel,
            {
                "block_tables_ptr": "*i32",
                "kv_lens_ptr": "*i32",
                "block_tags_ptr": "*i64",
                "out_ptr": "*i64",
                "num_blocks": "i32",
                "table_width": "i32",
            },
            {"BLOCK_SIZE": BLOCK_SIZE, "BLOCK": gather_tags.BLOCK},
            launch.options(),
        ),
    ]


def of_logits(model: Model) -> list[Variant]:
    """Logits are float32 whatever the model's dtype."""
    num_pieces, k = -(-model.vocabulary // logits.PIECE), logits.TOP_K_MAX
    sizes = {"size": "i32", "num_pieces": "i32"}
    return [
        Variant(
            f"greedy {model.name}",
            logits.greedy_kernel,
            {"logits_ptr": "*fp32", "best_ptr": "*i64", "is_finite_ptr": "*i32", **sizes},
            {"PIECE": logits.PIECE},
            launch.options(),
        ),
        Variant(
            f"greedy merge {model.name}",
            logits.greedy_merge_kernel,
            {"best_ptr": "*i64", "place_ptr": "*i64", "num_pieces": "i32"},
            {"PIECES": launch.power_of_two(num_pieces)},
            launch.options(num_warps=1),
        ),
        Variant(
            f"top_k {model.name}",
            logits.top_k_kernel,
            {"logits_ptr": "*fp32", "best_ptr": "*i64", **sizes},
            {"PIECE": logits.PIECE, "K": k},
            launch.options(),
        ),
        Variant(
            f"top_k merge {model.name}",
            logits.top_k_merge_kernel,
            {"best_ptr": "*i64", "place_ptr": "*i64", "num_keys": "i32"},
            {"KEYS": launch.power_of_two(num_pieces * k), "K": k},
            launch.options(logits.NUM_WARPS_MERGE),
        ),
    ]


def scrub(model: Model, number: str, name: str) -> Variant:
    return Variant(
        f"scrub_blocks {model.name} {name}",
        scrub_blocks.scrub_blocks_kernel,
        {"memory_ptr": f"*{number}", "blocks_ptr": "*i64", "block_tags_ptr": "*i64", "num_blocks": "i32"},
        {"SIZE": BLOCK_SIZE * model.num_kv_heads * model.head_size, "BLOCK": scrub_blocks.BLOCK},
        launch.options(),
    )


def product(model: Model, dtype: str, *, is_head: bool = False) -> Variant:
    number, y = f"*{dtype}", "*fp32" if is_head else f"*{dtype}"
    return Variant(
        f"matmul {'head ' if is_head else ''}{model.name} {dtype}",
        matmul.matmul_kernel,
        {"x_ptr": number, "weight_ptr": number, "bias_ptr": number, "y_ptr": y, "num_rows": "i32"},
        {
            "N": 4096 if is_head else model.hidden,
            "K": model.hidden,
            "BLOCK_M": matmul.BLOCK_M,
            "BLOCK_N": matmul.BLOCK_N,
            "BLOCK_K": matmul.BLOCK_K,
            "HAS_BIAS": False,
            "CAST": False,
        },
        launch.options(matmul.NUM_WARPS_HEAD if is_head else matmul.NUM_WARPS, matmul.NUM_STAGES),
        multiplies=dtype != "fp32",
    )


def rope(model: Model, dtype: str, extra: str = "", **changes: bool) -> Variant:
    pointer = f"*{dtype}"
    cache = "*u8" if changes.get("FP8") else pointer
    return Variant(
        f"rope_and_store_kv {model.name} {dtype}" + (f", {extra}" if extra else ""),
        rope_and_store_kv.rope_and_store_kv_kernel,
        {
            "qkv_ptr": pointer,
            "cos_ptr": "*fp32",
            "sin_ptr": "*fp32",
            "key_ptr": cache,
            "value_ptr": cache,
            "slots_ptr": "*i64",
            "token_tags_ptr": "*i64",
            "block_tags_ptr": "*i64",
            "refused_ptr": "*i32",
            "num_blocks": "i32",
            "key_factor": "fp32",
            "value_factor": "fp32",
        },
        {
            "HQ": model.num_heads,
            "HKV": model.num_kv_heads,
            "D": model.head_size,
            "HALF": launch.power_of_two(model.head_size // 2),
            "BLOCK_SIZE": BLOCK_SIZE,
            "HEADS": rope_and_store_kv.HEADS,
            "ROTATE": True,
            "FP8": False,
            "CHECK": True,
            **changes,
        },
        launch.options(),
    )


def attention(capability: int, model: Model, dtype: str, extra: str = "", **changes: bool) -> Variant:
    query_bytes = 4 if dtype == "fp32" else 2
    cache_bytes = 1 if changes.get("FP8") else query_bytes
    shape = attention_shape(capability, model.head_size, model.ratio, BLOCK_SIZE, query_bytes, cache_bytes)
    pointer = f"*{dtype}"
    cache = "*u8" if changes.get("FP8") else pointer
    int32 = ("num_rows", "num_blocks", "table_width", "query_stride", "window")
    return Variant(
        f"paged_attention {model.name} {dtype}" + (f", {extra}" if extra else ""),
        paged_attention.paged_attention_kernel,
        {
            **dict.fromkeys(("query_ptr", "out_ptr"), pointer),
            **dict.fromkeys(("key_ptr", "value_ptr"), cache),
            **dict.fromkeys(("partial_ptr", "partial_top_ptr", "partial_total_ptr", "sinks_ptr"), "*fp32"),
            **dict.fromkeys(("cu_seqlens_ptr", "kv_lens_ptr", "block_tables_ptr", "refused_ptr"), "*i32"),
            **dict.fromkeys(("row_tags_ptr", "block_tags_ptr", "partial_starts_ptr"), "*i64"),
            **dict.fromkeys(("scale", "key_scale", "value_scale", "soft_cap"), "fp32"),
            **dict.fromkeys(int32, "i32"),
        },
        {
            "HKV": model.num_kv_heads,
            "RATIO": model.ratio,
            "D": model.head_size,
            "D_PAD": max(16, launch.power_of_two(model.head_size)),
            "BLOCK_SIZE": BLOCK_SIZE,
            "BLOCK_M": shape.block_m,
            "TILE": shape.tile,
            "SPLIT": launch.SPLIT,
            "HAS_WINDOW": False,
            "HAS_CAP": False,
            "HAS_SINKS": False,
            "FP8": False,
            "CHECK": True,
            "CAST": False,
            **changes,
        },
        launch.options(shape.num_warps, shape.num_stages),
        multiplies=dtype != "fp32",
        is_quick=model is LLAMA_8B and dtype == "bf16" and not extra,
    )
