"""What both completion routes have in common on the way out: usage, fingerprint, and the shape that an answer takes."""

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

from engine.protocol import Ready
from tenancy.meter import Usage

Json = dict[str, Any]


class Shape(Protocol):
    """OpenAI's objects for one route. Streams: `opening`, then `delta` as often as there is text, then `closing`."""

    def opening(self) -> list[Json]: ...
    def delta(self, text: str) -> Json: ...
    def closing(self, finish_reason: str) -> Json: ...
    def usage_chunk(self, usage: Usage) -> Json: ...
    def whole(self, text: str, finish_reason: str, usage: Usage) -> Json: ...


@dataclass(frozen=True, slots=True)
class Frame:
    """The fields around every object of one answer."""

    id: str
    created: int  # seconds since the epoch, UTC
    model: str
    fingerprint: str
    include_usage: bool

    def chunk(self, kind: str, choices: list[Json]) -> Json:
        """A chunk of a stream; with include_usage every chunk but the last says `usage: null`, as OpenAI's do."""
        chunk = self.whole(kind, choices)
        if self.include_usage:
            chunk["usage"] = None
        return chunk

    def whole(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }


def usage_json(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_completion_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
    }


def fingerprint(ready: Ready) -> str:
    """Changes when the weights or the arithmetic change, stays over restarts."""
    text = "\0".join((ready.model_id, ready.model_digest, ready.dtype, ready.device, ready.kernels))
    return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:12]
