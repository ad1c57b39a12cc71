"""Publishing: the newest checkpoint and everything that it covers, from the database to plain files.

Safe to run again at any point, and run at every start: the folder's own checkpoint says how far it got, everything
after that is written again with equal bytes, and the checkpoint is replaced last. Partial tiles of the checkpoint
before are kept for readers who hold it; older ones are removed. One process publishes into a folder.

Before a checkpoint is replaced two things are checked: the files give exactly the signed root, and the folder's old
checkpoint is one that this database knows. A restored backup would otherwise sign a second history.
"""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from audit.transparency import tiles
from audit.transparency.checkpoint import Checkpoint, NoteError, parse_checkpoint, parse_note
from audit.transparency.keyring import Keyring
from audit.transparency.tables import checkpoint, log_leaf, log_opening
from audit.transparency.tiles import TILE_WIDTH, PublishedLeaf

BUNDLES_PER_READ = 16  # 4,096 leaves in memory at a time


class LogForkError(Exception):
    """The folder and the database tell different histories; nothing was written. The message says what to compare."""


async def publish(conn: AsyncConnection, folder: Path, *, signer: Keyring, rebuild: bool = False) -> int:
    """Write the newest checkpoint and its files into `folder`; returns its number of leaves, 0 when there is none.

    Reads only. `rebuild` writes every file again. Raises LogForkError, and OSError when the folder cannot be written.
    """
    await asyncio.to_thread(_write_keys, folder, signer)
    head = (await conn.execute(select(checkpoint).order_by(checkpoint.c.num_leaves.desc()).limit(1))).one_or_none()
    published = await asyncio.to_thread(_read_published, folder)
    await _refuse_fork(conn, folder, published)
    if head is None:
        return 0
    old_size = published.size if published and not rebuild else 0
    if old_size == head.num_leaves:
        return old_size
    for first in range(old_size // TILE_WIDTH, (head.num_leaves - 1) // TILE_WIDTH + 1, BUNDLES_PER_READ):
        begin, end = first * TILE_WIDTH, min((first + BUNDLES_PER_READ) * TILE_WIDTH, head.num_leaves)
        leaves = await _read_leaves(conn, begin, end)
        await asyncio.to_thread(_write_bundles, folder, first, leaves)
    for n in await _bundles_with_erasures(conn, old_size, head.num_leaves):
        leaves = await _read_leaves(conn, n * TILE_WIDTH, min((n + 1) * TILE_WIDTH, head.num_leaves))
        await asyncio.to_thread(tiles.write_openings, folder, n, leaves)
    await asyncio.to_thread(_finish, folder, old_size, head.num_leaves, head.root, head.note)
    return int(head.num_leaves)


def _write_keys(folder: Path, signer: Keyring) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(signer.public(), indent=1, sort_keys=True).encode() + b"\n"
    path = folder / "keys.json"
    if not path.exists() or path.read_bytes() != content:
        tiles.write_file(path, content)


def _read_published(folder: Path) -> Checkpoint | None:
    try:
        return parse_checkpoint(parse_note((folder / "checkpoint").read_text("utf-8")).body)
    except FileNotFoundError:
        return None
    except (NoteError, UnicodeDecodeError) as error:
        raise LogForkError(f"{folder / 'checkpoint'} is damaged ({error}): move it away to publish anew") from error


async def _refuse_fork(conn: AsyncConnection, folder: Path, published: Checkpoint | None) -> None:
    if published is None:
        return
    query = select(checkpoint.c.root).where(checkpoint.c.num_leaves == published.size)
    root = (await conn.execute(query)).scalar_one_or_none()
    if root != published.root:
        known = "does not know that head" if root is None else "has another root for that size"
        raise LogForkError(
            f"{folder / 'checkpoint'} was signed for {published.size} leaves, but the database {known}. "
            "Was the database restored from a backup? Keep both and compare before going on."
        )


async def _read_leaves(conn: AsyncConnection, begin: int, end: int) -> list[PublishedLeaf]:
    query = (
        select(log_leaf.c.leaf_index, log_leaf.c.leaf, log_opening.c.nonce, log_opening.c.body)
        .select_from(log_leaf.outerjoin(log_opening, log_leaf.c.leaf_index == log_opening.c.leaf_index))
        .where(log_leaf.c.leaf_index >= begin, log_leaf.c.leaf_index < end)
        .order_by(log_leaf.c.leaf_index)
    )
    rows: Sequence[Any] = (await conn.execute(query)).all()
    if [row.leaf_index for row in rows] != list(range(begin, end)):
        raise LogForkError(f"the database misses leaves between {begin} and {end}; nothing was published")
    return [PublishedLeaf(row.leaf, row.nonce, row.body) for row in rows]


async def _bundles_with_erasures(conn: AsyncConnection, begin: int, end: int) -> list[int]:
    """Older bundles whose openings are erased by the leaves [begin, end): the newer ones are written anyhow."""
    query = (
        select(log_opening.c.body)
        .join(log_leaf, log_leaf.c.leaf_index == log_opening.c.leaf_index)
        .where(log_leaf.c.kind == "opening.erased", log_leaf.c.leaf_index >= begin, log_leaf.c.leaf_index < end)
    )
    bodies = (await conn.execute(query)).scalars().all()
    indexes = {int(text) for body in bodies for text in json.loads(body)["leaf_indexes"]}
    return sorted({i // TILE_WIDTH for i in indexes if i // TILE_WIDTH < begin // TILE_WIDTH})


def _write_bundles(folder: Path, first: int, leaves: list[PublishedLeaf]) -> None:
    for i in range(0, len(leaves), TILE_WIDTH):
        tiles.write_bundle(folder, first + i // TILE_WIDTH, leaves[i : i + TILE_WIDTH])


def _finish(folder: Path, old_size: int, new_size: int, root: bytes, note: str) -> None:
    tiles.write_upper_tiles(folder, old_size, new_size)
    if tiles.root_from_tiles(folder, new_size) != root:
        raise LogForkError(f"the files in {folder} do not give the signed root of {new_size} leaves: use rebuild")
    tiles.write_file(folder / "checkpoint", note.encode())
    tiles.remove_old_partials(folder, (old_size, new_size), old_size)
    tiles.remove_old_partials(folder, (old_size, new_size), new_size)
