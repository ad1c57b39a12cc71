"""Measurements that need torch run in a process of their own (engine/bench): the command itself stays free of it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from gateway.commands.session import CommandError
from gateway.settings import load_settings
from gateway.world import real_world

TIMEOUT_S = 1_800  # of one measurement


def model_dir() -> Path:
    """The folder of the model that `serve` would serve. Raises CommandError where there is none."""
    folder = load_settings(real_world().environ).effective_model_dir
    if not (folder / "config.json").is_file():
        raise CommandError(f"there is no model at {folder}: run `bulkhead model fetch` first")
    return folder


def measure(*arguments: str, module: str = "engine.bench") -> dict[str, Any]:
    """What one process of engine/bench found. Raises CommandError with the process's last words."""
    return speak(module, "--model-dir", str(model_dir()), *arguments)


def speak(module: str, *arguments: str, folder: Path | None = None, timeout_s: int = TIMEOUT_S) -> dict[str, Any]:
    """The JSON object that a module prints last, run in a process of its own, in ``folder``. Raises CommandError."""
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=timeout_s, check=False, cwd=folder
        )
    except subprocess.TimeoutExpired as error:
        raise CommandError(f"a measurement took longer than {timeout_s} s: ask for less of it") from error
    if done.returncode != 0:
        raise CommandError(f"a measurement failed ({' '.join(arguments)}):\n{done.stderr[-2_000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
