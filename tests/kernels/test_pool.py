"""The threads behind the ops: whoever calls at once gets its own results, and nobody spins for long."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from kernels.cpu.backend import NativeBackend
from tests.kernels.native import bits, isas

pytestmark = pytest.mark.skipif(not isas(), reason="no native kernels: install a C++ compiler, run make native")
NUM_CALLERS, NUM_CALLS = 4, 60
NUM_THREADS = 5  # more than cores, so that some come late to a job


def test_callers_at_once_get_their_own_results() -> None:
    """A thread that comes late from an old job must not take a piece of a new one, nor two callers mix their jobs."""
    alone = NativeBackend("", 1)
    asked = [torch.randn((24 + caller, 2048), generator=torch.Generator().manual_seed(caller)) for caller in range(4)]
    wanted = [alone.silu_and_mul(one) for one in asked]
    backend = NativeBackend("", NUM_THREADS)

    def call(caller: int) -> list[Tensor]:
        return [backend.silu_and_mul(asked[caller]) for _ in range(NUM_CALLS)]

    try:
        with ThreadPoolExecutor(NUM_CALLERS) as callers:
            for caller, results in enumerate(callers.map(call, range(NUM_CALLERS))):
                assert all(torch.equal(bits(one), bits(wanted[caller])) for one in results)
        for _ in range(NUM_CALLS):  # jobs of different sizes, one right after the other
            for one, right in zip(asked, wanted, strict=True):
                assert torch.equal(bits(backend.silu_and_mul(one)), bits(right))
    finally:
        NativeBackend("", 1)


def test_threads_that_have_nothing_to_do_sleep() -> None:
    """A bound on spinning: else every core would be busy between two steps, with nothing."""
    backend = NativeBackend("", NUM_THREADS)
    try:
        backend.silu_and_mul(torch.randn((64, 2048)))
        time.sleep(0.02)  # many times what they may spin
        started = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - started < 0.15, "idle threads take time"
    finally:
        NativeBackend("", 1)
