"""The KV cache of a GPU as its auditor reads it: the face of a numpy array, and only what is asked for is copied.

The words are gathered on the device and come to the host in one copy, behind everything that was launched before: a
look at a few hundred slots costs a round trip and a few kilobytes, not a copy of the cache.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SIGNED = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}  # torch indexes these on every device


class DeviceWords:
    """``memory`` [layers, 2, N, block_size, Hkv, D] of any dtype -> unsigned integers [layers * 2, N, block_size,
    words], words as wide as a slot allows. It is a view: what is read is what is there now."""

    def __init__(self, memory: Tensor) -> None:
        places = memory.flatten(0, 1).flatten(3).view(torch.uint8)
        width = word_width(places.shape[3])
        self._words = places.view(SIGNED[width])
        self.shape: tuple[int, ...] = tuple(self._words.shape)
        self.dtype: np.dtype[Any] = np.dtype(f"u{width}")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, at: tuple[NDArray[np.int64], ...]) -> NDArray[Any]:
        """``at``: place, block, offset and word, arrays that broadcast together. Raises IndexError as numpy would: a
        GPU that is asked for what is not there answers nothing any more, to anyone."""
        for axis, index in enumerate(at):
            if index.size and not -self.shape[axis] <= index.min() <= index.max() < self.shape[axis]:
                raise IndexError(f"axis {axis} of the cache has {self.shape[axis]} entries")
        device = self._words.device
        found = self._words[tuple(torch.from_numpy(index).to(device) for index in at)]
        return found.cpu().numpy().view(self.dtype)


def word_width(slot_bytes: int) -> int:
    """The most bytes, 8 at most, that divide a slot evenly."""
    return next(width for width in SIGNED if slot_bytes % width == 0)
