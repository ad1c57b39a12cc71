"""A config.json is read by transformers' classes in a process of its own, without torch, and plain values come back.

Where torch is there, transformers brings torch's compilers into whatever process reads one config with it: 156 MiB that
the worker would keep for as long as it serves, and that the engine's own decoder never uses. Without torch the classes
are the same and it takes a second.
"""

import json
import subprocess
import sys
from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any

TIMEOUT_S = 120.0
HEAVY = "transformers.modeling_utils"  # where this is loaded, there is nothing left to save
PROGRAM = "import sys; sys.modules['torch'] = None; from engine.models.config_process import main; main()"


class Values(SimpleNamespace):
    """What a config object said: its attributes by name; ``declared`` are the fields of its class."""

    declared: frozenset[str]

    def standardize_rope_params(self) -> None:
        """transformers' functions of angles ask for it; it was done when the class read the config."""


def read_apart(model_type: str, config: Mapping[str, Any], names: Collection[str]) -> Values | None:
    """``names`` of transformers' config object of this config. None: read it here; transformers is loaded already, or
    the other process could not."""
    if HEAVY in sys.modules:
        return None
    asked = json.dumps({"model_type": model_type, "config": dict(config), "names": sorted(names)})
    try:
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-c", PROGRAM],
            input=asked.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=TIMEOUT_S,
            check=True,
        )
        found = json.loads(done.stdout)
        return Values(**found["values"], declared=frozenset(found["declared"]))
    except (OSError, ValueError, KeyError, TypeError, subprocess.SubprocessError):
        return None


def told(config: Any, names: Collection[str]) -> str:
    """A config object as JSON for `read_apart`."""
    values = {name: getattr(config, name) for name in names if hasattr(config, name)}
    return json.dumps({"values": values, "declared": sorted(type(config).__dataclass_fields__)})


def main() -> None:
    from transformers import CONFIG_MAPPING

    asked = json.loads(sys.stdin.buffer.read())
    config: Any = CONFIG_MAPPING[asked["model_type"]](**asked["config"])
    sys.stdout.write(told(config, asked["names"]))
