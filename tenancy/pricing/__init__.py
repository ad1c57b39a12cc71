"""What it costs: the price book, tiers and volume."""
