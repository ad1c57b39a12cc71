"""What a covered stream shows to whoever watches its encrypted bytes: pieces of few sizes, at a steady beat.

TLS hides what a stream says, not how long each piece is nor when it leaves; a piece for each token tells the length of
every word (Weiss et al., "What Was Your Prompt? A Remote Keylogging Attack on AI Assistants", 2024). A covered stream

1. fills every piece up to a multiple of ``pad_bytes`` with a comment of random letters, which SSE clients skip;
2. sends one piece every ``pace_s``, with all that came meanwhile, and one of nothing but padding where nothing came.

What still shows: when the answer begins and how long it takes, and where a piece needs more than one ``pad_bytes``.
"""

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from gateway.settings import Settings

COMMENT_BYTES = len(b":\n\n")  # the shortest


@dataclass(frozen=True, slots=True)
class Cover:
    """``pad_bytes`` greater than 0; ``pace_s`` 0 sends each piece at once."""

    pad_bytes: int
    pace_s: float
    entropy: Callable[[int], bytes]

    @classmethod
    def of(cls, settings: Settings, asked: bool | None, entropy: Callable[[int], bytes]) -> Self | None:
        """What a stream gets: what its client ``asked`` for, else what the server does by itself."""
        wanted = settings.stream_cover if asked is None else asked
        return cls(settings.stream_pad_bytes, settings.stream_pace_ms / 1000, entropy) if wanted else None

    def padded(self, piece: bytes) -> bytes:
        """The piece and a comment behind it; a multiple of ``pad_bytes`` in all, one at least."""
        num_bytes = -len(piece) % self.pad_bytes
        while num_bytes < COMMENT_BYTES:
            num_bytes += self.pad_bytes
        # Random, so that a proxy that compresses makes nothing shorter by more than a quarter.
        num_letters = num_bytes - COMMENT_BYTES
        letters = base64.b64encode(self.entropy(-(-num_letters * 3 // 4) + 3))[:num_letters]
        return piece + b":" + letters + b"\n\n"
