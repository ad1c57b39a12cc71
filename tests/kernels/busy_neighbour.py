"""`python -m tests.kernels.busy_neighbour LIBRARY`: a short op on one thread and on two, in turn, while other processes
do nothing but compute on the second thread's core. Prints every call's time in microseconds, as JSON."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from kernels.cpu import library
from kernels.cpu.backend import NativeBackend

SIZE, NUM_ROWS = 576, 24  # a product of some 50 to 100 us on one thread
NUM_TURNS, CALLS_EACH = 40, 50
PAUSE_S = 1e-4  # between calls, as between those of a step
NUM_NEIGHBOURS = 3  # with one the system still gives a thread the core nearly as often as it asks
SPIN = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
end = time.monotonic() + float(sys.argv[2])
print(flush=True)
while time.monotonic() < end and os.getppid() == int(sys.argv[3]):
    for _ in range(10000):
        pass
"""
NEIGHBOUR_S = 60  # it ends by itself, should nobody end it


def main(path: str) -> None:
    library.PATH = Path(path)
    own, shared = sorted(os.sched_getaffinity(0))[:2]
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {shared})
    NativeBackend("", 2)  # its thread stays on the core where it began
    os.sched_setaffinity(0, {own})
    product = NativeBackend().linear(torch.randn((SIZE, SIZE)).bfloat16())
    x = torch.randn((NUM_ROWS, SIZE)).bfloat16()
    command = [sys.executable, "-c", SPIN, str(shared), str(NEIGHBOUR_S), str(os.getpid())]
    times: dict[int, list[float]] = {1: [], 2: []}
    neighbours = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(NUM_NEIGHBOURS)]
    try:
        for neighbour in neighbours:
            assert neighbour.stdout is not None
            neighbour.stdout.readline()  # it computes
        for turn in range(NUM_TURNS):
            num_threads = 1 + turn % 2
            NativeBackend("", num_threads)
            for _ in range(CALLS_EACH):
                time.sleep(PAUSE_S)
                started = time.perf_counter()
                product(x)
                times[num_threads].append((time.perf_counter() - started) * 1e6)
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.communicate()
    sys.stdout.write(json.dumps(times))


if __name__ == "__main__":
    main(sys.argv[1])
