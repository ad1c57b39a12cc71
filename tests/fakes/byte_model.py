"""A model folder without weights, as the benchmarks use it."""

from engine.bench.byte_model import END, TEMPLATE, write_byte_model

__all__ = ["END", "TEMPLATE", "write_byte_model"]
