"""Who computes the ops of a model on this machine."""

from collections.abc import Callable

from kernels.backend import Backend, KernelError
from kernels.cpu.backend import NativeBackend
from kernels.torch_cpu import TorchBackend


def choose(choice: str, num_threads: int, log: Callable[[str], None]) -> Backend:
    """``auto`` takes the best that this machine has, and plain torch with one line in the log where that is all.
    ``triton`` is the GPU's, or interpreted ones for tests; it is never chosen by itself (docs/gpu.md).

    Raises KernelError where a named instruction set cannot be had.
    """
    if choice == "torch":
        return TorchBackend()
    if choice == "triton":
        return _triton()
    try:
        return NativeBackend("" if choice == "auto" else choice, num_threads, log)
    except KernelError as error:
        if choice != "auto":
            raise
        log(f"{error}: serving on plain torch, slower and with relaxed isolation; `make native` builds the kernels")
        return TorchBackend()


def _triton() -> Backend:
    """Imported only where it is asked for: Triton is an extra, and takes its time."""
    try:
        from kernels.gpu.backend import TritonBackend
    except ImportError as error:
        raise KernelError("the Triton kernels want the package triton: install bulkhead[gpu]") from error
    return TritonBackend()
