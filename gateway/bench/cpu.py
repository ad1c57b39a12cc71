"""What the processes of a benchmark use of the cores, and how long they wait for one.

Load, gateway, engine, stores and database share this machine's cores. A thread that could run and has none waits, and
whoever waits for that thread does, too: that part of a latency is the machine's, not the code's. Linux counts both for
every thread, in nanoseconds (/proc/PID/task/TID/schedstat). Elsewhere there is nothing to tell.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Used:
    """Of all threads of some processes, since they began."""

    cpu_ns: int = 0
    waited_ns: int = 0  # could have run, and had no core

    def __add__(self, other: "Used") -> "Used":
        return Used(self.cpu_ns + other.cpu_ns, self.waited_ns + other.waited_ns)

    def __sub__(self, other: "Used") -> "Used":
        return Used(self.cpu_ns - other.cpu_ns, self.waited_ns - other.waited_ns)


def used_by(roots: Mapping[str, int]) -> dict[str, Used]:
    """By name, of the process `roots[name]` and its descendants, less those that another name has. Threads and
    processes that have ended are not in it: take differences over a time in which none ends."""
    children: dict[int, list[int]] = {}
    for pid in _numbers(PROC):
        children.setdefault(_parent(pid), []).append(pid)
    owned = set(roots.values())
    return {
        name: sum((_used(pid) for pid in _tree(root, children, owned - {root})), Used()) for name, root in roots.items()
    }


def _tree(root: int, children: Mapping[int, list[int]], without: set[int]) -> list[int]:
    found, left = list[int](), [root]
    while left:
        pid = left.pop()
        found.append(pid)
        left += [child for child in children.get(pid, []) if child not in without]
    return found


def _used(pid: int) -> Used:
    total = Used()
    for thread in _numbers(PROC / str(pid) / "task"):
        try:
            cpu, waited, _ = (PROC / str(pid) / "task" / str(thread) / "schedstat").read_text().split()
        except (OSError, ValueError):
            continue  # it has just ended, or the kernel does not count
        total += Used(int(cpu), int(waited))
    return total


def _parent(pid: int) -> int:
    try:
        return int((PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def _numbers(folder: Path) -> list[int]:
    try:
        return [int(one.name) for one in folder.iterdir() if one.name.isdigit()]
    except OSError:
        return []
