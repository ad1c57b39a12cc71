"""The calls into CUDA, in the order that CUDA asks for. What they do only a GPU can tell (docs/gpu.md): here it is told
who was called, on which stream and from which pool."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.gpu.capture import NUM_WARM_UPS, CudaCapture
from tests.kernels.gpu.replay import Replayed


class Notes:
    """Stands in for torch.cuda and keeps what it is told."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.told: list[str] = []
        for name in ("Stream", "stream", "current_stream", "graph", "graph_pool_handle", "CUDAGraph"):
            assert hasattr(torch.cuda, name), "the real one has it"
        assert {"cuda_graph", "pool", "stream"} <= {*inspect.signature(torch.cuda.graph).parameters}
        patch.setattr(torch.cuda, "Stream", lambda device: Stream("side", self.told))
        patch.setattr(torch.cuda, "current_stream", lambda device: Stream("current", self.told))
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        patch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(self.told))
        patch.setattr(torch.cuda, "stream", self.on)
        patch.setattr(torch.cuda, "graph", self.capture)

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        self.told.append(f"on {stream.name}")
        yield
        self.told.append("off")

    @contextmanager
    def capture(self, graph: Any, *, pool: str, stream: Any) -> Iterator[None]:
        self.told.append(f"capture on {stream.name} from {pool}")
        yield
        self.told.append("end")


class Stream:
    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self._told = name, told

    def wait_stream(self, other: "Stream") -> None:
        self._told.append(f"{self.name} waits for {other.name}")


class Graph:
    def __init__(self, told: list[str]) -> None:
        self._told = told

    def replay(self) -> None:
        self._told.append("replay")


def test_warm_up_and_capture_are_on_a_stream_of_their_own_and_a_replay_calls_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    notes = Notes(monkeypatch)
    out = torch.ones(2)

    def compute() -> Tensor:
        notes.told.append("compute")
        return out

    replay = CudaCapture(torch.device("cpu"))(compute)
    assert notes.told == [
        "side waits for current",
        "on side",
        *["compute"] * NUM_WARM_UPS,
        "off",
        "current waits for side",
        "capture on side from pool",
        "compute",
        "end",
    ]
    notes.told.clear()
    assert replay() is out
    assert replay() is out
    assert notes.told == ["replay", "replay"]


def test_the_stand_in_replays_launches_and_not_the_hosts_part() -> None:
    """As a graph does: a number that the host passed stays, what lies in memory is read again."""
    given, passed = torch.tensor([1.0, 2.0]), [10.0]

    def compute() -> Tensor:
        room = torch.empty(2)
        room.copy_(given)
        return (room.view(2, 1) * 2 + passed[0])[:, 0]

    replay = Replayed()(compute)
    given.copy_(torch.tensor([3.0, 4.0]))
    passed[0] = 99.0
    first = replay()
    assert first.tolist() == [16.0, 18.0]
    given.zero_()
    assert replay() is first
    assert first.tolist() == [10.0, 10.0]


def test_the_stand_in_shows_who_reads_memory_that_nobody_wrote() -> None:
    replay = Replayed()(lambda: torch.empty(2) * 0.0)
    assert replay().isnan().all()
