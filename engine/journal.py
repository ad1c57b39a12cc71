"""What each sequence has emitted, kept where a `kill -9` of either process cannot take it: billing's last witness.

One append-only file per worker epoch, one line per sequence and step that emitted something:

    <crc32 in 8 hex digits> <json array [sequence_id, num_prompt_tokens, num_completion_tokens, finish_reason,
                             num_cached_tokens, [what it took of the engine: protocol.Effort]]>\n

A step's lines are handed to the operating system in one write *before* the step's frames are sent, so what a client
saw is in the journal. The page cache outlives the process; a power cut may lose the last moments (no fsync per step),
and then no client was served either. Counts are cumulative: the last good line of a sequence is the truth. A torn or
damaged line ends the file.
"""

import os
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec

from engine.protocol import Effort, TokenOutput

SUFFIX = ".journal"


class JournalRecord(msgspec.Struct, frozen=True, array_like=True):
    sequence_id: str
    num_prompt_tokens: int
    num_completion_tokens: int
    finish_reason: str | None
    num_cached_tokens: int = 0  # part of num_prompt_tokens; a journal of an earlier version does not say
    effort: Effort | None = None  # None: not measured, or of an earlier version


def record_of(output: TokenOutput) -> JournalRecord:
    return JournalRecord(
        output.sequence_id,
        output.num_prompt_tokens,
        output.num_completion_tokens,
        output.finish_reason,
        output.num_cached_tokens,
        output.effort,
    )


class Journal:
    """The writer: one per worker process."""

    def __init__(self, folder: Path, epoch: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{epoch}{SUFFIX}"
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def append(self, records: Sequence[JournalRecord]) -> None:
        """Hand one step's records to the operating system. Raises OSError (disk full): then nothing may be sent."""
        if not records:
            return
        data = memoryview(b"".join(encode_record(record) for record in records))
        while data:
            data = data[os.write(self._fd, data) :]

    def close(self) -> None:
        os.close(self._fd)


def encode_record(record: JournalRecord) -> bytes:
    body = _encoder.encode(record)
    return b"%08x %b\n" % (zlib.crc32(body), body)


def decode_records(data: bytes) -> list[JournalRecord]:
    """The records of one file, up to the first torn or damaged line."""
    records = []
    for line in data.split(b"\n")[:-1]:  # a line without its newline was torn
        checksum, _, body = line.partition(b" ")
        if checksum != b"%08x" % zlib.crc32(body):
            break
        records.append(_decoder.decode(body))
    return records


def read_journals(folder: Path) -> dict[str, JournalRecord]:
    """The last record of every sequence over all epochs in ``folder``; an empty result where there is no folder."""
    last: dict[str, JournalRecord] = {}
    for path in sorted(folder.glob(f"*{SUFFIX}"), key=lambda path: (path.stat().st_mtime_ns, path.name)):
        for record in decode_records(path.read_bytes()):
            last[record.sequence_id] = record
    return last


def prune(folder: Path, keep: Collection[str]) -> list[Path]:
    """Delete the files of all epochs not in ``keep`` (settled long ago); returns what was deleted."""
    deleted = []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        if path.name.removesuffix(SUFFIX) not in keep:
            path.unlink(missing_ok=True)
            deleted.append(path)
    return deleted


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(JournalRecord)
