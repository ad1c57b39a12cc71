"""`bulkhead serve`: from a data folder to a serving gateway, and back to nothing running.

Start: folders and lock, port, model, certificates, database, Valkey and engine worker side by side, first-run tenants,
recovery of what an earlier crash left open, background loops, HTTPS. Stop: no new connections, requests in flight end
or are cut, their settlements are written, the log gets its last checkpoint, children stop, in that order.
"""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack

import structlog
import uvloop
from rich.console import Console
from sqlalchemy.exc import IntegrityError

from audit.transparency.keyring import load_keyring
from engine.text.tokenizer import Tokenizer
from gateway.admin.routes import admin_routes
from gateway.api.app import create_app
from gateway.database import Database
from gateway.engine_link import EngineLink
from gateway.host.banner import ready_banner
from gateway.host.demo_model import ModelError, ensure_demo_model, model_is_present
from gateway.host.engine_host import EngineCommand, EngineHost, served_engine, worker_environment
from gateway.host.first_run import FirstRun, first_run
from gateway.host.folders import Folders, gateway_id, only_server, open_folders
from gateway.host.housekeeping import Housekeeping
from gateway.host.https import HttpsServer, https_server
from gateway.host.memory import keep_what_started, let_the_loop_in, return_freed_memory
from gateway.host.migrate import MigrationError, migrate
from gateway.host.port import bind
from gateway.host.recovery import recover
from gateway.host.same_keys import require_same_keys
from gateway.host.tls import TlsFiles, ensure_certificates, own_certificate
from gateway.host.valkey import connect_redis, valkey_child
from gateway.rights.standing import standing
from gateway.secrets import load_secrets
from gateway.services import Services
from gateway.settings import Settings
from gateway.stages import Stages
from gateway.world import World
from tenancy.access.directory import DuplicateNameError
from tenancy.quotas.quota import Quota

WORKER_GRACE_S = 5.0
VALKEY_GRACE_S = 5.0
MISSING_NAMED_MAX = 8

log = structlog.get_logger(__name__)


def run_serve(
    settings: Settings,
    world: World,
    console: Console,
    engine: EngineCommand = served_engine,
    stages: Stages | None = None,
) -> int:
    """Serve until SIGINT or SIGTERM. `engine` is what listens on the engine's socket; `stages` keeps where time goes.

    Raises FolderError, PortError, ModelError and others with one clear line.
    """
    started_ns = world.monotonic_ns()
    return_freed_memory()
    let_the_loop_in()
    folders = open_folders(settings.data_dir, settings.secrets_dir)
    with only_server(folders):
        listener = bind(settings.host, settings.port)
        with console.status("model"):
            prepare_model(settings, lambda text: console.print(f"model: {text}"))
        return uvloop.run(_serve(settings, world, folders, listener, console, started_ns, engine, stages))


def prepare_model(settings: Settings, say: Callable[[str], None]) -> None:
    if not settings.model_dir:
        ensure_demo_model(settings.effective_model_dir, say)
    elif not model_is_present(settings.effective_model_dir):
        raise ModelError(
            f"{settings.effective_model_dir} holds no model (model.safetensors and tokenizer.json):"
            " correct BULKHEAD_MODEL_DIR, or unset it to use the demo model"
        )


def tls_files(settings: Settings, world: World, folders: Folders) -> TlsFiles:
    if settings.tls_certificate or settings.tls_key:
        return own_certificate(settings.tls_certificate, settings.tls_key)
    return ensure_certificates(folders.tls, settings.host, world.now_ns())


async def _serve(
    settings: Settings,
    world: World,
    folders: Folders,
    listener: socket.socket,
    console: Console,
    started_ns: int,
    engine: EngineCommand,
    stages: Stages | None,
) -> int:
    task = asyncio.current_task()
    assert task is not None
    server: HttpsServer | None = None

    def on_signal() -> None:
        if server is None:
            task.cancel()  # still starting: undo what was started
        elif server.should_exit:
            server.force_exit = True  # asked twice: do not wait for requests in flight
        else:
            console.print("stopping: letting requests in flight end (again to stop at once)")
            server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    with contextlib.suppress(asyncio.CancelledError):
        async with AsyncExitStack() as stack:
            services, fresh = await _start(settings, world, folders, stack, console, engine, stages)
            app = create_app(services, extra_routes=admin_routes(services))
            stack.push_async_callback(app.state.settler.drain, settings.drain_timeout_s)
            tls = tls_files(settings, world, folders)
            server = https_server(app, tls, settings.drain_timeout_s)
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            await server.listening.wait()
            keep_what_started()
            port = listener.getsockname()[1]
            console.print(f"started in {(world.monotonic_ns() - started_ns) / 1e9:.1f} s")
            ready_banner(console, settings, folders, tls, services.tokenizer.model_id, port, fresh)
            await serving
    return 0


async def _start(
    settings: Settings,
    world: World,
    folders: Folders,
    stack: AsyncExitStack,
    console: Console,
    engine_command: EngineCommand,
    stages: Stages | None,
) -> tuple[Services, FirstRun | None]:
    """Start everything behind the HTTP server; `stack` undoes it in the opposite order."""
    with console.status("database") as status:
        secrets = load_secrets(folders.secrets, world.entropy)
        await asyncio.to_thread(migrate, settings.effective_database_url)
        database = Database(settings.effective_database_url)
        stack.push_async_callback(database.dispose)
        await _require_rights(database)
        link = EngineLink()
        engine = EngineHost(settings, world, folders, database, link, engine_command)
        starts = [engine.child.start()]
        redis_url = settings.redis_url
        if not redis_url:
            redis_url = f"unix://{folders.valkey_socket}"
            valkey = valkey_child(folders.valkey, folders.valkey_socket, worker_environment(world.environ))
            stack.push_async_callback(valkey.stop, VALKEY_GRACE_S)
            starts.append(valkey.start())
        redis = connect_redis(redis_url)
        stack.push_async_callback(redis.aclose)
        status.update("engine worker")
        stack.push_async_callback(engine.stop, WORKER_GRACE_S)
        await asyncio.gather(*starts)
        tokenizer = Tokenizer.load(settings.effective_model_dir)
        name = gateway_id(folders, world.entropy)
        services = Services(
            settings, world, database, redis, Quota(redis), link, tokenizer, secrets, gateway_id=name, stages=stages
        )
        await _say_standing(services, console)
        services.metrics.watch_engine(link)
        status.update("first run and recovery")
        fresh = await _first_run(services) if settings.demo_tenants else None
        ready = link.status.ready
        await recover(services, folders, ready.epoch if ready is not None else "")
        keyring = load_keyring(folders.log_keys, origin=settings.log_origin, entropy=world.entropy)
        async with database.read() as conn:
            await require_same_keys(conn, keyring, folders.secrets)
        housekeeping = Housekeeping(services, folders, keyring, engine)
        services.metrics.watch_loops(housekeeping.loops)
        await housekeeping.start()
        stack.push_async_callback(housekeeping.stop)
    return services, fresh


async def _require_rights(database: Database) -> None:
    """Raises MigrationError where the server could not do its work."""
    async with database.read() as conn:
        found = await standing(conn)
    if found.missing:
        some = ", ".join(found.missing[:MISSING_NAMED_MAX])
        raise MigrationError(
            f"the role {found.role} lacks rights that the server needs ({some}): run"
            f" `bulkhead migrate --serving-role {found.role}` as the tables' owner (BULKHEAD_MIGRATION_DATABASE_URL)"
        )


async def _say_standing(services: Services, console: Console) -> None:
    found = await services.standing.look()
    if found.role:
        console.print(f"PostgreSQL: {found.sentence()}", soft_wrap=True)
    if services.settings.migration_database_url:
        log.warning(
            "BULKHEAD_MIGRATION_DATABASE_URL is in the server's environment: it is for `bulkhead migrate` alone,"
            " and whoever gets at this process could use it to take the triggers away"
        )


async def _first_run(services: Services) -> FirstRun | None:
    world = services.world
    try:
        async with services.database.transaction() as conn:
            return await first_run(
                conn, world.entropy, world.now_ns(), services.secrets.key_pepper, services.tokenizer.model_id
            )
    except (DuplicateNameError, IntegrityError):
        return None  # another gateway does it at this moment
