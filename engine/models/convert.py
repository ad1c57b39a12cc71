"""Turn a GGUF file of the Llama family into the plain model folder that the engine reads. Run once, as its own process.

    python -m engine.models.convert model.gguf OUT_DIR [TOKENIZER_DIR]

Weights are dequantised to bfloat16 by the `gguf` library; llama.cpp's row permutation of q and k, which it makes for
its architecture "llama" only, is undone. The folder holds model.safetensors, config.json, tokenizer.json,
tokenizer_config.json, chat_template.jinja and generation_config.json, and appears whole or not at all: everything is
written beside it first and renamed at the end.

The tokenizer and chat template come through transformers' GGUF reader where its way of cutting text into words is one
that was checked (TOKENIZERS): a GGUF file names that way and does not hold it. For every other file they are taken
from TOKENIZER_DIR, the model's own folder.

transformers' own way to the weights (`gguf_file=`) gives the same bits, which was checked, but wants a further package
(accelerate) for it.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

REQUIRED_FILES = ("model.safetensors", "config.json", "tokenizer.json")

TENSOR_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
TOKENIZERS = (("gpt2", "smollm"), ("gpt2", "qwen2"))  # tokenizer.ggml.model and .pre
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


class ConvertError(Exception):
    """The GGUF file cannot be converted; the message says which file and why."""


def convert(gguf_path: Path, out_dir: Path, tokenizer_dir: Path | None = None) -> None:
    """Write the model folder ``out_dir``. Raises ConvertError; never leaves a half-written ``out_dir`` behind."""
    if not gguf_path.is_file():
        raise ConvertError(f"there is no GGUF file at {gguf_path}")
    if out_dir.exists():
        raise ConvertError(f"{out_dir} exists already: remove it first to convert again")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    work_dir = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        _write_weights(gguf_path, work_dir)
        if tokenizer_dir is None:
            _write_tokenizer(gguf_path, work_dir)
        else:
            _copy_tokenizer(tokenizer_dir, work_dir)
        missing = [name for name in REQUIRED_FILES if not (work_dir / name).is_file()]
        if missing:
            raise ConvertError(f"converting {gguf_path} gave no {', '.join(missing)}")
        for path in work_dir.iterdir():
            path.chmod(0o644)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        work_dir.chmod(0o755)
        work_dir.rename(out_dir)
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)


def undo_permutation(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """llama.cpp stores q and k rows [head, half, 2] for its interleaved rope; give back [head, 2, half]
    (half-rotation).

    weight [num_heads * head_dim, hidden]; same shape back.
    """
    num_rows, hidden = weight.shape
    half = num_rows // num_heads // 2
    return weight.reshape(num_heads, half, 2, hidden).swapaxes(1, 2).reshape(num_rows, hidden)


def _write_weights(gguf_path: Path, work_dir: Path) -> None:
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file

    try:
        reader = GGUFReader(str(gguf_path))
    except (ValueError, OSError, IndexError) as error:
        raise ConvertError(f"{gguf_path} is no GGUF file: {error}") from error
    config = _config(gguf_path, {name: field.contents() for name, field in reader.fields.items()}, reader)
    weights = {}
    for tensor in reader.tensors:
        name = _tensor_name(tensor.name)
        if name is None:
            raise ConvertError(f"{gguf_path} has a tensor that this converter does not know: {tensor.name}")
        array = dequantize(tensor.data, tensor.tensor_type)
        permuted = config["model_type"] in ("llama", "mistral")
        if permuted and "q_proj.weight" in name:
            array = undo_permutation(array, config["num_attention_heads"])
        elif permuted and "k_proj.weight" in name:
            array = undo_permutation(array, config["num_key_value_heads"])
        weights[name] = torch.from_numpy(np.array(array, order="C")).to(torch.bfloat16)
    save_file(weights, str(work_dir / "model.safetensors"), metadata={"format": "pt"})
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for file_name, body in (("config.json", config), ("generation_config.json", generation)):
        (work_dir / file_name).write_text(json.dumps(body, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _tensor_name(gguf_name: str) -> str | None:
    if not gguf_name.startswith("blk."):
        return TENSOR_NAMES.get(gguf_name)
    _, layer, rest = gguf_name.split(".", 2)
    name = TENSOR_NAMES.get(rest)
    return None if name is None else f"model.layers.{layer}.{name}"


def _config(gguf_path: Path, meta: dict[str, Any], reader: Any) -> dict[str, Any]:
    """config.json of the LlamaForCausalLM that the file holds."""
    arch = str(meta.get("general.architecture"))
    if arch not in ARCHITECTURES:
        raise ConvertError(f"{gguf_path} holds {arch!r}: only {', '.join(ARCHITECTURES)} can be converted")
    if any(name.startswith(f"{arch}.rope.scaling") for name in meta) or _has(reader, "rope_freqs.weight"):
        raise ConvertError(f"{gguf_path} stretches its rope, which this converter does not carry over")
    num_heads = int(meta[f"{arch}.attention.head_count"])
    hidden_size = int(meta[f"{arch}.embedding_length"])
    rotated = int(meta.get(f"{arch}.rope.dimension_count", hidden_size // num_heads))
    head_size = int(meta.get(f"{arch}.attention.key_length", rotated))
    if rotated != head_size and f"{arch}.rope.dimension_count" in meta:
        raise ConvertError(f"{gguf_path} rotates {rotated} of {head_size} elements of a head: not supported")
    eos = int(meta["tokenizer.ggml.eos_token_id"])
    config = {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "hidden_size": hidden_size,
        "intermediate_size": int(meta[f"{arch}.feed_forward_length"]),
        "num_hidden_layers": int(meta[f"{arch}.block_count"]),
        "num_attention_heads": num_heads,
        "num_key_value_heads": int(meta.get(f"{arch}.attention.head_count_kv", num_heads)),
        "head_dim": head_size,
        "vocab_size": _num_rows(reader, "token_embd.weight"),  # padded in some models: more than there are tokens
        "max_position_embeddings": int(meta[f"{arch}.context_length"]),
        "rms_norm_eps": float(meta[f"{arch}.attention.layer_norm_rms_epsilon"]),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(meta.get(f"{arch}.rope.freq_base", 10_000.0))},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": not _has(reader, "output.weight"),
        "bos_token_id": int(meta.get("tokenizer.ggml.bos_token_id", eos)),
        "eos_token_id": eos,
        "pad_token_id": int(meta.get("tokenizer.ggml.padding_token_id", eos)),
        "dtype": "bfloat16",
        "gguf_pre_tokenizer": str(meta.get("tokenizer.ggml.pre", "default")),
        "gguf_tokenizer": str(meta.get("tokenizer.ggml.model")),
    }
    if window := int(meta.get(f"{arch}.attention.sliding_window", 0)):
        if arch != "llama":
            raise ConvertError(f"{gguf_path} has a sliding window, which GGUF does not say the layers of")
        config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    return config


def _has(reader: Any, name: str) -> bool:
    return any(tensor.name == name for tensor in reader.tensors)


def _num_rows(reader: Any, name: str) -> int:
    for tensor in reader.tensors:
        if tensor.name == name:
            return int(tensor.shape[-1])  # GGUF counts dimensions from the inside
    raise ConvertError(f"the file has no {name}")


def _copy_tokenizer(tokenizer_dir: Path, work_dir: Path) -> None:
    if not (tokenizer_dir / "tokenizer.json").is_file():
        raise ConvertError(f"there is no tokenizer.json in {tokenizer_dir}")
    for name in TOKENIZER_FILES:
        if (tokenizer_dir / name).is_file():
            shutil.copyfile(tokenizer_dir / name, work_dir / name)


def _write_tokenizer(gguf_path: Path, work_dir: Path) -> None:
    config = json.loads((work_dir / "config.json").read_text(encoding="utf-8"))
    kind = (config["gguf_tokenizer"], config["gguf_pre_tokenizer"])
    if kind not in TOKENIZERS:
        raise ConvertError(
            f"{gguf_path} has a tokenizer {'/'.join(kind)}, which was not checked: name the folder with the model's own"
            " tokenizer.json (bulkhead model convert --tokenizer FOLDER)"
        )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(str(gguf_path.parent), gguf_file=gguf_path.name).save_pretrained(work_dir)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise ConvertError(f"cannot read the tokenizer of {gguf_path}: {error}") from error
    path = work_dir / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    split_digits(tokenizer, config["gguf_pre_tokenizer"])
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def split_digits(tokenizer: dict[str, Any], pre: str) -> None:
    """SmolLM splits every digit off before byte-level BPE (llama.cpp knows it as pre-tokenizer "smollm"); the GGUF
    reader of transformers drops that step, which changes for example two spaces before a number."""
    if pre == "smollm" and tokenizer["pre_tokenizer"]["type"] == "ByteLevel":
        digits = {"type": "Digits", "individual_digits": True}
        tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, tokenizer["pre_tokenizer"]]}


def main(argv: list[str]) -> int:
    if len(argv) not in (2, 3):
        print("usage: python -m engine.models.convert GGUF OUT_DIR [TOKENIZER_DIR]", file=sys.stderr)
        return 2
    try:
        convert(*(Path(argument) for argument in argv))
    except (ConvertError, OSError) as error:
        print(f"engine.models.convert: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
