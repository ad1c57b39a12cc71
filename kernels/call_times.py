"""How much of an op's time is spent inside the native library: without Python's part, the checks of arguments and the
memory for results."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kernels.cpu.library import Library

CALLS = (
    *("rms_norm", "activate_and_mul", "attend", "product", "normed_product", "top"),
    *("digest_blocks", "fill_blocks"),
)


class Spent:
    seconds = 0.0


@contextmanager
def inside(library: Library) -> Iterator[Spent]:
    """Adds up the time of every call into the library made within; the calls of ctypes themselves count."""
    spent = Spent()
    functions = {name: getattr(library, name) for name in CALLS}
    for name, function in functions.items():
        setattr(library, name, _timed(function, spent))
    try:
        yield spent
    finally:
        for name, function in functions.items():
            setattr(library, name, function)


def _timed(function: Callable[..., Any], spent: Spent) -> Callable[..., Any]:
    def timed(*arguments: object) -> None:
        started = time.perf_counter()
        function(*arguments)
        spent.seconds += time.perf_counter() - started

    return timed
