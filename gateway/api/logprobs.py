"""Log probabilities in OpenAI's two shapes.

A token is shown as its bytes and as their text; bytes that are no whole character are U+FFFD in the text.
"""

from collections.abc import Callable, Sequence
from typing import Any

from msgspec.structs import replace

from engine.protocol import TokenLogprob

TokenBytes = Callable[[int], bytes]
Json = dict[str, Any]


def chat_logprobs(logprobs: Sequence[TokenLogprob], token_bytes: TokenBytes) -> Json:
    """The `logprobs` of a chat choice."""

    def entry(token_id: int, logprob: float) -> Json:
        raw = token_bytes(token_id)
        return {"token": _text(raw), "logprob": logprob, "bytes": list(raw)}

    content = [
        entry(one.token_id, one.logprob) | {"top_logprobs": [entry(token_id, value) for token_id, value in one.top]}
        for one in logprobs
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(logprobs: Sequence[TokenLogprob], token_bytes: TokenBytes, offset: int) -> Json:
    """The `logprobs` of a completion. ``offset``: characters of the choice's text before the answer.

    Where two tokens have one text, the likelier is told. The token itself is always among the likeliest.
    """

    def top(one: TokenLogprob) -> dict[str, float]:
        found: dict[str, float] = {}
        for token_id, logprob in (*one.top, (one.token_id, one.logprob)):
            found.setdefault(_text(token_bytes(token_id)), logprob)
        return found

    return {
        "tokens": [_text(token_bytes(one.token_id)) for one in logprobs],
        "token_logprobs": [one.logprob for one in logprobs],
        "top_logprobs": [top(one) for one in logprobs],
        "text_offset": [offset + one.offset for one in logprobs],
    }


def echoed_logprobs(
    token_ids: Sequence[int],
    prompt: Sequence[TokenLogprob],
    num_top: int,
    token_bytes: TokenBytes,
    offsets: Sequence[int],
) -> Json:
    """The `logprobs` of an echoed prompt. ``prompt``: of its tokens from the second on; the first has none. They may
    hold more of the likeliest tokens than the ``num_top`` that are told here."""
    told = completion_logprobs([replace(one, top=one.top[:num_top]) for one in prompt], token_bytes, 0)
    return {
        "tokens": [_text(token_bytes(token_id)) for token_id in token_ids],
        "token_logprobs": [None, *told["token_logprobs"]],
        "top_logprobs": [None, *told["top_logprobs"]],
        "text_offset": list(offsets),
    }


def prompt_logprobs(prompt: Sequence[TokenLogprob], num_top: int, token_bytes: TokenBytes) -> list[Json | None]:
    """vLLM's `prompt_logprobs`: nothing for the first token; for each other the likeliest and itself, by token id."""

    def entry(token_id: int, logprob: float, rank: int) -> Json:
        return {"logprob": logprob, "rank": rank, "decoded_token": _text(token_bytes(token_id))}

    told: list[Json | None] = [None]
    for one in prompt:
        top = {str(other): entry(other, value, 1 + place) for place, (other, value) in enumerate(one.top[:num_top])}
        told.append({str(one.token_id): entry(one.token_id, one.logprob, one.rank)} | top)
    return told


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")
