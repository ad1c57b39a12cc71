"""Model weights from a folder of safetensors files, one or many. Nothing is unpickled, nothing is fetched.

Where the folder has an index (model.safetensors.index.json: which tensor lies in which file), it is held against the
files, tensor by tensor: a shard that was not copied, or one left over from another model, is an error.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from engine.errors import ConfigError

_CHUNK_BYTES = 1 << 22


INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")


def weight_files(model_dir: Path) -> list[Path]:
    """The folder's weight files, in order of name. Raises ConfigError if there are none."""
    files = sorted(model_dir.glob("*.safetensors"))
    if files:
        return files
    others = sorted(path.name for path in model_dir.iterdir() if path.suffix in (*PICKLED, ".gguf"))
    if any(name.endswith(".gguf") for name in others):
        remedy = f"convert it first: bulkhead model convert {model_dir / others[0]} FOLDER"
    elif others:
        remedy = f"{others[0]} is of a kind that can run code and is never opened: save the model as safetensors"
    else:
        remedy = "point BULKHEAD_MODEL_DIR at a folder that has some"
    raise ConfigError(f"the model folder has no .safetensors file: {model_dir}; {remedy}")


def check_folder(model_dir: Path) -> None:
    """Raises ConfigError where files are missing, damaged, or not what the index says."""
    owners = _owners(weight_files(model_dir))
    if not (model_dir / INDEX).is_file():
        return
    try:
        index: dict[str, str] = json.loads((model_dir / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{model_dir / INDEX} cannot be read: {error}") from error
    if absent := sorted(set(index.values()) - set(owners.values())):
        raise ConfigError(f"{INDEX} names {', '.join(absent[:3])}, not in {model_dir}: copy the whole model")
    if missing := sorted(name for name, file in index.items() if owners.get(name) != file):
        raise ConfigError(f"{INDEX} says that {index[missing[0]]} holds {missing[0]}, which it does not")
    if surplus := sorted(set(owners) - set(index)):
        raise ConfigError(
            f"{owners[surplus[0]]} holds {surplus[0]}, which {INDEX} does not know: another model's file?"
        )


def _owners(files: list[Path]) -> dict[str, str]:
    """The file of each tensor, from the files' headers."""
    owners: dict[str, str] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        if twice := sorted(set(names) & set(owners)):
            raise ConfigError(f"{owners[twice[0]]} and {path.name} both hold {twice[0]}: remove one of the two")
        owners |= dict.fromkeys(names, path.name)
    return owners


def load_weights(model_dir: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors by name, in ``dtype``. Raises ConfigError on a damaged folder."""
    check_folder(model_dir)
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
