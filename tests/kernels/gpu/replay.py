"""What a CUDA graph does, on a machine without a GPU: launches are kept with their arguments, and a replay is those
launches and nothing else. Numbers that the host passes are kept as they were; memory that was empty is NaN again.

Whoever waits for the device while a capture runs, or reads the host's memory, gets a RuntimeError, as on a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

WAITS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "tensor", "as_tensor"}
WAITS_BELOW = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "lift_fresh"}


def data_of(*trees: Any) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)}


class NoWaiting(TorchFunctionMode):
    """Calls that a copy on one device would hide: `cpu` of what is on the CPU does nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in WAITS:
            raise RuntimeError(f"{func.__name__}: the host waits for the device while a graph is captured")
        return func(*args, **(kwargs or {}))


class Kept(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.again: list[Callable[[], None]] = []
        self.launched: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        name = func.overloadpacket.__name__
        if name in WAITS_BELOW:
            raise RuntimeError(f"{name}: the host waits for the device while a graph is captured")
        out = func(*args, **given)
        self.launched.append(name)
        writes = any(one.alias_info is not None and one.alias_info.is_write for one in func._schema.arguments)
        if writes:
            self.again.append(lambda: func(*args, **given))
        elif name.startswith(("empty", "new_empty")):
            assert isinstance(out, Tensor)
            self.again.append(lambda: poison(out))
            poison(out)
        elif not data_of(out) & data_of(args, given):  # else a view: there is nothing to compute
            self.again.append(lambda: put(out, func(*args, **given)))
        return out

    @contextmanager
    def launches(self) -> Iterator[None]:
        """Launches of interpreted kernels, which torch knows nothing of."""
        run = InterpretedFunction.run

        def kept(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            with _disable_current_modes():
                run(kernel, *args, grid=grid, warmup=warmup, **options)
            self.launched.append(kernel.fn.__name__)
            self.again.append(lambda: run(kernel, *args, grid=grid, warmup=warmup, **options))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(InterpretedFunction, "run", kept)
            patch.setattr(torch, "from_numpy", refuse)
            yield


def refuse(*args: Any) -> None:
    raise RuntimeError("from_numpy: a graph would read the host's memory once, and never again")


def poison(memory: Tensor) -> None:
    memory.fill_(float("nan") if memory.is_floating_point() else -1)


def put(out: Any, new: Any) -> None:
    for old, now in zip(tree_leaves(out), tree_leaves(new), strict=True):
        old.copy_(now)


class Replayed:
    """kernels/gpu/capture.py's Capture. ``launched``: what the last capture kept, by name."""

    def __init__(self) -> None:
        self.launched: list[str] = []

    def __call__(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        kept = Kept()
        with NoWaiting(), kept, kept.launches():
            out = compute()
        self.launched = kept.launched

        def replay() -> Tensor:
            with torch.inference_mode():
                for step in kept.again:
                    step()
            return out

        return replay
