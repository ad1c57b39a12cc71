"""The journal after any tear, damage or restart."""

import os
import tempfile
import zlib
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from engine.journal import Journal, JournalRecord, decode_records, encode_record, prune, read_journals
from engine.protocol import Effort

RECORDS = st.builds(
    JournalRecord,
    sequence_id=st.text(max_size=8),
    num_prompt_tokens=st.integers(0, 10**6),
    num_completion_tokens=st.integers(0, 10**6),
    finish_reason=st.sampled_from([None, "stop", "length", "abort", "error"]),
    num_cached_tokens=st.integers(0, 10**6),
    effort=st.none() | st.builds(Effort, *[st.integers(0, 2**63)] * 5),
)


@given(st.lists(RECORDS, max_size=8), st.integers(0, 400))
@example([JournalRecord("s", 1, 2, None)], 1)
def test_a_torn_tail_loses_the_last_record_only(records: list[JournalRecord], num_bytes_lost: int) -> None:
    encoded = [encode_record(record) for record in records]
    data = b"".join(encoded)
    data = data[: max(0, len(data) - num_bytes_lost)]
    num_whole = 0
    while num_whole < len(encoded) and len(b"".join(encoded[: num_whole + 1])) <= len(data):
        num_whole += 1
    assert decode_records(data) == records[:num_whole]


@given(st.lists(RECORDS, min_size=1, max_size=6), st.data())
def test_a_damaged_byte_never_gives_a_record_that_was_not_written(
    records: list[JournalRecord], data: st.DataObject
) -> None:
    encoded = bytearray(b"".join(encode_record(record) for record in records))
    encoded[data.draw(st.integers(0, len(encoded) - 1))] ^= data.draw(st.integers(1, 255))
    read = decode_records(bytes(encoded))
    assert read == records[: len(read)]


@given(st.lists(st.lists(RECORDS, max_size=5), min_size=1, max_size=3))
def test_the_last_record_of_a_sequence_wins_over_all_epochs(epochs: list[list[JournalRecord]]) -> None:
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name) / "journal"
        assert read_journals(folder) == {}
        expected = {}
        for index, records in enumerate(epochs):
            journal = Journal(folder, f"{index:04d}")
            journal.append(records)
            journal.close()
            os.utime(journal.path, ns=(index, index))
            expected.update({record.sequence_id: record for record in records})
        assert read_journals(folder) == expected


def test_a_line_of_an_earlier_version_says_nothing_of_a_cache() -> None:
    body = b'["s",5,2,null]'
    assert decode_records(b"%08x %b\n" % (zlib.crc32(body), body)) == [JournalRecord("s", 5, 2, None, 0)]
    body = b'["s.1",5,2,"stop",3]'
    assert decode_records(b"%08x %b\n" % (zlib.crc32(body), body)) == [JournalRecord("s.1", 5, 2, "stop", 3, None)]


def test_prune_keeps_what_it_is_told(tmp_path: Path) -> None:
    for epoch in ("a", "b", "c"):
        Journal(tmp_path, epoch).close()
    assert [path.name for path in prune(tmp_path, {"b"})] == ["a.journal", "c.journal"]
    assert [path.name for path in tmp_path.iterdir()] == ["b.journal"]
