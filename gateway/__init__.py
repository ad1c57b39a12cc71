"""The hall: HTTP, command line, settings, clock, wiring, and every translation between rooms."""
