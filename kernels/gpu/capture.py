"""How launches are kept and launched again: the only two places that know CUDA graphs, and a stand-in without them.

What is captured must launch the same kernels on the same memory each time. It may not wait for the device, nor read a
number of the host's that changes: a graph keeps the numbers that it saw. tests/kernels/gpu/replay.py holds both on a
machine without a GPU: it keeps each launch with its arguments, and replays nothing but those.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Compute = Callable[[], Tensor]
NUM_WARM_UPS = 2  # kernels are compiled and loaded at the first call, which a capture cannot wait for


class Capture(Protocol):
    def __call__(self, compute: Compute) -> Compute:
        """What launches it again, and gives its output, in the same memory each time. ``compute`` is called now, one
        or more times, on whatever its inputs hold."""
        ...


class CudaCapture:
    """All graphs share one pool of memory: one's numbers may lie where another's lay, so an output is read before the
    next replay of any of them. They run on the caller's stream, one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Compute) -> Compute:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(NUM_WARM_UPS):
                compute()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            out = compute()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


class CalledAgain:
    """For interpreted kernels: the same calls on the same memory, the host's part of them included."""

    def __call__(self, compute: Compute) -> Compute:
        out = compute().clone()

        def replay() -> Tensor:
            return out.copy_(compute())

        return replay
