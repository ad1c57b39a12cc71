"""Keep the HTTP process small, and keep it from standing still.

glibc's allocator is told to give memory back: by default each thread gets an arena of its own, and a large block that
was freed once (19 MiB for a password hash) raises the size from which blocks are returned to the system. Elsewhere than
on glibc this does nothing.

Python's collector looks through every object that has lived for long, now and then, while requests wait: a tenth of a
second for what the start has made. All of that lives as long as the process, so the collector is told not to look.

A thread that computes keeps the interpreter for 5 ms before the event loop gets it back, each time that the loop has
looked for news; a request looks seven times. The log's files are written in such a thread every other second, so the
loop gets it back sooner.
"""

import ctypes
import gc
import sys

M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8
ARENAS = 2
SWITCH_INTERVAL_S = 0.0005
MMAP_THRESHOLD_BYTES = 128 * 1024  # glibc's own start value; setting it stops it from growing


def return_freed_memory() -> bool:
    """Call before threads start. False where the allocator does not know these settings."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_ARENA_MAX, ARENAS)) and bool(mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES))


def keep_what_started() -> int:
    """Call when the start is over: how many objects the collector does not look through any more."""
    gc.collect()
    gc.freeze()
    return gc.get_freeze_count()


def let_the_loop_in() -> None:
    """Other threads give the interpreter back within SWITCH_INTERVAL_S."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
