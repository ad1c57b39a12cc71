"""engine/bench with the isolation auditor watching, as in the worker: what the audit costs, and what it finds.

``python -m gateway.audited_bench LEVEL ...``: how much of the sampled checks it does.
"""

import sys
from functools import partial

from engine.bench.__main__ import main
from gateway.audit_observer import observer_of
from gateway.own_runs import OwnRunSettings
from gateway.settings import Settings

ALL = 2**31  # slots or blocks: more than there are

DEFAULTS = Settings()
LEVELS = {
    "books": partial(observer_of, slots_per_step=0, blocks_per_step=0),
    "default": partial(
        observer_of,
        slots_per_step=DEFAULTS.audit_slots_per_step,
        blocks_per_step=DEFAULTS.audit_blocks_per_step,
        own=OwnRunSettings(replay_percent=DEFAULTS.audit_replay_percent),
    ),
    "full": partial(observer_of, slots_per_step=ALL, blocks_per_step=ALL, own=OwnRunSettings(replay_percent=100)),
}

if __name__ == "__main__":
    main(LEVELS[sys.argv.pop(1)])
