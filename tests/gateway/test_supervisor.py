"""Children die with their parent, are restarted when they end, and stop when asked."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gateway.host.supervisor import Child, ChildFailedError

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


async def nothing(_: object) -> None:
    return None


def child(argv: list[str], **changes: object) -> Child:
    return Child("child", argv, env=dict(os.environ), **({"on_start": nothing, "on_exit": nothing} | changes))  # type: ignore[arg-type]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(condition: object, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def test_a_killed_parent_leaves_no_child() -> None:
    code = (
        "import asyncio, os, sys\n"
        "from gateway.host.supervisor import Child\n"
        "async def nothing(_): pass\n"
        "async def main():\n"
        "    child = Child('c', [sys.executable, '-c', 'import time; time.sleep(60)'],"
        " on_start=nothing, on_exit=nothing, env=dict(os.environ))\n"
        "    await child.start()\n"
        "    print('pid', child.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert parent.stdout is not None
    pid = next(int(line.split()[1]) for line in parent.stdout if line.startswith("pid "))
    assert is_running(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not is_running(pid))


def test_a_child_that_dies_is_restarted() -> None:
    async def scenario() -> None:
        exits: list[int] = []

        async def on_exit(code: int) -> None:
            exits.append(code)

        one = child(SLEEP, on_exit=on_exit)
        await one.start()
        first = one.pid
        assert first is not None
        await asyncio.sleep(0.2)
        os.kill(first, signal.SIGKILL)
        async with asyncio.timeout(10):
            while one.num_restarts == 0 or one.pid is None:
                await asyncio.sleep(0.02)
        assert one.pid != first
        assert exits == [-signal.SIGKILL]
        await one.stop(grace_s=5)
        assert one.pid is None
        assert one.num_restarts == 1

    asyncio.run(scenario())


def test_a_child_that_never_becomes_ready_is_reported() -> None:
    async def scenario() -> None:
        async def forever(_: object) -> None:
            await asyncio.sleep(60)

        with pytest.raises(ChildFailedError, match="ended with code 3"):
            await child([sys.executable, "-c", "raise SystemExit(3)"], on_start=forever).start()

    asyncio.run(scenario())


def test_a_child_that_ignores_sigterm_is_killed() -> None:
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    )

    async def scenario() -> None:
        one = child([sys.executable, "-c", stubborn])
        await one.start()
        await asyncio.sleep(0.5)
        pid = one.pid
        assert pid is not None
        await one.stop(grace_s=0.2)
        assert not is_running(pid)

    asyncio.run(scenario())
