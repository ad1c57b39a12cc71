"""A config.json is read by transformers' classes in a process of its own, and a dozen numbers come back.

transformers brings torch's compilers into whatever process reads one config with it: 156 MiB that the worker would keep
for as long as it serves, and that the engine's own decoder never uses. The process starts first, and the rest of
loading goes on beside it.

    python -m engine.models.config_process MODEL_DIR
"""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from engine.models.llama_config import ModelConfig
from engine.text.tokenizer import read_json

TIMEOUT_S = 120.0
HEAVY = "transformers.modeling_utils"  # where this is loaded, there is nothing left to save


class Reading:
    """``process`` None reads here."""

    def __init__(self, process: "subprocess.Popen[bytes] | None") -> None:
        self._process = process

    @classmethod
    def begin(cls, model_dir: Path) -> "Reading":
        if HEAVY in sys.modules:
            return cls(None)
        try:
            command = [sys.executable, "-m", "engine.models.config_process", str(model_dir)]
            return cls(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL))  # noqa: S603
        except OSError:
            return cls(None)

    def result(self, config: Mapping[str, Any]) -> ModelConfig:
        """As ModelConfig.from_json, with the same errors: what the other process could not read is read here."""
        if self._process is not None:
            with self._process as process:
                try:
                    answer, _ = process.communicate(timeout=TIMEOUT_S)
                    if process.returncode == 0:
                        return msgspec.json.decode(answer, type=ModelConfig)
                except (subprocess.TimeoutExpired, msgspec.MsgspecError):
                    process.kill()
        return ModelConfig.from_json(config)


def main() -> int:
    config = ModelConfig.from_json(read_json(Path(sys.argv[1]) / "config.json"))
    sys.stdout.buffer.write(msgspec.json.encode(config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
