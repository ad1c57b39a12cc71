"""Child processes: started so that they die with us, watched, and restarted with a growing pause.

A child that ends by itself is restarted after RESTART_PAUSE_S, doubled up to RESTART_PAUSE_MAX_S; a child that lived
longer than STEADY_S starts again from the shortest pause.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

import structlog

from gateway.host.deathsig import dying_with_me

RESTART_PAUSE_S = 0.2
RESTART_PAUSE_MAX_S = 10.0
STEADY_S = 30.0

log = structlog.get_logger(__name__)


class ChildFailedError(Exception):
    """A child did not become ready at start-up; the message ends with what it said."""


class Child:
    """One supervised process.

    `argv[0]` is an absolute path. `on_start` runs after each start and returns once the child is usable (it raises if
    that takes too long); `on_exit` runs when the child is gone, before it is started again.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        on_start: Callable[["Child"], Awaitable[None]],
        on_exit: Callable[[int], Awaitable[None]],
        env: Mapping[str, str],
    ) -> None:
        self.name = name
        self.num_restarts = 0
        self._argv = argv
        self._env = dict(env)
        self._on_start = on_start
        self._on_exit = on_exit
        self._process: asyncio.subprocess.Process | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self) -> None:
        """Start the child and wait until it is usable. Raises ChildFailedError if it ends first."""
        process = await self._spawn()
        ready = asyncio.ensure_future(self._on_start(self))
        gone = asyncio.ensure_future(process.wait())
        await asyncio.wait({ready, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            ready.cancel()
            raise ChildFailedError(f"{self.name} ended with code {process.returncode} before it was ready (see above)")
        gone.cancel()
        try:
            await ready
        except Exception as error:
            await self._end(process, grace_s=1.0)
            raise ChildFailedError(f"{self.name} did not become ready: {error}") from error
        self._watcher = asyncio.create_task(self._watch(), name=f"watch-{self.name}")

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, wait `grace_s`, then SIGKILL. Does nothing if the child is not running."""
        self._stopping = True
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        if self._process is not None:
            await self._end(self._process, grace_s)

    async def _spawn(self) -> asyncio.subprocess.Process:
        self._process = await asyncio.create_subprocess_exec(
            *dying_with_me(self._argv),
            env=self._env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,  # what a child has to say goes to standard error
            start_new_session=True,  # Ctrl-C reaches the gateway alone, which then stops its children in order
        )
        log.info("child started", child=self.name, pid=self._process.pid)
        return self._process

    async def _watch(self) -> None:
        pause_s = RESTART_PAUSE_S
        loop = asyncio.get_running_loop()
        while self._process is not None:
            started = loop.time()
            code = await self._process.wait()
            log.error("child ended", child=self.name, code=code)
            await self._on_exit(code)
            if loop.time() - started > STEADY_S:
                pause_s = RESTART_PAUSE_S
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, RESTART_PAUSE_MAX_S)
            self.num_restarts += 1
            process = await self._spawn()
            try:
                await self._on_start(self)
            except Exception as error:  # whatever went wrong, the remedy is the same: end it and try again
                log.error("child not ready", child=self.name, error=str(error))
                await self._end(process, grace_s=1.0)

    async def _end(self, process: asyncio.subprocess.Process, grace_s: float) -> None:
        if process.returncode is not None:
            return
        try:
            process.terminate()
            await asyncio.wait_for(process.wait(), grace_s)
        except TimeoutError:
            log.warning("child killed", child=self.name, pid=process.pid)
            process.kill()
            await process.wait()
        except ProcessLookupError:
            await process.wait()
