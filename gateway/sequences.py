"""The sequences of one request: how the engine knows them, and what they come to together.

A request for n answers is n sequences. The first has the request's own id, the others `<request id>.<k>`; request ids
hold no dot. Whoever reads the engine's counts, while it runs or from its journal, adds them up here.
"""

from collections.abc import Iterable, Mapping

from engine.journal import JournalRecord
from engine.protocol import Effort as Measured
from tenancy.usage.meter import Effort, Usage

BIGINT_MAX = 2**63 - 1  # what the usage row can hold


def sequence_id(request_id: str, index: int) -> str:
    return f"{request_id}.{index}" if index else request_id


def request_id_of(sequence_id: str) -> str:
    return sequence_id.partition(".")[0]


def together(usages: Iterable[Usage]) -> Usage:
    """Answers are added up. The prompt is one, and counts as it was when it was first read: what the others found of it
    in the cache is what the first had put there."""
    parts = list(usages)
    num_prompt_tokens = max((part.num_prompt_tokens for part in parts), default=0)
    readers = [part for part in parts if part.num_prompt_tokens == num_prompt_tokens]
    return Usage(
        num_prompt_tokens=num_prompt_tokens,
        num_cached_tokens=min((part.num_cached_tokens for part in readers), default=0),
        num_completion_tokens=sum(part.num_completion_tokens for part in parts),
    )


def usage_by_request(records: Mapping[str, JournalRecord]) -> dict[str, Usage]:
    """What the journals say of each request, over all of its sequences."""
    parts: dict[str, list[Usage]] = {}
    for name, record in records.items():
        usage = Usage(record.num_prompt_tokens, record.num_cached_tokens, record.num_completion_tokens)
        parts.setdefault(request_id_of(name), []).append(usage)
    return {request_id: together(usages) for request_id, usages in parts.items()}


def effort_of(parts: Iterable[Measured | None]) -> Effort | None:
    """What the sequences of one request took together; None where one of them was not measured."""
    names, sums = Effort.__slots__, [0] * len(Effort.__slots__)
    for part in parts:
        if part is None:
            return None
        sums = [num + getattr(part, name) for name, num in zip(names, sums, strict=True)]
    return Effort(*(max(0, min(num, BIGINT_MAX)) for num in sums))


def effort_by_request(records: Mapping[str, JournalRecord]) -> dict[str, Effort | None]:
    """What the journals say that each request took, over all of its sequences."""
    parts: dict[str, list[Measured | None]] = {}
    for name, record in records.items():
        parts.setdefault(request_id_of(name), []).append(record.effort)
    return {request_id: effort_of(efforts) for request_id, efforts in parts.items()}
