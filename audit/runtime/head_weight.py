"""The head's matrix, read from the model's files by the auditor itself: what the engine has in memory was packed anew.

A safetensors file is a little-endian uint64, the length of a JSON header, the header, and the tensors' bytes from
there on (github.com/huggingface/safetensors). The matrix is mapped, not read: only the rows that are looked at come
into memory. So a model's files must not be written while it is served; put a new folder in their place.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

KINDS: dict[str, np.dtype[Any]] = {"BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
HEADER_BYTES_MAX = 100_000_000  # the format's own limit


def mapped(model_dir: Path, tensor: str) -> npt.NDArray[Any]:
    """[V, K], read-only: float32, float16, or uint16 where the file holds bfloat16. Raises ValueError, or OSError,
    where the folder has no such matrix."""
    for path in sorted(model_dir.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > HEADER_BYTES_MAX:
                raise ValueError(f"{path} has a header of {size} bytes")
            told = json.loads(file.read(size)).get(tensor)
        if told is None:
            continue
        if told["dtype"] not in KINDS or len(told["shape"]) != 2:
            raise ValueError(f"{tensor} in {path} is {told['dtype']} of shape {told['shape']}")
        at = 8 + size + told["data_offsets"][0]
        # As a plain array: the other kind makes one of its own of every row that is looked at.
        return np.asarray(np.memmap(path, KINDS[told["dtype"]], "r", at, tuple(told["shape"])))
    raise ValueError(f"no file in {model_dir} holds {tensor}")
