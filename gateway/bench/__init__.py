"""Benchmarks of the gateway: whole processes on servers of their own, around an engine that follows a script."""
