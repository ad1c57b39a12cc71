"""Publishing: tile layout of the specification, equal files step by step and at once, and a stop at any file."""

import asyncio
from pathlib import Path

import pytest

from audit import verify
from audit.transparency import tiles
from audit.transparency.keyring import Keyring
from audit.transparency.log import LogForkError, request_erasure
from tests.audit.world import START_NS, note, open_world


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def verified(folder: Path, keyring: Keyring) -> verify.Log:
    log = verify.verify_log(str(folder), keyring.log.vkeys())
    assert log.findings.failed == []
    return log


@pytest.mark.parametrize(
    ("n", "path"), [(0, "000"), (5, "005"), (999, "999"), (1000, "x001/000"), (1234067, "x001/x234/067")]
)
def test_tile_paths_are_those_of_the_specification(n: int, path: str) -> None:
    assert tiles.index_path(n) == path == verify._index_path(n)


def test_tiles_of_a_large_tree_are_those_of_the_specification(tmp_path: Path) -> None:
    """The specification's example: 70,000 leaves give 273 + 1 tiles at level 0, 1 + 1 at level 1 and 1 at level 2."""
    leaf = tiles.PublishedLeaf(b"same", None, None)
    for n in range(274):
        tiles.write_bundle(tmp_path, n, [leaf] * min(256, 70_000 - n * 256))
    tiles.write_upper_tiles(tmp_path, 0, 70_000)
    names = {name for name in files(tmp_path) if name.startswith("tile/") and "entries" not in name}
    assert len([name for name in names if name.startswith("tile/0/")]) == 274
    assert {"tile/0/273.p/112", "tile/1/000", "tile/1/001.p/17", "tile/2/000.p/1"} <= names
    assert len(names) == 277
    assert tiles.root_from_tiles(tmp_path, 70_000) == verify._root([verify.hashlib.sha256(b"\0same").digest()] * 70_000)


def test_publishing_step_by_step_gives_the_same_files_as_at_once(
    sqlite_url: str, keyring: Keyring, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with open_world(sqlite_url, keyring, tmp_path / "steps") as world:
            total = 0
            for size in (1, 2, 252, 1, 1, 255, 300, 1):
                erased = request_erasure([0], reason="r", tenant_id="", now_ns=START_NS) if size == 300 else []
                await world.append(*(note(f"{total}.{i}") for i in range(size)), *erased)
                await world.sequence()
                total += size + len(erased)
                assert await world.publish() == total
                assert await world.publish() == total  # again: nothing to do
                verified(world.folder, keyring)
            steps = files(world.folder)
            world.folder = tmp_path / "once"
            await world.publish()
            once = files(world.folder)
            assert {name: steps[name] for name in once} == once
            # Beside those, only what the checkpoint before needed.
            assert all(".p/" in name for name in steps.keys() - once.keys())
            assert len(steps) - len(once) <= 4
            (world.folder / "tile" / "0" / "000").write_bytes(b"damaged")
            await world.publish(rebuild=True)
            assert files(world.folder) == once

    asyncio.run(scenario())


def test_a_stop_at_any_file_leaves_a_log_that_verifies(
    sqlite_url: str, keyring: Keyring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    async def scenario() -> None:
        async with open_world(sqlite_url, keyring, tmp_path / "log") as world:
            await world.land(*(note(f"a{i}") for i in range(255)))
            await world.append(
                *(note(f"b{i}") for i in range(5)),
                *request_erasure([1], reason="r", tenant_id="", now_ns=START_NS),
            )
            await world.sequence()
            write, left = tiles.write_file, 0

            def stopping(path: Path, content: bytes, *, mode: int = 0o644) -> None:
                nonlocal left
                if left == 0:
                    raise Stopped
                left -= 1
                write(path, content, mode=mode)

            monkeypatch.setattr(tiles, "write_file", stopping)
            for stops in range(100):
                left = stops
                try:
                    size = await world.publish()
                except Stopped:
                    head = verify.verify_log(str(world.folder), keyring.log.vkeys())
                    # The receipt of the erasure is not published yet, so one opening may be gone before it.
                    assert [n for n, _ in head.findings.failed] in ([], [6])
                    assert head.head is not None
                    assert head.head.size == 255
                    continue
                assert size == 261
                break
            assert stops > 5
            assert verified(world.folder, keyring).receipts == {1: 260}

    asyncio.run(scenario())


def test_a_damaged_folder_is_not_signed_over(sqlite_url: str, keyring: Keyring, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_world(sqlite_url, keyring, tmp_path / "log") as world:
            await world.land(*(note(f"a{i}") for i in range(256)))
            before = (world.folder / "checkpoint").read_bytes()
            tile = world.folder / "tile" / "1" / "000.p" / "1"
            tile.write_bytes(b"\0" * 32)
            with pytest.raises(LogForkError, match="do not give the signed root"):
                await world.land(note("next"))
            assert (world.folder / "checkpoint").read_bytes() == before
            assert await world.publish(rebuild=True) == 257
            verified(world.folder, keyring)
            (world.folder / "checkpoint").write_text("garbage")
            with pytest.raises(LogForkError, match="damaged"):
                await world.publish()

    asyncio.run(scenario())


def test_openings_are_private_and_an_empty_log_publishes_its_keys(
    sqlite_url: str, keyring: Keyring, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with open_world(sqlite_url, keyring, tmp_path / "log") as world:
            assert await world.publish() == 0
            assert set(files(world.folder)) == {"keys.json"}
            await world.land(note("x"))
            assert (world.folder / "openings").stat().st_mode & 0o077 == 0
            assert (world.folder / "openings" / "000.jsonl").stat().st_mode & 0o077 == 0

    asyncio.run(scenario())
