"""What can go wrong in the engine, as types. The caller's fault and our fault never share one."""

from typing import Any


class EngineError(Exception):
    """Base of every error that the engine raises on purpose."""


class ConfigError(EngineError):
    """A setting or a model file does not fit; the message says what to change. The worker prints it and exits with
    2."""


class ProtocolError(EngineError):
    """The other side of the socket sent bytes that are no frame of ours; the connection is closed."""


class EngineConnectError(EngineError):
    """No worker answered on the socket within the time given, or it speaks another protocol version."""


class EngineGoneError(EngineError):
    """The worker's connection ended in the middle of a generation.

    The counts are those of the last frame received: the journal may know more, never less.
    """

    def __init__(self, num_prompt_tokens: int, num_completion_tokens: int) -> None:
        super().__init__(f"the engine worker went away after {num_completion_tokens} completion tokens")
        self.num_prompt_tokens = num_prompt_tokens
        self.num_completion_tokens = num_completion_tokens


class BrokenOffError(EngineError):
    """A step was broken off between two layers, as it was asked to be: its slots may be written, nothing else is done.

    ``share``: of its layers, those that were computed. ``arrays``: what the kernels held.
    """

    def __init__(self, share: float, arrays: Any = None) -> None:
        super().__init__(f"broken off after {share:.0%} of its layers")
        self.share = share
        self.arrays = arrays


class OutOfBlocksError(EngineError):
    """The pool has too few free blocks; nothing was allocated. The scheduler preempts or waits."""


class GrammarError(EngineError):
    """The wanted form of an answer does not compile, or is too large."""


class TokenizerError(EngineError):
    """Text or messages cannot be encoded: the chat template refused them, or the folder has no tokenizer."""
