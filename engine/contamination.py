"""Who may have read what a sequence under suspicion has read or written."""

from collections.abc import Collection, Iterable

from engine.sequence import Sequence


def contaminated(sequences: Iterable[Sequence], named: Collection[str]) -> list[Sequence]:
    """The named sequences, whoever shares a block with one of them, whoever shares one with those, and so on."""
    affected: list[Sequence] = []
    others: list[Sequence] = []
    for sequence in sequences:
        (affected if sequence.sequence_id in named else others).append(sequence)
    bad_blocks = {block_id for sequence in affected for block_id in sequence.block_ids}
    while touched := [sequence for sequence in others if bad_blocks.intersection(sequence.block_ids)]:
        affected += touched
        others = [sequence for sequence in others if sequence not in touched]
        bad_blocks.update(block_id for sequence in touched for block_id in sequence.block_ids)
    return affected
