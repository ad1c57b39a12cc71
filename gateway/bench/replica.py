"""One gateway of a benchmark: `bulkhead serve` whose engine follows a script.

    python -m gateway.bench.replica SCRIPT [STAGES]

SCRIPT holds fields of engine.bench.scripted.ScriptedConfig; settings come from the environment, as for `serve`.
STAGES is a file that keeps where each request's time went.
"""

import io
import sys
from pathlib import Path

import msgspec
from rich.console import Console

from gateway.host.folders import Folders
from gateway.host.serve import run_serve
from gateway.logs import configure_logs
from gateway.settings import Settings, load_settings
from gateway.stages import Stages
from gateway.world import real_world


def main() -> int:
    script = msgspec.json.decode(sys.argv[1])
    world = real_world()
    settings = load_settings(world.environ)
    configure_logs(settings.log_level)

    def engine(_: Settings, folders: Folders) -> list[str]:
        config = {**script, "socket_path": str(folders.engine_socket), "journal_dir": str(folders.journal)}
        return [sys.executable, "-m", "engine.bench.scripted", "--config", msgspec.json.encode(config).decode()]

    stages = Stages(Path(sys.argv[2]), world.monotonic_ns) if len(sys.argv) > 2 else None
    try:
        return run_serve(settings, world, Console(file=io.StringIO()), engine, stages)
    finally:
        if stages is not None:
            stages.close()


if __name__ == "__main__":
    sys.exit(main())
