"""What a sequence may send: the tokens that its own rows sampled, each once and in order, and counts that follow from
what was computed.

The tokens are heard from the launch itself, before the engine does anything with them, and belong to whichever sequence
the checked step had in that row. So a token that takes a wrong turn afterwards, or is lost or sent twice, shows before
it leaves.
"""

from collections.abc import Sequence
from typing import NamedTuple

from audit.sequence_ledger import AuditedSequence

Finding = tuple[str, str, str]  # sequence, rule, detail


class Output(NamedTuple):
    """One sequence's part of a step's output; token ids are new ones, counts are totals."""

    sequence_id: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int
    failed: bool


def output_problems(
    sequences: dict[str, AuditedSequence], outputs: Sequence[Output], sampled: Sequence[str]
) -> list[Finding]:
    """Check a step's outputs and note what was released. ``sampled``: the sequences that have a token to send."""
    found: list[Finding] = []
    for output in outputs:
        sequence = sequences.get(output.sequence_id)
        if sequence is None and output.failed and not output.token_ids:
            continue  # it broke a rule before the launch and has ended
        if sequence is None:
            found.append((output.sequence_id, "output_of_stranger", "an output of a sequence that is not here"))
            continue
        num_new = len(output.token_ids)
        if list(output.token_ids) != sequence.pending[:num_new]:
            found.append((output.sequence_id, "foreign_output", "sends tokens that its own row did not sample"))
        del sequence.pending[:num_new]
        sequence.num_released += num_new
        cached = 0 if sequence.first_start < 0 else sequence.first_start
        computed = min(sequence.num_computed, sequence.num_prompt)
        counts = (output.num_completion_tokens, output.num_prompt_tokens, output.num_cached_tokens)
        if not output.failed and counts != (sequence.num_released, computed, cached):
            truth = f"{(sequence.num_released, computed, cached)}"
            found.append((output.sequence_id, "wrong_count", f"counts {counts} instead of {truth}"))
    for name in dict.fromkeys(sampled):
        sequence = sequences.get(name)
        if sequence is not None and sequence.pending:
            found.append((name, "token_lost", "a token was sampled and is not sent"))
            sequence.pending.clear()
    return found
