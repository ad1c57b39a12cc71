"""What was approved before a launch, and what the launch gave against it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from audit.runtime.block_ledger import BlockLedger
from audit.runtime.head_witness import HeadWitness
from audit.runtime.launch import KernelArrays, Launch, array_problems
from audit.runtime.sampling_rows import SampledRow, ScoredRow
from audit.runtime.step_arrays import StepArrays

Problem = tuple[str, str]  # rule, detail


@dataclass(frozen=True, slots=True)
class Approved:
    """``arrays``: a copy. A step that was broken off has nothing to give: no row samples and no prompt is scored."""

    arrays: KernelArrays
    rows: Sequence[str]  # the sequence of each row
    samples: Sequence[str]  # the sequence of each token that the launch is to give
    scored: Sequence[ScoredRow]

    @classmethod
    def of(cls, step: StepArrays, sampled: Sequence[SampledRow]) -> "Approved":
        wanted = [one.token_index for one in sampled]
        wanted += [place for one in step.scored for place in one.token_indices]
        arrays = KernelArrays(
            step.token_ids,
            () if step.positions is None else step.positions,
            np.array(wanted, np.int64),
            np.array([one.position for one in sampled], np.int64),
            np.array([one.stable_row for one in sampled], np.int64),
            step.cu_seqlens,
            step.kv_lens,
            step.block_tables,
            step.slot_mapping,
        ).copy()
        names = list(step.sequence_ids)
        return cls(arrays, names, [names[one.row] for one in sampled], tuple(step.scored))


def launch_problems(
    approved: Approved,
    ledger: BlockLedger,
    launch: Launch,
    token_ids: Sequence[int],
    witness: HeadWitness | None,
) -> dict[str, Problem]:
    """By sequence, what a launch gave that it should not have; its log probabilities are noted in the ledger."""
    found = dict[str, Problem]()
    if launch.arrays is not None:
        for row, name in array_problems(approved.arrays, launch.arrays):
            for sequence_id in [approved.rows[row]] if row >= 0 else approved.rows:
                found[sequence_id] = "unapproved_launch", f"the kernels had other {name} than were approved"
        for sequence_id in _owners_of(approved, ledger, launch.arrays.slot_mapping):
            found[sequence_id] = "unapproved_launch", "a launch wrote into its blocks that was not approved"
    if witness is not None:
        for sequence_id in _unlike_their_head(approved, launch, token_ids, witness):
            found[sequence_id] = "foreign_logits", "its token's logit is not what the head makes of its hidden state"
    return found | _note_logprobs(approved, ledger, launch, token_ids) | _note_scores(approved, ledger, launch)


def _unlike_their_head(
    approved: Approved, launch: Launch, token_ids: Sequence[int], witness: HeadWitness
) -> Sequence[str]:
    """Whose logits the head did not make. Everybody's, where that is not shown."""
    names, tokens, is_told = list(approved.samples), list(token_ids), [token_id >= 0 for token_id in token_ids]
    for one in approved.scored:
        names += [approved.rows[one.row]] * len(one.next_token_ids)
        tokens += one.next_token_ids
        is_told += [launch.scores.get(one.row) is not None] * len(one.next_token_ids)
    if launch.head is None or len(launch.head.logits) != len(names):
        return names
    disagrees = witness.disagrees(launch.head.hidden, np.array(tokens, np.int64), launch.head.logits)
    return [names[place] for place in np.flatnonzero(disagrees & np.array(is_told, np.bool_)).tolist()]


def _note_logprobs(
    approved: Approved, ledger: BlockLedger, launch: Launch, token_ids: Sequence[int]
) -> dict[str, Problem]:
    found, samples = dict[str, Problem](), approved.samples
    for place, told in launch.logprobs.items():
        if not 0 <= place < len(samples) or told.token_id != token_ids[place]:
            everyone = samples if not 0 <= place < len(samples) else [samples[place]]
            found |= dict.fromkeys(everyone, ("foreign_logprobs", "log probabilities of a token it did not sample"))
        elif samples[place] in ledger.sequences:
            ledger.sequences[samples[place]].pending_logprobs.append(told)
    return found


def _note_scores(approved: Approved, ledger: BlockLedger, launch: Launch) -> dict[str, Problem]:
    found, rows = dict[str, Problem](), approved.rows
    num_scored = {one.row: len(one.token_indices) for one in approved.scored}
    for row, scores in launch.scores.items():
        sequence = ledger.sequences.get(rows[row]) if 0 <= row < len(rows) else None
        if scores is None or sequence is None:
            continue
        first = sequence.num_scored + 1
        own = sequence.tokens[first : first + len(scores)]
        if len(scores) != num_scored.get(row, 0) or [one.token_id for one in scores] != own:
            found[sequence.sequence_id] = "foreign_scores", "log probabilities of other tokens than its prompt's"
        sequence.num_scored += len(scores)
        sequence.pending_scores += scores
    return found


def _owners_of(approved: Approved, ledger: BlockLedger, slot_mapping: Any) -> set[str]:
    """Who holds the blocks of slots that were written and not approved."""
    if np.array_equal(slot_mapping, approved.arrays.slot_mapping):
        return set()
    blocks = np.setdiff1d(slot_mapping, approved.arrays.slot_mapping) // ledger.block_size
    real = blocks[(blocks >= 0) & (blocks < len(ledger.state))]
    return {name for block_id in real.tolist() for name in ledger.owner(block_id)[0]}
