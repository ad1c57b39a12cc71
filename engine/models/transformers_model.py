"""Every other decoder of transformers: its code, our pages.

The model runs on flattened tokens [1, T] with the positions of each, without a cache or a mask of its own; attention
goes to engine/models/paged.py. Its matrix products and norms are torch's, whose last bits depend on the company:
isolation is relaxed. Which architectures come out right is not argued but measured: engine/models/conformance.py
compares each with its own eager attention, and only those in engine/models/served.py are served.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.cache.kv_cache import KVCache
from engine.errors import ConfigError
from engine.models import paged
from engine.models.facts import CacheLayer
from engine.models.probe import probe
from engine.models.served import REFUSED, SERVED
from engine.models.weights import check_folder
from kernels.backend import Backend

LOADING_FAULTS = ("missing_keys", "unexpected_keys", "mismatched_keys")
LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
# RoBERTa's line counts positions from the padding token's id plus one, when it counts them itself.
COUNTS_FROM_PADDING = frozenset(
    ["camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"]
)


@dataclass(frozen=True, slots=True)
class TransformersFacts:
    context_max: int
    vocab_size: int


class TransformersModel:
    """``model`` is a transformers model whose attention implementation is paged.NAME."""

    def __init__(self, model: Any, backend: Backend) -> None:
        self._model = model.eval()
        self._pages = paged.Pages()
        self._pages.attach(model)
        self._accepts = frozenset(inspect.signature(model.forward).parameters)
        self.dtype: torch.dtype = model.dtype
        text = model.config.get_text_config()
        counts = text.model_type in COUNTS_FROM_PADDING
        self._first_position = int(text.pad_token_id or 0) + 1 if counts else 0
        limit = context_max(text) - self._first_position
        probed = probe(self._run, self._pages, limit, self.dtype)
        self._pages.calls = with_windows(text, probed.calls)
        self.config = TransformersFacts(limit, probed.vocab_size)
        self.backend = backend

    @classmethod
    def load(
        cls,
        model_dir: Path,
        config: Mapping[str, Any],
        dtype: torch.dtype,
        backend: Backend,
        listed_only: bool = True,
    ) -> "TransformersModel":
        """Raises ConfigError on what cannot be served; ``listed_only`` False is for the conformance matrix."""
        from transformers import AutoModelForCausalLM

        loader: Any = AutoModelForCausalLM

        check_config(config, listed_only)
        check_folder(model_dir)
        paged.register()
        try:
            model, report = loader.from_pretrained(
                model_dir,
                attn_implementation=paged.NAME,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except KeyError as error:  # a table of its own, from names of attention to classes
            raise paged.Unfit(f"transformers cannot give it our attention: no {error} among its own") from error
        except (OSError, ValueError, AttributeError, TypeError, ImportError, RuntimeError) as error:
            raise ConfigError(f"transformers cannot load {model_dir}: {' '.join(str(error).split())}") from error
        for fault in LOADING_FAULTS:
            if names := sorted(str(name) for name in report.get(fault) or ()):
                raise ConfigError(f"the weights and config.json disagree ({fault}): {', '.join(names[:3])}")
        loaded = cls(model, backend)
        proven = SERVED[config["model_type"]][2] if listed_only else loaded.features
        if unproven := set(loaded.features) - set(proven):
            rules = " and ".join(sorted(unproven)).replace("_", " ")
            raise ConfigError(f"cannot serve {config['architectures']}: its {rules} was never shown to be right here")
        return loaded

    @property
    def cache_layers(self) -> tuple[CacheLayer, ...]:
        return tuple(call.cache_layer for call in self._pages.calls)

    @property
    def head_facts(self) -> None:
        """Where the head begins is a matter of each class: nothing is shown."""
        return None

    @property
    def features(self) -> tuple[str, ...]:
        """What its attention uses, of window, soft_cap and sinks."""
        used = frozenset[str]().union(*(call.needs for call in self._pages.calls))
        return tuple(sorted(used - {"rotated"}))

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        *,
        cache: KVCache,
        plan: Any,
        wanted: Tensor,
        go_on: Callable[[float], bool] | None = None,
        show: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """See engine/models/facts.py."""
        with self._pages.step(cache, plan, self.backend, go_on):
            logits = self._run(token_ids, positions, wanted)
        self.backend.check(plan)
        return logits

    def is_exact(self) -> bool:
        return False

    def _run(self, token_ids: Tensor, positions: Tensor, wanted: Tensor) -> Tensor:
        arguments: dict[str, Any] = {"position_ids": (positions + self._first_position)[None], "use_cache": False}
        if "logits_to_keep" in self._accepts:
            arguments["logits_to_keep"] = wanted
        logits: Tensor = self._model(input_ids=token_ids[None], **arguments).logits[0]
        return (logits if "logits_to_keep" in self._accepts else logits[wanted]).float()


def check_config(config: Mapping[str, Any], listed_only: bool = True) -> None:
    """Raises ConfigError, by name, on a config.json that is not to be served."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    model_type = str(config.get("model_type"))
    architectures = config.get("architectures") or []
    if model_type not in CONFIG_MAPPING:
        code = " (it brings code of its own, which is never run)" if config.get("auto_map") else ""
        raise ConfigError(f"cannot serve {architectures or model_type}: transformers does not know it{code}")
    kind = CONFIG_MAPPING[model_type]
    served: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None)
    name = "" if served is None else served.__name__
    if name not in architectures:
        raise ConfigError(f"cannot serve {architectures}: {model_type} is served as {name or 'nothing'} only")
    if config.get("is_encoder_decoder"):
        raise ConfigError(f"cannot serve {name}: it is an encoder with a decoder")
    if config.get("quantization_config"):
        raise ConfigError("cannot serve quantised weights: convert them to bfloat16 first")
    if config.get("alibi"):
        raise ConfigError(f"cannot serve {name} with alibi: its bias would be dropped")
    if listed_only and model_type not in SERVED:
        _, reason = REFUSED.get(model_type, ("", "nobody has shown that its results are right here (docs/models.md)"))
        raise ConfigError(f"cannot serve {name}: {reason}")


def context_max(text: Any) -> int:
    """Positions up to which a token's numbers depend on its own sequence alone.

    `dynamic` and `longrope` stretch the angles of a whole batch once its longest sequence passes the length of
    training; chunked attention equals full attention within the first chunk. Raises ConfigError.
    """
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        raise ConfigError("config.json names no max_position_embeddings")
    limits = [limit]
    if "chunked_attention" in (getattr(text, "layer_types", None) or ()):
        limits.append(int(text.attention_chunk_size))
    rope = getattr(text, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, Mapping))):
        if part.get("rope_type") == "longrope":
            trained = part.get("original_max_position_embeddings") or text.original_max_position_embeddings
            limits.append(int(trained))
    return min(limits)


def with_windows(text: Any, calls: list[paged.Call]) -> list[paged.Call]:
    """Fill in windows that a model leaves to the mask, which nobody builds here. Raises Unfit where one is lost."""
    types = getattr(text, "layer_types", None) or ()
    if unknown := set(types) - LAYER_TYPES:
        raise paged.Unfit(f"nobody here knows its {', '.join(sorted(unknown))} layers")
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    if not isinstance(window, int) or window <= 0:
        return calls
    slides = [kind == "sliding_attention" for kind in types] or [True] * len(calls)
    if sum(call.window > 0 for call in calls) >= sum(slides):
        return calls
    if len(slides) != len(calls):
        raise paged.Unfit(f"{sum(slides)} of its layers have a window, and its attention calls do not say which")
    return [replace(call, window=window if slide else 0) for call, slide in zip(calls, slides, strict=True)]
