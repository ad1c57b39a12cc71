"""One gateway of a benchmark: `bulkhead serve` whose engine follows a script.

    python -m gateway.bench.replica SCRIPT

SCRIPT holds fields of engine.bench.scripted.ScriptedConfig; settings come from the environment, as for `serve`.
"""

import io
import sys

import msgspec
from rich.console import Console

from gateway.host.folders import Folders
from gateway.host.serve import run_serve
from gateway.logs import configure_logs
from gateway.settings import Settings, load_settings
from gateway.world import real_world


def main() -> int:
    script = msgspec.json.decode(sys.argv[1])
    world = real_world()
    settings = load_settings(world.environ)
    configure_logs(settings.log_level)

    def engine(_: Settings, folders: Folders) -> list[str]:
        config = {**script, "socket_path": str(folders.engine_socket), "journal_dir": str(folders.journal)}
        return [sys.executable, "-m", "engine.bench.scripted", "--config", msgspec.json.encode(config).decode()]

    return run_serve(settings, world, Console(file=io.StringIO()), engine)


if __name__ == "__main__":
    sys.exit(main())
