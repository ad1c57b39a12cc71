"""Whether each row that samples would do so as its own sequence: from its own last token's logits, with its own
parameters, seed, position, mask and history.

A sequence's facts are told when it begins; a row's facts are taken from what lies in it just before the launch. Both
are digests or plain numbers made outside of the engine. What a row has counted for penalties is compared exactly, with
the tokens that this ledger knows: its counts at the sequence's own tokens, and their sums over the whole vocabulary.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from audit.runtime.sequence_ledger import AuditedSequence
from audit.runtime.step_arrays import StepArrays

Finding = tuple[int, str, str]  # row, rule, detail


class SamplingFacts(NamedTuple):
    """What decides how a sequence samples."""

    parameters: bytes = b""  # digest of all parameters, the seed among them
    form: bytes = b""  # digest of the grammar that makes the mask, b"" without one
    bias: bytes = b""  # the biased tokens and their biases
    kind: tuple[bool, ...] = (False, False, False, True)  # has a form, a bias, penalties; its logits stay as they are
    may_cut: bool = False  # a stop text may cut its answer off before its last token's text


class SampledRow(NamedTuple):
    """One row that samples, with what lies in its stable row. Not yet to be trusted."""

    row: int  # in the batch
    token_index: int  # in the batch: whose logits it samples from
    position: int  # that keys its random number
    stable_row: int
    sequence_id: str
    facts: SamplingFacts
    num_prompt_tokens: int
    token_ids: Sequence[int]
    form_token_ids: Sequence[int] = ()  # what its mask has read
    seen: Any = None  # bool [V]
    counts: Any = None  # integers [V]
    num_counted: int = 0  # tokens in both


class ScoredRow(NamedTuple):
    """A row of which some places are looked at for the prompt's own next tokens."""

    row: int
    token_indices: Sequence[int]  # in the batch
    next_token_ids: Sequence[int]


def scoring_problems(
    sequences: dict[str, AuditedSequence], step: StepArrays, cu: Sequence[int], kv: Sequence[int]
) -> list[Finding]:
    """Every row whose prompt would be scored from another's logits, against other tokens, twice or with gaps."""
    found: list[Finding] = []
    for one in step.scored:
        if not 0 <= one.row < len(step.sequence_ids):
            return [(row, "foreign_scores", f"row {one.row} is scored") for row in range(len(step.sequence_ids))]
        sequence = sequences.get(step.sequence_ids[one.row])
        if sequence is None:
            continue
        begin, end = cu[one.row], cu[one.row + 1]
        first = begin + sequence.num_scored - (kv[one.row] - (end - begin))
        places = list(range(first, first + len(one.token_indices)))
        then = sequence.num_scored + 1
        if (
            list(one.token_indices) != places
            or (places and not begin <= first <= places[-1] < end)
            or list(one.next_token_ids) != sequence.tokens[then : then + len(places)]
            or then + len(places) > max(sequence.num_prompt, then)
        ):
            found.append((one.row, "foreign_scores", "its prompt is scored at other places or against other tokens"))
    return found


def sampling_problems(
    sequences: dict[str, AuditedSequence], step: StepArrays, cu: Sequence[int], kv: Sequence[int]
) -> list[Finding]:
    """Every row that would sample as another, twice, too early or not at all. The step's shapes must be sound."""
    found: list[Finding] = []
    num_rows = len(step.sequence_ids)
    sampled = step.sampled or ()
    for one in sampled:
        if not 0 <= one.row < num_rows:
            return [(row, "malformed_sampling", f"row {one.row} samples of {num_rows}") for row in range(num_rows)]
        sequence = sequences.get(step.sequence_ids[one.row])
        if sequence is not None:  # an unknown one is reported by whatever it reads
            found += ((one.row, *problem) for problem in _row_problems(one, sequence, cu[one.row + 1], kv[one.row]))
    rows = Counter([one.row for one in sampled])
    if len({one.stable_row for one in sampled}) != len(sampled):
        stable = Counter([one.stable_row for one in sampled])
        found += (
            (one.row, "shared_row", "two rows have one sampling state") for one in sampled if stable[one.stable_row] > 1
        )
    for row, name in enumerate(step.sequence_ids):
        if rows[row] > 1:
            found.append((row, "double_sampling", "the row samples twice in this step"))
        sequence = sequences.get(name)
        if sequence is None:
            continue
        num_known = len(sequence.tokens)
        if kv[row] > num_known:
            found.append((row, "unsampled_tokens", "computes tokens that were neither in its prompt nor sampled"))
        elif (kv[row] == num_known) != (rows[row] > 0):
            found.append((row, "sampling_out_of_turn", "samples before its last token, or does not sample at it"))
    return found


def _row_problems(one: SampledRow, sequence: AuditedSequence, end: int, kv_len: int) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    own, facts, expected = sequence.tokens, one.facts, sequence.facts
    if one.token_index != end - 1:
        found.append(("foreign_logits", "samples from the logits of another token"))
    if one.sequence_id != sequence.sequence_id:
        found.append(("foreign_sampling_state", f"would sample with the state of {one.sequence_id!r}"))
    if one.position != kv_len:
        found.append(("wrong_position", "draws the random number of another position"))
    if facts.parameters != expected.parameters:
        found.append(("foreign_parameters", "would sample with parameters that are not its sequence's"))
    if facts.kind != expected.kind or facts.bias != expected.bias:
        found.append(("foreign_adjustments", "its biases, penalties or form are not its sequence's"))
    if facts.form != expected.form or list(one.form_token_ids) != _answer(sequence, len(one.form_token_ids)):
        found.append(("foreign_mask", "its mask is of another form, or has read another answer"))
    plain = expected.kind[-1]
    if (
        one.num_prompt_tokens != sequence.num_prompt
        or len(one.token_ids) != len(own)
        or (plain and one.token_ids[-1] != own[-1])
        or (not plain and list(one.token_ids) != own)
    ):
        found.append(("foreign_history", "the row holds other tokens than its sequence"))
    if not _counts_are_own(one, sequence):
        found.append(("foreign_counts", "its penalties have counted other tokens than its sequence's"))
    return found


def _answer(sequence: AuditedSequence, num_tokens: int) -> list[int]:
    return sequence.tokens[sequence.num_prompt : sequence.num_prompt + num_tokens]


def _counts_are_own(one: SampledRow, sequence: AuditedSequence) -> bool:
    if one.seen is None or one.counts is None:
        return one.seen is None and one.counts is None
    seen, counts = np.asarray(one.seen), np.asarray(one.counts)
    if not sequence.num_prompt <= one.num_counted <= len(sequence.tokens):
        return False
    own = np.unique(sequence.tokens[: one.num_counted])
    answer, times = np.unique(
        np.array(sequence.tokens[sequence.num_prompt : one.num_counted], np.int64), return_counts=True
    )
    if len(own) and not (own[0] >= 0 and own[-1] < len(counts) == len(seen)):
        return False
    return bool(
        seen[own].all()
        and np.count_nonzero(seen) == len(own)
        and (counts[answer] == times).all()
        and np.count_nonzero(counts) == len(answer)
    )
