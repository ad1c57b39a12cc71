import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.host.folders import FolderError, only_server, open_folders
from gateway.host.port import PortError, bind


def test_a_data_folder_that_is_a_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(FolderError, match=r"cannot be written.*BULKHEAD_DATA_DIR"):
        open_folders(tmp_path / "data")


def test_the_runtime_folder_is_short_and_private(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 80) / ("e" * 80)
    folders = open_folders(deep)
    assert len(os.fsencode(folders.engine_socket)) < 100
    with only_server(folders):
        assert folders.run.stat().st_mode & 0o077 == 0


def test_the_runtime_folder_is_there_while_a_server_is(tmp_path: Path) -> None:
    """Commands make none; a server that ends leaves nothing; a killed one's is taken over."""
    folders = open_folders(tmp_path)
    assert not folders.run.exists()
    for killed_before in (False, True):
        if killed_before:
            folders.run.mkdir(mode=0o700)
            folders.engine_socket.touch()
        with only_server(folders):
            folders.valkey_socket.touch()
        assert not folders.run.exists()
    folders.run.mkdir(mode=0o755)
    with pytest.raises(FolderError, match="open to others"), only_server(folders):
        pass
    folders.run.chmod(0o700)
    (folders.run / "of somebody").touch()
    with only_server(folders):
        pass
    assert list(folders.run.iterdir()) == [folders.run / "of somebody"]
    shutil.rmtree(folders.run)


def test_a_second_server_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    folders = open_folders(tmp_path)
    code = (
        "import sys, time; from pathlib import Path; from gateway.host.folders import *\n"
        "with only_server(open_folders(Path(sys.argv[1]))): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(FolderError, match=f"process {other.pid}"), only_server(folders):
        pass
    other.kill()
    other.wait()
    other.stdout.close()
    with only_server(folders):
        pass


def test_a_taken_port_is_one_clear_line() -> None:
    with bind("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(PortError, match=r"cannot listen.*BULKHEAD_PORT"):
            bind("127.0.0.1", first.getsockname()[1])
