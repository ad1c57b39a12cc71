"""What the isolation auditor counts."""

TOTALS = (
    "num_steps",
    "num_rows",
    "num_rows_sampled",
    "num_outputs",
    "num_texts_checked",
    "num_logprobs_checked",
    "num_launches_compared",
    "num_logits_witnessed",
    "num_slots_checked",
    "num_blocks_checked",
    "num_slots_noted",
    "num_slots_read",
    "num_zero_blocks_read",
    "num_blocks_digested",
    "num_digests_compared",
    "num_events",
    "num_violations",
    "num_self_tests",
    "num_self_tests_failed",
)


def fresh_counters() -> dict[str, int]:
    """All at zero; beside the totals: whether the last self test passed, and the last step, -1 before the first."""
    return dict.fromkeys(TOTALS, 0) | {"last_self_test_ok": 0, "last_step": -1}
