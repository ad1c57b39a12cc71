"""Writes golden/checkpoint.json: run ``python -m tests.audit.make_golden`` when, and only when, the format changes.

ML-DSA signatures are randomised, so a new run gives other signatures; those that are stored must verify for ever.
"""

import json
import tempfile
from pathlib import Path

from audit.reports.dsse import sign_envelope
from audit.transparency.checkpoint import Checkpoint, sign_checkpoint
from audit.transparency.keyring import load_keyring

PATH = Path(__file__).parent / "golden" / "checkpoint.json"
ORIGIN = "golden.example/log"
CHECKPOINT = Checkpoint(ORIGIN, 1234, bytes(range(32)))
NOW_NS = 1_795_458_000 * 10**9
PAYLOAD = b'{"golden":true}'


def make(folder: Path) -> dict[str, object]:
    keyring = load_keyring(folder, origin=ORIGIN, entropy=lambda n: b"\x2a" * n)
    return {
        "public": keyring.public(),
        "note": sign_checkpoint(CHECKPOINT, keyring.log, now_ns=NOW_NS),
        "envelope": sign_envelope(PAYLOAD, keyring.report).decode(),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        PATH.write_text(json.dumps(make(Path(name) / "keys"), indent=1) + "\n", "utf-8")
