"""The data folder (kept), the runtime folder (there while a server is), the lock that keeps a second server out."""

import fcntl
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


class FolderError(Exception):
    """The data folder cannot be used; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Folders:
    data: Path
    run: Path
    shared_secrets: Path | None = None  # where several gateways read the same ones

    @property
    def secrets(self) -> Path:
        return self.shared_secrets or self.data / "secrets"

    @property
    def tls(self) -> Path:
        return self.data / "tls"

    @property
    def valkey(self) -> Path:
        return self.data / "valkey"

    @property
    def journal(self) -> Path:
        return journal_of(self.data)

    @property
    def log(self) -> Path:
        return self.data / "log"

    @property
    def log_keys(self) -> Path:
        return self.secrets / "log"

    @property
    def reports(self) -> Path:
        return self.data / "reports"

    @property
    def valkey_socket(self) -> Path:
        return self.run / "valkey.sock"

    @property
    def engine_socket(self) -> Path:
        return self.run / "engine.sock"


def journal_of(data_dir: Path) -> Path:
    """Where the engine's workers of a data folder count what they produced."""
    return data_dir / "journal"


def open_folders(data_dir: Path, secrets_dir: str = "") -> Folders:
    """Create what is missing and check that it can be written. `secrets_dir`: "" is in the data folder.

    Raises FolderError.
    """
    data = data_dir.absolute()
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=data) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
    except OSError as error:
        raise FolderError(
            f"the data folder {data} cannot be written ({error.strerror}):"
            " fix its owner, mode or disk, or set BULKHEAD_DATA_DIR to a folder that can"
        ) from error
    return Folders(data, _runtime_folder(data), Path(secrets_dir).absolute() if secrets_dir else None)


def gateway_id(folders: Folders, entropy: Callable[[int], bytes]) -> str:
    """The name of the gateway that works in this data folder, whose journal is here; made at its first start."""
    path = folders.data / "gateway_id"
    try:
        return path.read_text("ascii").strip()
    except FileNotFoundError:
        made = f"gw_{entropy(16).hex()}"
        temporary = path.with_suffix(".new")  # whole or not at all
        temporary.write_text(made + "\n", "ascii")
        temporary.rename(path)
        return made


@contextmanager
def only_server(folders: Folders) -> Iterator[None]:
    """Hold the data folder's lock, and have a runtime folder meanwhile.

    Raises FolderError when another server holds it. The kernel releases it on exit; the sockets of a server that was
    killed are found and replaced by the next one.
    """
    handle = os.open(folders.data / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = os.read(handle, 32).decode().strip() or "unknown"
            raise FolderError(
                f"another bulkhead (process {pid}) serves {folders.data}:"
                " stop it, or set BULKHEAD_DATA_DIR and BULKHEAD_PORT for a second one"
            ) from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        _make_private(folders.run)
        try:
            yield
        finally:  # with the lock still held: nobody else has it open
            for socket in (folders.valkey_socket, folders.engine_socket):
                socket.unlink(missing_ok=True)
            with suppress(OSError):  # something else lies there: not ours to remove
                folders.run.rmdir()
    finally:
        os.close(handle)


def _runtime_folder(data: Path) -> Path:
    """A short path for unix sockets (108 bytes at most); who serves makes the folder."""
    tag = hashlib.sha256(os.fsencode(data)).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"bulkhead-{os.getuid()}-{tag}"


def _make_private(folder: Path) -> None:
    """Owned by us and closed to others. Raises FolderError."""
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise FolderError(f"{folder} belongs to somebody else or is open to others: remove it")
