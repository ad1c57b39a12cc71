"""How sequences end, and what that makes of their request."""

from collections.abc import Collection

from engine.protocol import TokenOutput
from gateway.api.problems import EngineRefusedError

COMPLETE = frozenset({"stop", "length"})
# The engine's error codes as a usage row's finish reason (at most 16 characters).
REASON_OF_ERROR = {
    "isolation_violation": "isolation",
    "closed": "isolation",
    "busy": "busy",
    "draining": "draining",
    "abort": "draining",
}


def checked_reason(output: TokenOutput) -> str | None:
    """The output's finish reason. Raises EngineRefusedError for an ending that is not a complete answer."""
    if output.finish_reason is None or output.finish_reason in COMPLETE:
        return output.finish_reason
    raise EngineRefusedError(output.error or output.finish_reason)


def reason_of_all(reasons: Collection[str | None]) -> str:
    """Of a request whose answers are all complete: `length` if one was cut there."""
    return "length" if "length" in reasons else "stop"
