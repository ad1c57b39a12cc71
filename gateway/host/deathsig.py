"""Run a command that dies with its parent: ``python -I -S deathsig.py PARENT_PID COMMAND...``.

Sets PR_SET_PDEATHSIG and then replaces itself by the command, so that a gateway killed with -9 leaves nothing running.
The check of the parent's pid closes the gap between the fork and the prctl. Linux only; elsewhere it only execs.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1


def dying_with_me(command: Sequence[str]) -> list[str]:
    """The command that runs ``command`` as a child of this process."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def main() -> None:
    parent_pid = int(sys.argv[1])
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent_pid:
            raise SystemExit(1)
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606 - the whole purpose


if __name__ == "__main__":
    main()
