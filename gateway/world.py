"""The only place that touches the wall clock, the monotonic clock, entropy and the environment.

Everything else receives these as arguments, so that a test can hand in its own world.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class World:
    now_ns: Callable[[], int]  # wall clock, nanoseconds since the epoch, UTC
    monotonic_ns: Callable[[], int]
    entropy: Callable[[int], bytes]  # cryptographically strong random bytes
    environ: Mapping[str, str]


def real_world() -> World:
    return World(now_ns=time.time_ns, monotonic_ns=time.monotonic_ns, entropy=os.urandom, environ=os.environ)


def new_id(prefix: str, entropy: Callable[[int], bytes]) -> str:
    """A random id such as ``req_3f9c...``: the prefix and 128 bits in hex."""
    return f"{prefix}_{entropy(16).hex()}"
