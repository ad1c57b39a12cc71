"""The hall: HTTP, command line, settings, clock, wiring, and every translation between rooms."""

__version__ = "0.1.0"
