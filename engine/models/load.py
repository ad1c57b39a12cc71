"""From a model folder to a model: the engine's own decoder where it knows the architecture, transformers' code where
not. What neither can honour is refused by name.
"""

from pathlib import Path

import torch

from engine.errors import ConfigError
from engine.models.facts import Log, Model
from engine.models.llama import LlamaModel
from engine.models.llama_config import ModelConfig, NotOurs
from engine.models.weights import load_weights
from engine.text.tokenizer import read_json
from kernels.backend import Backend
from kernels.choice import choose

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def load_model(model_dir: Path, *, dtype: str, backend: Backend | None = None, log: Log = lambda line: None) -> Model:
    """``backend`` None takes the best kernels of this machine, on one thread. Raises ConfigError."""
    if not model_dir.is_dir():
        raise ConfigError(f"there is no model folder at {model_dir}")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    json = read_json(model_dir / "config.json")
    backend = backend or choose("auto", 1, log)
    try:
        config = ModelConfig.from_json(json)
    except NotOurs as reason:
        if backend.device.type != "cpu":
            raise ConfigError(f"{reason}, and transformers' code is not served on a GPU yet") from reason
        from engine.models.transformers_model import TransformersModel

        log(f"{reason}: taking transformers' code, with relaxed isolation")
        return TransformersModel.load(model_dir, json, DTYPES[dtype], backend)
    return LlamaModel(config, load_weights(model_dir, DTYPES[dtype]), backend)


def check_vocabulary(num_tokens: int, vocab_size: int) -> None:
    """Raises ConfigError where the tokenizer has tokens that the model does not know: it would fail at their first
    use."""
    if num_tokens > vocab_size:
        raise ConfigError(f"the tokenizer has {num_tokens} tokens and the model {vocab_size}: not of one model")
