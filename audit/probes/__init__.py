"""What probes from outside measure, and what may be concluded from it."""
