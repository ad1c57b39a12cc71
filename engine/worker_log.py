"""Where the worker's own lines go: standard error, which the gateway keeps."""

import sys


def log(line: str) -> None:
    sys.stderr.write(f"engine worker: {line}\n")
    sys.stderr.flush()
