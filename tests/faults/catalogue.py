"""The planted faults: what each is called, and how bad it would be."""

from dataclasses import dataclass

from tests.faults.array_plants import (
    Plant,
    boundary,
    in_batch,
    last_slot,
    read_of,
    shifted,
    state_shared,
    state_swap,
    swapped_columns,
    swapped_rows,
)
from tests.faults.engine_plants import (
    answers_crossed,
    audit_sees_another,
    changed,
    drop,
    freed_alive,
    generation_kept,
    in_output,
    in_picks,
    in_row,
    late_write,
    lose_form,
    lost_block,
    name_kept,
    no_scrub,
    other_stream,
    same,
    skipped_resume,
    stale_row,
    swap_logprobs,
    swap_tokens,
    take,
    take_counts,
    take_form,
    writing,
    wrong_hit,
)


@dataclass(frozen=True)
class Fault:
    fault_id: str
    name: str
    severity: str  # disclosure, corruption or accounting
    plant: Plant


FAULTS = [
    Fault("B01", "a table reads a block of another domain", "disclosure", read_of(True)),
    Fault("B02", "a table reads a block of the same domain's other sequence", "disclosure", read_of(False)),
    Fault("B03", "two blocks of a table in the wrong order", "corruption", in_batch(swapped_columns)),
    Fault("B04", "tables of two rows change places", "disclosure", swapped_rows("block_tables")),
    Fault("B05", "kv_len one too long", "disclosure", shifted("kv_lens", 1)),
    Fault("B06", "kv_len one too short", "corruption", shifted("kv_lens", -1)),
    Fault("B07", "slot -1 as an index", "corruption", in_batch(last_slot)),
    Fault("B08", "two tokens' slots change places", "disclosure", swapped_rows("slot_mapping")),
    Fault("B09", "a row's boundary one too far", "disclosure", in_batch(boundary)),
    Fault("B10", "two tokens change places", "disclosure", swapped_rows("token_ids")),
    Fault("S01", "logits of a neighbour", "disclosure", swapped_rows("sampled_tokens")),
    Fault("S02", "random number of another position", "corruption", shifted("sampled_positions", 1)),
    Fault("S03", "sampling states of two rows change places", "disclosure", in_batch(state_swap)),
    Fault("S04", "two rows share one sampling state", "disclosure", in_batch(state_shared)),
    Fault("S05", "a row keeps the state of who had it before", "disclosure", stale_row),
    Fault("S06", "a neighbour's parameters and seed", "disclosure", in_row(take("sampling"))),
    Fault("S07", "a neighbour's mask", "disclosure", in_row(take_form)),
    Fault("S08", "the mask is missing", "corruption", in_row(lose_form)),
    Fault("S09", "a neighbour's penalty counts", "disclosure", in_row(take_counts)),
    Fault("S10", "a neighbour's biases", "disclosure", in_row(take("bias_ids", "bias_values", "has_bias", "plain"))),
    Fault("P01", "no scrub before another domain", "disclosure", no_scrub(False)),
    Fault("P02", "a scrub that is told and not done", "disclosure", no_scrub(True)),
    Fault("P03", "a block freed while it is read", "disclosure", freed_alive),
    Fault("P04", "a reference leaks at the end", "accounting", lost_block(False)),
    Fault("P05", "a block never reaches the free list", "accounting", lost_block(True)),
    Fault("P06", "the generation is not bumped", "corruption", generation_kept),
    Fault("P07", "an allocation is not told", "corruption", drop("allocate")),
    Fault("P08", "a release is not told", "corruption", drop("free")),
    Fault("C01", "a prefix hit across domains", "disclosure", wrong_hit(same("domain"))),
    Fault("C02", "a prefix hit across salts", "disclosure", wrong_hit(same("salt"))),
    Fault("C03", "a hash collision is accepted", "disclosure", wrong_hit(same("other"))),
    Fault("C04", "a hit on a block that is being written", "corruption", wrong_hit(writing)),
    Fault("C05", "a block keeps its name when it is taken", "disclosure", name_kept),
    Fault("Q01", "a sequence resumes beyond what was computed", "disclosure", skipped_resume),
    Fault("O01", "rows change places after sampling", "disclosure", in_picks(swap_tokens)),
    Fault("O02", "an output goes to another stream", "disclosure", in_output(other_stream)),
    Fault("O03", "a token is sent twice", "accounting", changed(token_ids=lambda ids: (*ids, *ids))),
    Fault("O04", "a token is lost", "accounting", changed(token_ids=lambda ids: ())),
    Fault("O05", "an answer's token is counted twice", "accounting", changed(num_completion_tokens=lambda n: n + 1)),
    Fault("O06", "a prompt's token is not counted", "accounting", changed(num_prompt_tokens=lambda n: n - 1)),
    Fault("O07", "cached tokens are made up", "accounting", changed(num_cached_tokens=lambda n: n + 1)),
    Fault("O08", "texts of two answers change places", "disclosure", answers_crossed),
    Fault("O09", "log probabilities of two rows change places", "disclosure", in_picks(swap_logprobs)),
    Fault("K01", "something else writes into a block", "corruption", late_write),
    Fault("K02", "the kernels get another table than the auditor", "disclosure", audit_sees_another),
]
