"""The planted faults: what each is called, which known fault it is an example of, and how bad it would be.

`known` are the numbers of tests/faults/known_faults.py.
"""

from dataclasses import dataclass

from tests.faults import array_plants as arrays
from tests.faults import ending_plants as ending
from tests.faults import engine_plants as engine
from tests.faults import launch_plants as launch
from tests.faults.array_plants import Plant, in_batch, shifted, swapped_rows
from tests.faults.engine_plants import changed, drop, in_output, in_row
from tests.faults.launch_plants import after_approval, between_steps, in_picks


@dataclass(frozen=True)
class Fault:
    fault_id: str
    name: str
    severity: str  # disclosure, corruption, accounting, or evidence: the auditor is told something else than happens
    known: str
    plant: Plant


FAULTS = [
    Fault("B01", "a table reads a block of another domain", "disclosure", "F11", arrays.read_of(True)),
    Fault(
        "B02", "a table reads a block of the same domain's other sequence", "disclosure", "F11", arrays.read_of(False)
    ),
    Fault("B03", "two blocks of a table in the wrong order", "corruption", "F11", in_batch(arrays.swapped_columns)),
    Fault("B04", "tables of two rows change places", "disclosure", "F50", swapped_rows("block_tables")),
    Fault("B05", "kv_len one too long", "disclosure", "F37", shifted("kv_lens", 1)),
    Fault("B06", "kv_len one too short", "corruption", "F36", shifted("kv_lens", -1)),
    Fault("B07", "slot -1 as an index", "corruption", "F10", in_batch(arrays.last_slot)),
    Fault("B08", "two tokens' slots change places", "disclosure", "F50", swapped_rows("slot_mapping")),
    Fault("B09", "a row's boundary one too far", "disclosure", "F36", in_batch(arrays.boundary)),
    Fault("B10", "two tokens change places", "disclosure", "F50", swapped_rows("token_ids")),
    Fault("B11", "all rows as one", "disclosure", "F35", in_batch(arrays.merged)),
    Fault("B12", "lengths of two rows change places", "disclosure", "F50", swapped_rows("kv_lens")),
    Fault("B13", "a table reads a block that nobody owns", "disclosure", "F61", arrays.beyond("block_tables", -1)),
    Fault(
        "B14",
        "a table reads the first block of the cache, whoever has it",
        "disclosure",
        "F40",
        arrays.beyond("block_tables", 0),
    ),
    Fault("B15", "tokens are computed at the next position", "corruption", "F38", shifted("positions", 1)),
    Fault("B16", "a placeholder is computed as a token", "corruption", "F16", in_batch(arrays.placeholders)),
    Fault(
        "B17",
        "at a border, a token goes into the block before",
        "corruption",
        "F11",
        in_batch(arrays.slot_of_the_block_before),
    ),
    Fault("B18", "a write into a block that others read", "corruption", "F14", in_batch(arrays.write_into_shared)),
    Fault("B19", "a token is written one slot too far", "corruption", "F15", shifted("slot_mapping", 1)),
    Fault("S01", "logits of a neighbour", "disclosure", "F50", swapped_rows("sampled_tokens")),
    Fault("S02", "random number of another position", "corruption", "F54", shifted("sampled_positions", 1)),
    Fault("S03", "sampling states of two rows change places", "disclosure", "F50", in_batch(arrays.state_swap)),
    Fault("S04", "two rows share one sampling state", "disclosure", "F50", in_batch(arrays.state_shared)),
    Fault("S05", "a row keeps the state of who had it before", "disclosure", "F56", engine.stale_row),
    Fault("S06", "a neighbour's parameters and seed", "disclosure", "F54", in_row(engine.take("sampling"))),
    Fault("S07", "a neighbour's mask", "disclosure", "F51", in_row(engine.take_form)),
    Fault("S08", "the mask is missing", "corruption", "F52", in_row(engine.lose_form)),
    Fault("S09", "a neighbour's penalty counts", "disclosure", "F53", in_row(engine.take_counts)),
    Fault(
        "S10",
        "a neighbour's biases",
        "disclosure",
        "F53",
        in_row(engine.take("bias_ids", "bias_values", "has_bias", "plain")),
    ),
    Fault(
        "S11",
        "a prompt scored from the logits of the next place",
        "corruption",
        "F69",
        in_batch(arrays.scored_elsewhere),
    ),
    Fault(
        "S12", "a prompt scored against another's tokens", "disclosure", "F69", in_batch(arrays.scored_against_another)
    ),
    Fault(
        "S13",
        "a mask that has read another token",
        "corruption",
        "F51",
        between_steps(engine.of_a_row(engine.matcher_fed)),
    ),
    Fault(
        "S14", "penalties look at another sequence's tokens", "disclosure", "F53", between_steps(engine.history_taken)
    ),
    Fault(
        "S15",
        "penalty counts of tokens that it does not have",
        "corruption",
        "F53",
        between_steps(engine.of_a_row(engine.counts_bent)),
    ),
    Fault(
        "S16", "two sequences change rows, their states stay", "disclosure", "F50", between_steps(engine.rows_exchanged)
    ),
    Fault("P01", "no scrub before another domain", "disclosure", "F08", engine.no_scrub(False)),
    Fault("P02", "a scrub that is told and not done", "disclosure", "F08", engine.no_scrub(True)),
    Fault("P03", "a block freed while it is read", "disclosure", "F02", engine.freed_alive),
    Fault("P04", "a reference leaks at the end", "accounting", "F07", engine.reference_lost),
    Fault("P05", "a block never reaches the free list", "accounting", "F07", between_steps(engine.block_forgotten)),
    Fault("P06", "the generation is not bumped", "corruption", "F21", engine.generation_kept),
    Fault("P07", "an allocation is not told", "evidence", "F87", drop("allocate")),
    Fault("P08", "a release is not told", "evidence", "F87", drop("free")),
    Fault("P09", "a block is given to two sequences", "disclosure", "F01", engine.given_twice),
    Fault("P10", "a release is told twice", "evidence", "F05", engine.in_events(engine.told_twice)),
    Fault("P11", "the count of a shared block's readers is clamped", "disclosure", "F06", engine.count_clamped),
    Fault("P12", "a block that was found is not kept", "disclosure", "F03", engine.not_pinned),
    Fault("P13", "the zeros come when the new owner has written", "corruption", "F62", launch.late_scrub),
    Fault("P14", "memory that was never used is not zero", "disclosure", "F09", launch.dirty_at_start),
    Fault("P15", "a scrub takes a live block", "corruption", "F62", launch.live_block_zeroed),
    Fault("C01", "a prefix hit across domains", "disclosure", "F23", engine.wrong_hit(engine.same("domain"))),
    Fault("C02", "a prefix hit across salts", "disclosure", "F26", engine.wrong_hit(engine.same("salt"))),
    Fault("C03", "a hash collision is accepted", "disclosure", "F27", engine.wrong_hit(engine.same("other"))),
    Fault("C04", "a hit on a block that is being written", "corruption", "F04", engine.wrong_hit(engine.writing)),
    Fault("C05", "a block keeps its name when it is taken", "disclosure", "F03", engine.name_kept),
    Fault("C06", "a block can be found before it is written", "corruption", "F04", engine.published_early),
    Fault("C07", "a block is published under another's tokens", "disclosure", "F31", engine.published_as_another),
    Fault("Q01", "a sequence resumes beyond what was computed", "disclosure", "F16", engine.skipped_resume),
    Fault("Q02", "a sequence goes back over a sealed block", "corruption", "F16", between_steps(engine.computed_twice)),
    Fault("O01", "rows change places after sampling", "disclosure", "F50", in_picks(launch.swap_tokens)),
    Fault("O02", "an output goes to another stream", "disclosure", "F67", in_output(engine.other_stream)),
    Fault("O03", "a token is sent twice", "accounting", "F67", changed(token_ids=lambda ids: (*ids, *ids))),
    Fault("O04", "a token is lost", "accounting", "F67", changed(token_ids=lambda ids: ())),
    Fault(
        "O05", "an answer's token is counted twice", "accounting", "F76", changed(num_completion_tokens=lambda n: n + 1)
    ),
    Fault("O06", "a prompt's token is not counted", "accounting", "F76", changed(num_prompt_tokens=lambda n: n - 1)),
    Fault("O07", "cached tokens are made up", "accounting", "F76", changed(num_cached_tokens=lambda n: n + 1)),
    Fault("O08", "texts of two answers change places", "disclosure", "F65", between_steps(launch.answers_crossed)),
    Fault("O09", "log probabilities of two rows change places", "disclosure", "F69", in_picks(launch.swap_logprobs)),
    Fault("O10", "a text of other tokens", "disclosure", "F65", changed(text=lambda text: text and "\u0107")),
    Fault("O11", "the prompt is said again", "disclosure", "F65", in_output(launch.prompt_said)),
    Fault("O12", "a text is lost", "corruption", "F65", changed(text=lambda text: "")),
    Fault("O13", "a text is said twice", "corruption", "F65", changed(text=lambda text: text + text)),
    Fault("O14", "prompts' log probabilities change places", "disclosure", "F69", in_picks(launch.swap_scores)),
    Fault("O15", "log probabilities of an answer are wrong", "corruption", "F69", changed(logprobs=engine.lower)),
    Fault("A01", "an abort's ending says another's text", "disclosure", "F65", ending.in_ending(ending.others_text)),
    Fault("A02", "an abort's ending has another's token", "disclosure", "F67", ending.in_ending(ending.others_tokens)),
    Fault(
        "A03",
        "an abort's ending has log probabilities that nobody gave it",
        "disclosure",
        "F69",
        ending.in_ending(ending.others_logprobs),
    ),
    Fault("A04", "an abort's ending counts a token less", "accounting", "F76", ending.in_ending(ending.one_less)),
    Fault("A05", "an abort's ending goes to another", "disclosure", "F67", ending.in_ending(engine.other_stream)),
    Fault("K01", "something else writes into a block", "corruption", "F20", between_steps(launch.stray_write)),
    Fault(
        "K02", "the kernels get another table than the auditor", "disclosure", "F86", after_approval(launch.other_table)
    ),
    Fault("K03", "the kernels write into another's block", "corruption", "F12", after_approval(launch.other_slot)),
    Fault("K04", "the kernels get another length", "disclosure", "F12", after_approval(launch.bent("kv_lens", 1))),
    Fault("K05", "the kernels get other tokens", "corruption", "F12", after_approval(launch.bent("token_ids", 1))),
    Fault("K06", "the kernels get other positions", "corruption", "F12", after_approval(launch.bent("positions", 1))),
    Fault(
        "K07",
        "logits of a neighbour, after the auditor looked",
        "disclosure",
        "F12",
        after_approval(launch.crossed("sampled_tokens")),
    ),
    Fault(
        "K08",
        "sampling states change places after the auditor looked",
        "disclosure",
        "F12",
        after_approval(launch.crossed("sampled_rows")),
    ),
    Fault(
        "K09",
        "something writes into blocks that wait to be shared",
        "corruption",
        "F20",
        between_steps(launch.stray_write_into_cached),
    ),
    Fault("K10", "two rows' logits change places inside the launch", "disclosure", "F44", launch.logits_crossed),
    Fault(
        "K11",
        "log probabilities change places inside the launch",
        "disclosure",
        "F69",
        launch.after_drawing(launch.logprobs_crossed),
    ),
    Fault("K12", "two rows' hidden states change places before the head", "disclosure", "F44", launch.hidden_crossed),
    Fault(
        "K13",
        "two rows' drawn tokens change places inside the launch",
        "disclosure",
        "F44",
        launch.after_drawing(launch.tokens_crossed),
    ),
    Fault(
        "K14",
        "a row takes the token that is likeliest in another's logits",
        "disclosure",
        "F44",
        launch.after_drawing(launch.best_of_a_neighbour),
    ),
    Fault("E01", "a sequence's begin is not told", "evidence", "F87", engine.unheard("begin")),
    Fault("E02", "a sequence's end is not told", "evidence", "F87", engine.unheard("end")),
    Fault("E03", "a seal is not told", "evidence", "F87", drop("seal")),
    Fault("E04", "a share is not told", "evidence", "F87", drop("share")),
    Fault("E05", "an eviction is not told", "evidence", "F87", drop("evict")),
    Fault("E06", "a publication is not told", "evidence", "F87", drop("publish")),
    Fault("E07", "a scrub is not told", "evidence", "F87", drop("scrub")),
    Fault("E08", "an allocation is told in another's name", "evidence", "F86", engine.in_events(engine.to_another)),
]
