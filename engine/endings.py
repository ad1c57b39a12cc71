"""Outputs that end a sequence without content: it was never taken in, or what it said may not leave."""

from collections.abc import Collection
from collections.abc import Sequence as Line
from itertools import chain

from msgspec.structs import replace

from engine.protocol import Effort, Submit, TokenOutput
from engine.scheduling.tiers import TIERS


def is_valid(submit: Submit, vocab_size: int, *, forms: bool) -> bool:
    """Whether it could be taken in at all: tokens that exist, a tier that exists, and no form where none is served."""
    token_ids = chain(submit.prompt_token_ids, submit.sampling.named_token_ids)
    return (
        bool(submit.prompt_token_ids)
        and all(0 <= token_id < vocab_size for token_id in token_ids)
        and (forms or not submit.sampling.grammar)
        and submit.priority in TIERS.values()
    )


def refusal(submit: Submit, error: str) -> TokenOutput:
    """The only output of a sequence that was never taken in: nothing computed, nothing to charge."""
    return TokenOutput(submit.sequence_id, "", (), 0, 0, 0, "error", error, nonce=submit.nonce, effort=Effort())


def aborted(submit: Submit) -> TokenOutput:
    """The only output of a sequence that was aborted before it came to the core."""
    return TokenOutput(submit.sequence_id, "", (), 0, 0, 0, "abort", nonce=submit.nonce, effort=Effort())


def withheld(output: TokenOutput) -> TokenOutput:
    """The same sequence's ending, without content."""
    return replace(
        output,
        text="",
        token_ids=(),
        logprobs=(),
        prompt_logprobs=(),
        finish_reason="error",
        error="isolation_violation",
    )


def with_endings(outputs: Line[TokenOutput], named: Collection[str], endings: Line[TokenOutput]) -> list[TokenOutput]:
    """A step's outputs when some may not leave: ``endings`` stand for whom they end, and the first output of anybody
    else who is named becomes its ending."""
    result = list(endings)
    ended = {output.sequence_id for output in endings}
    for output in outputs:
        if output.sequence_id not in ended:
            if output.sequence_id in named:
                ended.add(output.sequence_id)
                output = withheld(output)
            result.append(output)
    return result
