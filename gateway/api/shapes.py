"""What both completion routes have in common on the way out: usage, fingerprint, and the shape that an answer takes."""

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

from engine.protocol import Ready, TokenLogprob
from gateway.api.logprobs import TokenBytes, prompt_logprobs
from gateway.api.translation import Work
from tenancy.usage.meter import Usage

Json = dict[str, Any]
Logprobs = tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a request's answers, whole."""

    text: str
    logprobs: Logprobs
    finish_reason: str


class Shape(Protocol):
    """OpenAI's objects for one route. Streams: `opening`, then `delta` as often as there is output, for each answer a
    `closing`. Text may be held back until its meaning is known: then a delta is empty, and a closing longer. ``index``
    says which answer. ``prompt``: log probabilities of its tokens from the second on, if asked."""

    def opening(self, prompt: Logprobs) -> list[Json]: ...
    def delta(self, index: int, text: str, logprobs: Logprobs) -> list[Json]: ...
    def closing(self, index: int, finish_reason: str) -> list[Json]: ...
    def usage_chunk(self, usage: Usage) -> Json: ...
    def whole(self, choices: list[Choice], prompt: Logprobs, usage: Usage) -> Json: ...


@dataclass(frozen=True, slots=True)
class Frame:
    """The fields around every object of one answer, and what the client asked to see."""

    id: str
    created: int  # seconds since the epoch, UTC
    fingerprint: str
    work: Work
    token_bytes: TokenBytes

    @property
    def tells_logprobs(self) -> bool:
        return self.work.sampling.logprobs >= 0

    def vllm_prompt_logprobs(self, prompt: Logprobs) -> Json:
        """The field `prompt_logprobs` if it was asked for."""
        num_top = self.work.prompt_logprobs
        return {"prompt_logprobs": prompt_logprobs(prompt, num_top, self.token_bytes)} if num_top >= 0 else {}

    def chunk(self, kind: str, choices: list[Json]) -> Json:
        """A chunk of a stream; with include_usage every chunk but the last says `usage: null`, as OpenAI's do."""
        chunk = self.whole(kind, choices)
        if self.work.include_usage:
            chunk["usage"] = None
        return chunk

    def whole(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.work.model,
            "system_fingerprint": self.fingerprint,
            "service_tier": self.work.tier,
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
