"""What was used: the meter, sums over time, and what it cost the engine."""
