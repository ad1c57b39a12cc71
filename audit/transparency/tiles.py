"""The log's folder: C2SP tlog-tiles files, written so that a reader or a crash never sees half a file.

    checkpoint                    the signed head, replaced last
    tile/<L>/<N>[.p/<W>]          256 hashes (W of them when partial); level 0 hashes leaves, level L full tiles below
    tile/entries/<N>[.p/<W>]      the leaves, each with a big-endian uint16 length before it
    openings/<N>.jsonl            private: nonce and body of every leaf that is not erased, one JSON object a line
    keys.json                     public keys as vkey text, {"log": [...], "report": [...]}

<N> is written in groups of three digits, all but the last with an x: 1234067 is x001/x234/067.
Only `checkpoint`, `keys.json` and `tile/` may be made public; `openings/` holds what the commitments hide (mode 0700).
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from audit.transparency.merkle import HASH_BYTES, Frontier, leaf_hash, root_of

TILE_WIDTH = 256
LEAF_BYTES_MAX = 65_535


@dataclass(frozen=True, slots=True)
class PublishedLeaf:
    leaf: bytes
    nonce: bytes | None  # None: erased
    body: bytes | None


def index_path(n: int) -> str:
    """Tile index as a path: groups of three digits."""
    groups = [f"{n % 1000:03d}"]
    while n := n // 1000:
        groups.append(f"x{n % 1000:03d}")
    return "/".join(reversed(groups))


def tile_path(folder: Path, level: int | str, n: int, width: int) -> Path:
    """Where the tile is; `level` is a number or "entries", `width` is 1 to 256."""
    path = folder / "tile" / str(level) / index_path(n)
    return path if width == TILE_WIDTH else path.with_name(path.name + ".p") / str(width)


def openings_path(folder: Path, n: int) -> Path:
    return folder / "openings" / f"{index_path(n)}.jsonl"


def write_file(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Replace `path` by `content` in one rename, after the bytes are on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_bundle(folder: Path, n: int, leaves: list[PublishedLeaf]) -> None:
    """Write bundle `n`: entries, level 0 tile and openings of its 1 to 256 leaves."""
    for leaf in leaves:
        if len(leaf.leaf) > LEAF_BYTES_MAX:
            raise ValueError(f"a leaf in bundle {n} has {len(leaf.leaf)} bytes; at most {LEAF_BYTES_MAX} fit")
    width = len(leaves)
    write_openings(folder, n, leaves)
    entries = b"".join(len(x.leaf).to_bytes(2, "big") + x.leaf for x in leaves)
    write_file(tile_path(folder, "entries", n, width), entries)
    write_file(tile_path(folder, 0, n, width), b"".join(leaf_hash(x.leaf) for x in leaves))


def write_openings(folder: Path, n: int, leaves: list[PublishedLeaf]) -> None:
    """Write the openings of bundle `n`; erased ones are left out. Both parts are canonical JSON, so the line is."""
    (folder / "openings").mkdir(mode=0o700, parents=True, exist_ok=True)
    lines = [
        b'{"body":%b,"index":%d,"nonce":"%b"}\n' % (x.body, n * TILE_WIDTH + i, x.nonce.hex().encode())
        for i, x in enumerate(leaves)
        if x.nonce is not None and x.body is not None
    ]
    write_file(openings_path(folder, n), b"".join(lines), mode=0o600)


def write_upper_tiles(folder: Path, old_size: int, new_size: int) -> None:
    """Write every tile above level 0 that differs between the two sizes. Level 0 must be complete."""
    for level in _upper_levels(new_size):
        old_count, new_count = old_size >> (8 * level), new_size >> (8 * level)
        if old_count == new_count:
            continue
        for n in range(old_count // TILE_WIDTH, (new_count - 1) // TILE_WIDTH + 1):
            begin, end = n * TILE_WIDTH, min(new_count, (n + 1) * TILE_WIDTH)
            known = _read_hashes(folder, level, n, old_count - begin) if begin < old_count < begin + TILE_WIDTH else []
            hashes = known + [root_of(read_full_tile(folder, level - 1, i)) for i in range(begin + len(known), end)]
            write_file(tile_path(folder, level, n, end - begin), b"".join(hashes))


def root_from_tiles(folder: Path, size: int) -> bytes:
    """The root that the files give: the perfect subtrees of `size` stand in the rightmost tile of each level."""
    row: list[bytes] = []
    for level in (*reversed(list(_upper_levels(size))), 0):
        count = size >> (8 * level)
        if width := count % TILE_WIDTH:
            part = Frontier(0, [])
            for hashed in _read_hashes(folder, level, count // TILE_WIDTH, width):
                part.append(hashed)
            row += part.hashes
    return Frontier(size, row).root()


def remove_old_partials(folder: Path, sizes_kept: Iterable[int], old_size: int) -> None:
    """Remove partial tiles beside the right edge of `old_size` that no size in `sizes_kept` needs.

    Where the full tile exists by now, all of its partial ones go: it begins with the same bytes.
    """
    keep = {path for size in sizes_kept for path in _partials(folder, size)}
    for path in _partials(folder, old_size):
        full = path.parent.with_name(path.parent.name.removesuffix(".p"))
        for stale in path.parent.glob("[0-9]*"):
            if stale not in keep or full.exists():
                stale.unlink(missing_ok=True)
        if path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()


def read_full_tile(folder: Path, level: int, n: int) -> list[bytes]:
    return _read_hashes(folder, level, n, TILE_WIDTH)


def _read_hashes(folder: Path, level: int, n: int, width: int) -> list[bytes]:
    path = tile_path(folder, level, n, width)
    content = path.read_bytes()
    if len(content) != width * HASH_BYTES:
        raise ValueError(f"{path} has {len(content)} bytes instead of {width * HASH_BYTES}: publish with rebuild")
    return [content[i : i + HASH_BYTES] for i in range(0, len(content), HASH_BYTES)]


def _upper_levels(size: int) -> Iterator[int]:
    level = 1
    while size >> (8 * level):
        yield level
        level += 1


def _partials(folder: Path, size: int) -> list[Path]:
    """The partial tile files that a tree of `size` leaves needs."""
    paths = []
    for level in (0, *_upper_levels(size)):
        count = size >> (8 * level)
        if width := count % TILE_WIDTH:
            paths.append(tile_path(folder, level, count // TILE_WIDTH, width))
            if level == 0:
                paths.append(tile_path(folder, "entries", count // TILE_WIDTH, width))
    return paths
