"""Model weights from a folder of safetensors files. Nothing is unpickled, nothing is fetched."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engine.errors import ConfigError

_CHUNK_BYTES = 1 << 22


def weight_files(model_dir: Path) -> list[Path]:
    """The folder's weight files, in order of name. Raises ConfigError if there are none."""
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"the model folder has no .safetensors file: {model_dir}")
    return files


def load_weights(model_dir: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors by name, in ``dtype``. Raises ConfigError on a damaged file."""
    weights: dict[str, Tensor] = {}
    for path in weight_files(model_dir):
        try:
            for name, tensor in load_file(path).items():
                weights[name] = tensor.to(dtype)
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
    return weights


def model_digest(model_dir: Path) -> str:
    """sha256 over config, tokenizer, chat template and weights, in order of file name: what is served, in one
    string."""
    digest = hashlib.sha256()
    names = [*model_dir.glob("*.json"), *model_dir.glob("*.jinja"), *weight_files(model_dir)]
    for path in sorted(names, key=lambda path: path.name):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"
