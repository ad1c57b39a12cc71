"""Measurements that need torch run in a process of their own (engine/bench): the command itself stays free of it."""

import json
import subprocess
import sys
import tempfile
import threading
from collections import deque
from pathlib import Path
from typing import Any

from gateway.commands.session import CommandError
from gateway.settings import load_settings
from gateway.world import real_world

TIMEOUT_S = 1_800  # of one measurement
PROGRESS = "progress: "  # how engine/bench begins a line of progress


def model_dir() -> Path:
    """The folder of the model that `serve` would serve. Raises CommandError where there is none."""
    folder = load_settings(real_world().environ).effective_model_dir
    if not (folder / "config.json").is_file():
        raise CommandError(f"there is no model at {folder}: run `bulkhead model fetch` first")
    return folder


def measure(*arguments: str, module: tuple[str, ...] = ("engine.bench",)) -> dict[str, Any]:
    """What one process of engine/bench found; ``module`` with what it must be told first. Raises CommandError with the
    process's last words."""
    return speak(*module, "--model-dir", str(model_dir()), *arguments)


def speak(module: str, *arguments: str, folder: Path | None = None, timeout_s: int = TIMEOUT_S) -> dict[str, Any]:
    """The JSON object that a module prints last, run in a process of its own, in ``folder``; its lines of progress are
    shown as they come. Raises CommandError."""
    command = [sys.executable, "-m", module, *arguments]
    last_words: deque[str] = deque(maxlen=40)
    with (
        tempfile.TemporaryFile("w+") as answers,
        subprocess.Popen(  # noqa: S603
            command, stdout=answers, stderr=subprocess.PIPE, text=True, cwd=folder
        ) as process,
    ):
        timer = threading.Timer(timeout_s, process.kill)
        timer.start()
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(PROGRESS):
                sys.stderr.write(line.removeprefix(PROGRESS))
            last_words.append(line)
        code = process.wait()
        if not timer.is_alive():
            raise CommandError(f"a measurement took longer than {timeout_s} s: ask for less of it")
        timer.cancel()
        if code != 0:
            raise CommandError(f"a measurement failed ({' '.join(arguments)}):\n{''.join(last_words)[-2_000:]}")
        answers.seek(0)
        answer: dict[str, Any] = json.loads(answers.read().splitlines()[-1])
        return answer
