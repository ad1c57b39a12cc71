"""Does transformers' code, run on our pages, still compute what it computed? For every architecture, on tiny random
weights: three sequences, packed into one batch, in chunks, over scattered blocks, give at every position the logits of
transformers' own eager attention on each sequence alone. Twice: on plain torch and on the native kernels; and what
calls itself exact there gives the same bits when each sequence runs alone, in one piece.

    python -m engine.models.conformance [--write] [MODEL_TYPE...]

float32; a logit may differ by TOLERANCE of the largest logit of its sequence. The weights are wide, so that a wrong
mask, position, window or neighbour moves logits by far more: tests/engine/test_conformance.py plants such faults.
With --write the whole matrix becomes engine/models/served.py and the table in docs/models.md (`make models`).
"""

import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.cache.kv_cache import KVCache, row_tags
from engine.errors import ConfigError
from engine.models.facts import Model
from engine.models.llama import LlamaModel
from engine.models.llama_config import ModelConfig, NotOurs
from engine.models.tiny import VOCAB_SIZE, model_types, tiny_config
from engine.models.transformers_model import TransformersModel
from engine.models.weights import load_weights
from engine.text.tokenizer import read_json
from kernels.backend import Backend, StepTables
from kernels.cpu.backend import NativeBackend
from kernels.torch_cpu import TorchBackend

TOLERANCE = 2e-4
BLOCK_SIZE = 4
CHUNKS = ((5, 1, 1, 1), (3, 7, 1, 4), (16, 1, 1, 7))  # new tokens of each sequence, step by step
NUM_PARAMETERS_MAX = 3_000_000

MEDIA = "not tried: made for images, audio or both, and only text is served here"
SPARSE = "not tried: its attention picks keys by an index of its own"
STATE = "not tried: it keeps recurrent state, which the cache cannot hold"
ENCODER = "not tried: it is an encoder, or the decoder of one"
NOT_TRIED = {
    **dict.fromkeys(
        [
            "emu3",
            "fuyu",
            "gemma3",
            "gemma3n",
            "gemma4",
            "gemma4_unified",
            "git",
            "got_ocr2",
            "llama4",
            "mllama",
            "moshi",
            "moss_transcribe_diarize",
            "musicgen",
            "musicgen_melody",
            "phi4_multimodal",
            "dots3_note",
            "qwen3_5",
            "qwen3_5_moe",
            "qwen4_exp",
            "whisper",
            "trocr",
        ],
        MEDIA,
    ),
    **dict.fromkeys(["axk2", "deepseek_v32", "deepseek_v4", "glm_moe_dsa", "hy_v4", "dots3_note_text"], SPARSE),
    **dict.fromkeys(
        [
            "bamba",
            "granitemoehybrid",
            "kimi_linear",
            "mamba2",
            "nemotron_h",
            "qwen4_exp_text",
            "recurrent_gemma",
            "zamba",
            "zamba2",
            "zaya",
        ],
        STATE,
    ),
    **dict.fromkeys(["gemma4_assistant", "gemma4_unified_assistant"], "not tried: a draft model for another one"),
    "blt": "not tried: it reads bytes in patches of its own",
    "cpmant": "not tried: its attention has a bias of positions of its own",
    "gpt_neo": "its attention does not go through transformers' attention interface",
    **dict.fromkeys(("bloom", "mpt"), "not tried: alibi, whose bias would be dropped"),
    "reformer": "not tried: its attention hashes tokens into buckets of its own",
    "xlm": "its attention does not go through transformers' attention interface",
}


@dataclass(frozen=True, slots=True)
class Result:
    model_type: str
    architecture: str
    route: str = ""  # own | transformers
    features: tuple[str, ...] = ()  # of window, soft_cap, sinks: what the attention of the tiny model uses
    error: float = 0.0  # largest difference over the largest logit, on either kernels
    isolation: str = ""  # bitwise | relaxed: what it promises on the native kernels
    reason: str = ""  # why not, empty when the results agree

    @property
    def passed(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        outcome = (
            f"{self.route}, {', '.join(self.features) or 'plain'}, {self.error:.0e}, {self.isolation}"
            if self.passed
            else self.reason
        )
        return f"{self.model_type:28} {'ok  ' if self.passed else 'no  '} {outcome}"


def check(model_type: str, changes: dict[str, Any] | None = None, native: Backend | None = None) -> Result:
    """Never raises on what a model does: the reason is in the result. ``native`` None takes the best native kernels of
    this machine; KernelError where there are none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    native = native or NativeBackend()
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    if model_type in NOT_TRIED:
        return Result(model_type, architecture, reason=NOT_TRIED[model_type])
    try:
        with tempfile.TemporaryDirectory() as folder:
            theirs = write_tiny(model_type, Path(folder), changes)
            model = load_unlisted(Path(folder), TorchBackend())
            on_native = load_unlisted(Path(folder), native)
    except ConfigError as error:
        return Result(model_type, architecture, reason=_one_line(error))
    except Exception as error:
        return Result(model_type, architecture, reason=f"no tiny model: {type(error).__name__}: {_one_line(error)}")
    route = "own" if isinstance(model, LlamaModel) else "transformers"
    isolation = "bitwise" if on_native.is_exact() else "relaxed"
    difference = 0.0
    for name, one in (("torch", model), ("native", on_native)):
        try:
            difference = max(difference, compare(theirs, one))
        except Exception as error:
            reason = f"{type(error).__name__}: {_one_line(error)}"
            return Result(model_type, architecture, route, _features(model), reason=reason)
        if difference > TOLERANCE:
            reason = f"its logits differ from transformers' own{' on native kernels' if name == 'native' else ''}"
            return Result(model_type, architecture, route, _features(model), difference, reason=reason)
    reason = ""
    if isolation == "bitwise" and not same_bits(on_native):
        reason = "its bits depend on the company, and it calls itself exact"
    return Result(model_type, architecture, route, _features(model), difference, isolation, reason)


@torch.no_grad()
def write_tiny(model_type: str, folder: Path, changes: dict[str, Any] | None = None) -> Any:
    """A model folder with random weights; returns the model, with eager attention."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = tiny_config(model_type, changes)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind._from_config(config).parameters())
    if size > NUM_PARAMETERS_MAX:
        raise ValueError(f"{size} parameters are not tiny: engine/models/tiny.py lacks a size")
    torch.manual_seed(1)
    model = kind._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.25)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model


def load_unlisted(folder: Path, backend: Backend) -> Model:
    """As load_model, without asking whether the architecture is listed: that is what is to be found out."""
    config = read_json(folder / "config.json")
    try:
        own = ModelConfig.from_json(config)
    except NotOurs:
        return TransformersModel.load(folder, config, torch.float32, backend, listed_only=False)
    return LlamaModel(own, load_weights(folder, torch.float32), backend)


@torch.inference_mode()
def compare(theirs: Any, model: Model) -> float:
    """The largest difference of a logit over the largest logit."""
    prompts = draw_prompts()
    worst = 0.0
    for prompt, logits in zip(prompts, packed(model, prompts, CHUNKS), strict=True):
        expected = theirs(input_ids=prompt[None], use_cache=False).logits[0].float()
        error = (logits - expected).abs().max() / expected.abs().max()
        worst = max(worst, float(error.nan_to_num(float("inf"))))
    return worst


@torch.inference_mode()
def same_bits(model: Model) -> bool:
    """Whether each sequence alone, in one piece, has the very logits that it has in chunks among the others."""
    prompts = draw_prompts()
    alone = [packed(model, [prompt], ((len(prompt),),))[0] for prompt in prompts]
    return all(torch.equal(one, other) for one, other in zip(packed(model, prompts, CHUNKS), alone, strict=True))


def draw_prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB_SIZE, (sum(chunks),), generator=generator) for chunks in CHUNKS]


def packed(model: Model, prompts: list[Tensor], chunks: Iterable[tuple[int, ...]]) -> list[Tensor]:
    """The logits [n, V] of each prompt. They run together, over scattered blocks whose unused slots hold NaN;
    ``chunks`` are the new tokens of each, step by step."""
    num_blocks = [-(-len(prompt) // BLOCK_SIZE) for prompt in prompts]
    order = torch.randperm(sum(num_blocks), generator=torch.Generator().manual_seed(4)).tolist()
    tables = np.full((len(prompts), max(num_blocks)), -1, dtype=np.int32)
    for row, count in enumerate(num_blocks):
        tables[row, :count] = [order.pop() for _ in range(count)]
    cache = KVCache(layers=model.cache_layers, num_blocks=sum(num_blocks), block_size=BLOCK_SIZE, dtype=torch.float32)
    for index in range(len(model.cache_layers)):
        for tensor in cache.layer(index):
            tensor.fill_(float("nan"))
    found: list[list[Tensor]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    for counts in zip(*chunks, strict=True):
        positions = [np.arange(start, start + count) for start, count in zip(done, counts, strict=True)]
        slots = [tables[row][at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for row, at in enumerate(positions)]
        done = [start + count for start, count in zip(done, counts, strict=True)]
        tags = row_tags([f"domain {row}" for row in range(len(prompts))])
        slot_mapping = np.concatenate(slots).astype(np.int64)
        cache.claim(slot_mapping, np.repeat(tags, counts))
        tables_of_step = StepTables(
            cu_seqlens=np.cumsum((0, *counts)).astype(np.int32),
            kv_lens=np.array(done, dtype=np.int32),
            block_tables=tables,
            slot_mapping=slot_mapping,
            row_tags=tags,
            block_tags=cache.block_tags,
            block_size=BLOCK_SIZE,
        )
        logits = model.forward(
            torch.cat([prompt[at] for prompt, at in zip(prompts, positions, strict=True)]),
            torch.from_numpy(np.concatenate(positions)),
            cache=cache,
            plan=model.backend.plan(tables_of_step),
            wanted=torch.arange(sum(counts)),
        )
        for parts, part in zip(found, torch.split(logits, list(counts)), strict=True):
            parts.append(part)
    return [torch.cat(parts) for parts in found]


def _features(model: Model) -> tuple[str, ...]:
    if isinstance(model, TransformersModel):
        return model.features
    assert isinstance(model, LlamaModel)
    return tuple(sorted(model.config.needs - {"rotated"}))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:100]


def main(argv: list[str]) -> int:
    from transformers.utils import logging

    quiet: Any = logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    torch.set_num_threads(1)  # tiny models are slower on two
    results = []
    native = NativeBackend()
    for model_type in [name for name in argv if name != "--write"] or model_types():
        results.append(check(model_type, native=native))
        sys.stdout.write(f"{results[-1]}\n")
        sys.stdout.flush()
    passed = sum(result.passed for result in results)
    sys.stdout.write(f"{passed} of {len(results)} architectures give the logits of transformers' own attention")
    sys.stdout.write(f" on plain torch and on {native.name}\n")
    if "--write" in argv:
        from engine.models.matrix import write

        write(results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
