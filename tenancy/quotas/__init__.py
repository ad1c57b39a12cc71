"""How much at once: limits, their counters in Valkey, and what holds when it is gone."""
