"""What a sequence may send: the tokens that its own rows sampled, each once and in order, the text that they spell, the
log probabilities that its launches gave, and counts that follow from what was computed.

Tokens and log probabilities are heard from the launch itself, before the engine does anything with them, and belong to
whichever sequence the checked step had in that row. So what takes a wrong turn afterwards, or is lost or sent twice,
shows before it leaves.
"""

from collections.abc import Sequence
from typing import NamedTuple

from audit.runtime.launch import Logprob
from audit.runtime.released_text import say
from audit.runtime.sequence_ledger import AuditedSequence

Finding = tuple[str, str, str]  # sequence, rule, detail


class Output(NamedTuple):
    """One sequence's part of a step's output; tokens, text and log probabilities are new ones, counts are totals."""

    sequence_id: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int
    failed: bool
    text: str = ""
    logprobs: Sequence[Logprob] = ()
    prompt_logprobs: Sequence[Logprob] = ()
    finish_reason: str = ""


def output_problems(
    sequences: dict[str, AuditedSequence], outputs: Sequence[Output], sampled: Sequence[str], *, knows_text: bool
) -> list[Finding]:
    """Check a step's outputs and note what was released. ``sampled``: the sequences that have a token to send;
    ``knows_text``: what tokens spell is known."""
    found: list[Finding] = []
    for output in outputs:
        sequence = sequences.get(output.sequence_id)
        if sequence is None and output.failed and not (output.token_ids or output.text or output.logprobs):
            continue  # it broke a rule before the launch and has ended
        if sequence is None:
            found.append((output.sequence_id, "output_of_stranger", "an output of a sequence that is not here"))
            continue
        num_new = len(output.token_ids)
        if list(output.token_ids) != sequence.pending[:num_new]:
            found.append((output.sequence_id, "foreign_output", "sends tokens that its own row did not sample"))
        del sequence.pending[:num_new]
        sequence.num_released += num_new
        found += ((output.sequence_id, *problem) for problem in _content_problems(sequence, output, knows_text))
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


def _content_problems(sequence: AuditedSequence, output: Output, knows_text: bool) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    may_cut = sequence.facts is not None and sequence.facts.may_cut
    for sent, told, rule in (
        (output.logprobs, sequence.pending_logprobs, "foreign_logprobs"),
        (output.prompt_logprobs, sequence.pending_scores, "foreign_scores"),
    ):
        if list(sent) != told[: len(sent)]:
            found.append((rule, "sends log probabilities that its own row did not give"))
        del told[: len(sent)]
    if sequence.pending_scores and not output.failed:
        found.append(("foreign_scores", "log probabilities of its prompt are not sent"))
        sequence.pending_scores.clear()
    if knows_text:
        if not say(sequence.unsaid, output.text, first=not sequence.has_spoken):
            found.append(("foreign_text", "sends text that its own tokens do not spell"))
        elif output.finish_reason == "length" and sequence.unsaid and not (output.failed or may_cut):
            found.append(("text_lost", "ended and has not said all that its tokens spell"))
        sequence.has_spoken |= bool(output.text)
    return found
