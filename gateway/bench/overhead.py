"""What the gateway adds to the engine: open loop, so that a slow answer does not slow the next request down.

The same answers, at the same rate, twice: straight from the engine's client, and over HTTPS through authentication,
quota, hold, capture, usage row and outbox. A request's latency runs from the moment at which it was due. The engine
follows a script and answers at once, so what is left is the gateway. `https_*` is a request that the gateway answers
without any of that (GET /healthz), and is part of what is added.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle
from typing import Any

from engine.bench.byte_model import END
from engine.client import EngineClient
from engine.protocol import SamplingParams, Submit
from gateway.bench.accounts import Account, open_accounts
from gateway.bench.breakdown import Breakdown, nearest_rank
from gateway.bench.history import write_history
from gateway.bench.http import Connection
from gateway.bench.servers import MODEL_ID, GatewayProcess, Place, place
from gateway.commands.session import CommandError
from gateway.database import Database
from gateway.host.folders import open_folders
from gateway.secrets import load_secrets
from gateway.world import World

NUM_TENANTS = 8
MAX_TOKENS = 8
WARM_UP_S = 2.0
SUSTAINED_SHARE = 0.97  # of the requests due, answered within a run and LATE_MAX_S after it
LATE_MAX_S = 0.5
QUEUE_MAX_MS = 100.0  # a median above it: what is due waits for what was due before
CLIENTS_MAX = 512  # in flight; a request that finds none free has failed
GROWTH = 1.3
Send = Callable[[], Awaitable[bool]]
Load = Callable[[Send, int, float], Awaitable["Run"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    rates: tuple[int, ...] = (50, 200)
    seconds: float = 8.0  # of one row
    ledger_rows: tuple[int, ...] = (0,)  # of history that lies in the ledger: measured at each, the least first
    postgres: bool = True
    stages: bool = False  # also where the time went, inside the gateway and between the processes
    rate_max: int = 2_000


@dataclass(frozen=True, slots=True)
class Run:
    latencies_ms: list[float]
    num_due: int
    num_failed: int

    @property
    def sustained(self) -> bool:
        on_time = len(self.latencies_ms) >= SUSTAINED_SHARE * self.num_due
        return self.num_failed == 0 and on_time and self.percentile(50) <= QUEUE_MAX_MS

    def percentile(self, percent: int) -> float:
        """Nearest rank."""
        return nearest_rank(self.latencies_ms, percent)


async def measure_overhead(world: World, plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """`overhead`: a row for each rate, for half the highest sustained one, and for that, with each history in the
    ledger. The highest is that with the shortest one. Raises CommandError."""
    async with place(world, postgres=plan.postgres) as here:
        await here.make_tables()
        database = Database(here.own_url)
        try:
            pepper = load_secrets(here.secrets, world.entropy).key_pepper
            async with database.transaction() as conn:
                accounts = await open_accounts(conn, world, pepper, NUM_TENANTS, budget_tokens=10**12)
            script: dict[str, str | int] = {"step_ms": 0, "tokens_per_step": MAX_TOKENS}
            here.with_stages = plan.stages
            gateway = await here.start_gateway(0, script)
            return await _rows(world, here, database, gateway, accounts, plan, say)
        finally:
            await database.dispose()


async def _rows(
    world: World,
    here: Place,
    database: Database,
    gateway: GatewayProcess,
    accounts: list[Account],
    plan: Plan,
    say: Callable[[str], None],
) -> dict[str, Any]:
    folders = open_folders(gateway.folder)
    engine = await EngineClient.connect(folders.engine_socket, timeout_s=10)
    clients = Clients(gateway, accounts)
    load = partial(open_loop, now_s=lambda: world.monotonic_ns() / 1e9)
    breakdown = Breakdown(world, here, gateway, engine.ready.pid) if plan.stages else None
    rows: list[dict[str, Any]] = []
    highest = written_rows = 0
    try:
        await load(clients.chat, 20, WARM_UP_S)
        for ledger_rows in sorted(set(plan.ledger_rows)):
            if ledger_rows:
                say(f"writing {ledger_rows:,} ledger rows")
                await write_history(database, ledger_rows, say, written_rows=written_rows)
                await load(clients.chat, 20, WARM_UP_S)
            written_rows = ledger_rows
            highest = highest or await _highest(load, clients.chat, plan, say)
            for rate in sorted({*(rate for rate in plan.rates if rate <= highest), max(1, highest // 2), highest}):
                row = await _row(load, engine, clients, rate, plan.seconds, breakdown)
                rows.append({**row, "ledger_rows": ledger_rows})
                say(str(rows[-1]))
        return {"overhead": rows, "highest_rps": highest, "database": here.database_url.partition("+")[0]}
    finally:
        await engine.close()
        clients.close()


async def _row(
    load: Load, engine: EngineClient, clients: "Clients", rate: int, seconds: float, breakdown: Breakdown | None
) -> dict[str, Any]:
    bare = await load(bare_sender(engine), rate, seconds)
    https = await load(clients.health, rate, seconds / 2)
    if breakdown is not None:
        breakdown.begin()
    full = await load(clients.chat, rate, seconds)
    found = breakdown.end(full.num_due) if breakdown is not None else {}
    return {
        "rate_rps": rate,
        "added_p50_ms": round(full.percentile(50) - bare.percentile(50), 2),
        "added_p99_ms": round(full.percentile(99) - bare.percentile(99), 2),
        "https_p50_ms": round(https.percentile(50), 2),
        "https_p99_ms": round(https.percentile(99), 2),
        "num_failed": full.num_failed,
        **found,
    }


async def _highest(load: Load, send: Send, plan: Plan, say: Callable[[str], None]) -> int:
    """The highest rate that is sustained, to within GROWTH."""
    rate, found = 40.0, 0
    while rate <= plan.rate_max:
        run = await load(send, int(rate), 3.0)
        say(f"{int(rate)} requests/s: {'sustained' if run.sustained else 'not sustained'}")
        if not run.sustained:
            break
        found, rate = int(rate), rate * GROWTH
    if not found:
        raise CommandError("this machine does not sustain 40 requests/s")
    return found


async def open_loop(send: Send, rate: int, seconds: float, *, now_s: Callable[[], float]) -> Run:
    """`send` at a fixed rate, whether or not earlier ones have ended. `now_s`: an event loop's own time may be one of
    whole milliseconds."""
    began, latencies, num_failed = now_s() + 0.05, list[float](), 0

    async def one(due: float) -> None:
        nonlocal num_failed
        if await send():
            latencies.append((now_s() - due) * 1_000)
        else:
            num_failed += 1

    tasks = set[asyncio.Task[None]]()
    num_due = int(rate * seconds)
    for number in range(num_due):
        due = began + number / rate
        while (wait_s := due - now_s()) > 0:  # noqa: ASYNC110 - a timer may be early by half a millisecond
            await asyncio.sleep(wait_s)
        task = asyncio.create_task(one(due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    if tasks:
        await asyncio.wait(tasks, timeout=LATE_MAX_S)
    on_time = Run(list(latencies), num_due, num_failed)
    if tasks:
        await asyncio.wait(tasks, timeout=30)
    return on_time


class Clients:
    """Kept connections, one for each request in flight."""

    def __init__(self, gateway: GatewayProcess, accounts: list[Account]) -> None:
        self._port, self._tls = gateway.port, gateway.tls
        self._accounts = cycle(accounts)
        self._numbers = count()
        self._free: dict[str, list[Connection]] = {account.secret: [] for account in accounts}
        self._num_used = 0

    async def chat(self) -> bool:
        body = {
            "model": MODEL_ID,
            "messages": [{"role": "user", "content": f"request {next(self._numbers)}"}],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
        }
        return await self._with_connection(lambda one: one.post("/v1/chat/completions", body))

    async def health(self) -> bool:
        return await self._with_connection(lambda one: one.get("/healthz"))

    async def _with_connection(self, send: Callable[[Connection], Awaitable[Any]]) -> bool:
        secret = next(self._accounts).secret
        free = self._free[secret]
        if not free and self._num_used >= CLIENTS_MAX:
            return False
        one = free.pop() if free else Connection(self._port, self._tls, secret)
        self._num_used += 1
        try:
            reply = await send(one)
        finally:
            self._num_used -= 1
            free.append(one)
        return bool(reply.status == 200 and reply.complete)

    def close(self) -> None:
        for free in self._free.values():
            for one in free:
                one.close()


def bare_sender(engine: EngineClient) -> Send:
    """The same answers from the engine's client, with as many prompt tokens."""
    numbers = count()
    prompt = [1] * len(f"<user>request 1000{END}<assistant>")

    async def send() -> bool:
        submit = Submit(
            f"bare-{next(numbers)}", "bench", b"salt", prompt, SamplingParams(max_tokens=MAX_TOKENS, temperature=0)
        )
        async for _ in await engine.submit(submit):
            pass
        return True

    return send
