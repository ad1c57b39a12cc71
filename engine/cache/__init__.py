"""The paged KV cache: blocks with owners, shares per domain, and prefixes kept for reuse."""
