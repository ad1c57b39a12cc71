"""One request from admission to its ending, streamed or whole. The rules that hold on every path:

1. Nothing is asked of the engine before quota, hold and log row are in place (admission.py).
2. Whatever happens, the request is settled exactly once (settlement.py); the last frame waits a moment for that, so
   that a client that saw [DONE] finds its usage in the ledger.
3. A client that leaves, or stops reading, frees the engine within a step or two: the sequence is aborted and its final
   counts are awaited for a bounded time.
4. No transaction is open while tokens flow.

How a request ends -> what is charged:

    stop, length               all that the engine produced
    client_gone, client_slow   all that the engine produced, also what was not sent
    engine_gone, engine errors, deadline, shutdown, error, tenant_inactive    what had been sent in a stream
"""

import asyncio
from contextlib import suppress
from typing import Any

import msgspec
import structlog
from starlette.types import Receive, Scope, Send

from engine.client import EngineClient, Generation
from engine.errors import EngineGoneError
from engine.protocol import TokenOutput
from gateway.api.admission import Admission, Claim, admit
from gateway.api.auth import Caller
from gateway.api.problems import (
    DeadlineExceededError,
    EngineRefusedError,
    bug_report,
    internal_problem,
    problem_of,
)
from gateway.api.settlement import NOTHING, Outcome, Settler
from gateway.api.shapes import Shape
from gateway.api.streaming import HEARTBEAT, HEARTBEAT_S, EventStream, SlowReaderError, bounded_send, event
from gateway.api.translation import Work, submit_of
from gateway.services import Services
from tenancy.closing import TenantInactiveError
from tenancy.meter import Usage
from tenancy.quota import QuotaUnavailableError

FINAL_COUNTS_S = 5.0  # how long an aborted sequence's last frame is awaited
SETTLE_WAIT_S = 2.0  # how long the last frame waits for T2; then it is settled behind the client's back
DEADLINE_MARGIN = 0.1  # of the hold's life, kept for settling before it expires
COMPLETE = frozenset({"stop", "length"})
# The engine's error codes as a usage row's finish reason (at most 16 characters).
REASON_OF_ERROR = {"isolation_violation": "isolation", "busy": "busy", "draining": "draining", "abort": "draining"}

log = structlog.get_logger("gateway.api.exchange")


class ClientGoneError(Exception):
    """The client closed its connection before the answer was complete."""


async def serve(
    services: Services,
    settler: Settler,
    client: EngineClient,
    caller: Caller,
    work: Work,
    shape: Shape,
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    """Admit, run, settle. Raises what problems.py knows, as long as nothing has been sent."""
    request_id: str = scope["state"]["request_id"]
    settler.opened()
    claim = Claim(request_id)
    claiming = asyncio.create_task(admit(services, caller, work, claim, scope["state"]))
    try:
        admission = await asyncio.shield(claiming)  # never cut in the middle: a script or commit ends by itself
    except BaseException:
        settler.undo(claim, claiming)
        raise
    await Exchange(services, settler, client, admission, work, shape, receive, send).run()


class Exchange:
    """An admitted request. `run` returns or raises only after the settlement has been started."""

    def __init__(
        self,
        services: Services,
        settler: Settler,
        client: EngineClient,
        admission: Admission,
        work: Work,
        shape: Shape,
        receive: Receive,
        send: Send,
    ) -> None:
        self._services = services
        self._settler = settler
        self._client = client
        self._admission = admission
        self._work = work
        self._shape = shape
        self._receive = receive
        self._send = send
        self._events = EventStream(send, services.settings.send_timeout_s)
        self._generation: Generation | None = None
        self._pull: asyncio.Task[TokenOutput] | None = None
        self._gone: asyncio.Task[None] | None = None
        self._produced = NOTHING  # as last reported by the engine
        self._delivered = NOTHING  # sent to the client in a stream
        self._settlement: asyncio.Task[None] | None = None
        self._dismissed = asyncio.Event()
        self._dismissal: asyncio.Task[Any] | None = None
        self._started_ns = services.world.monotonic_ns()
        self._first_text = False

    async def run(self) -> None:
        life_s = self._services.settings.hold_ttl_s * (1 - DEADLINE_MARGIN)
        self._gone = asyncio.create_task(self._until_gone())
        self._dismissal = asyncio.create_task(self._dismissed.wait())
        renewing = asyncio.create_task(self._renew_lease())
        tenant_id, running = self._admission.principal.tenant_id, self._services.running
        running.add(tenant_id, self)
        try:
            async with asyncio.timeout(life_s):
                await self._answer()
        except ClientGoneError:
            await self._client_left("client_gone")
        except SlowReaderError:
            await self._client_left("client_slow")
        except TenantInactiveError as error:
            await self._broken(error, "tenant_inactive")
        except TimeoutError:
            await self._broken(DeadlineExceededError(), "deadline")
        except EngineGoneError as error:
            await self._broken(error, "engine_gone")
        except EngineRefusedError as error:
            await self._broken(error, REASON_OF_ERROR.get(error.code, "engine_error"))
        except asyncio.CancelledError:
            self._stop_engine()
            self._settle(self._delivered, "shutdown")
            raise
        except Exception as error:
            await self._broken(error, "error")
        finally:
            running.remove(tenant_id, self)
            await _cancel(self._gone, self._dismissal, renewing, self._pull)

    def dismiss(self) -> None:
        """The tenant is no longer active: free the engine at once; the answer ends when it next looks."""
        self._dismissed.set()
        self._stop_engine()

    # --- the answer ---------------------------------------------------------------------------------------------------

    async def _answer(self) -> None:
        admission = self._admission
        submit = submit_of(
            self._work.at_most(admission.max_tokens),
            sequence_id=admission.request_id,
            tenant_id=admission.principal.tenant_id,
            secrets=self._services.secrets,
        )
        self._generation = await self._client.submit(submit)
        if self._work.stream:
            await self._answer_stream()
        else:
            await self._answer_whole()

    async def _answer_whole(self) -> None:
        texts: list[str] = []
        finish_reason: str | None = None
        while finish_reason is None:
            output = await self._next(None)
            assert output is not None
            texts.append(output.text)
            finish_reason = _checked_reason(output)
        await self._settled_soon(self._produced, finish_reason)
        content = msgspec.json.encode(self._shape.whole("".join(texts), finish_reason, self._produced))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        timeout_s = self._services.settings.send_timeout_s
        await bounded_send(self._send, {"type": "http.response.start", "status": 200, "headers": headers}, timeout_s)
        await bounded_send(self._send, {"type": "http.response.body", "body": content}, timeout_s)

    async def _answer_stream(self) -> None:
        """Status and headers wait for the first output, so that an early refusal still gets its own status."""
        events, shape = self._events, self._shape
        finish_reason: str | None = None
        while finish_reason is None:
            output = await self._next(HEARTBEAT_S)
            frames: list[bytes] = []
            if output is not None:
                finish_reason = _checked_reason(output)
                if output.text:
                    frames.append(event(shape.delta(output.text)))
            if not events.opened and (frames or finish_reason or output is None):
                await events.open()
                frames[:0] = [event(opening) for opening in shape.opening()]
            if output is None:
                frames.append(HEARTBEAT)
            if frames:
                await events.write(*frames)
            if output is not None and output.text:
                self._delivered = self._produced
        closing = [event(shape.closing(finish_reason))]
        if self._work.include_usage:
            closing.append(event(shape.usage_chunk(self._produced)))
        await events.write(*closing)
        await self._settled_soon(self._produced, finish_reason)
        await events.close()

    async def _next(self, timeout_s: float | None) -> TokenOutput | None:
        """The next output; None when there was none for `timeout_s`.

        Raises ClientGoneError, TenantInactiveError or EngineGoneError.
        """
        assert self._generation is not None
        assert self._gone is not None
        if self._pull is None:
            self._pull = asyncio.create_task(self._generation.__anext__())
        assert self._dismissal is not None
        awaited = {self._pull, self._gone, self._dismissal}
        await asyncio.wait(awaited, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if self._gone.done():
            raise ClientGoneError
        if self._dismissed.is_set():
            raise TenantInactiveError
        return self._pulled() if self._pull.done() else None

    def _pulled(self) -> TokenOutput:
        assert self._pull is not None
        output, self._pull = self._pull.result(), None
        self._produced = Usage(
            num_prompt_tokens=output.num_prompt_tokens,
            num_cached_tokens=output.num_cached_tokens,
            num_completion_tokens=output.num_completion_tokens,
        )
        if output.text and not self._first_text:
            self._first_text = True
            self._services.metrics.first_text(self._elapsed_s())
        return output

    def _elapsed_s(self) -> float:
        return (self._services.world.monotonic_ns() - self._started_ns) / 1e9

    # --- endings ------------------------------------------------------------------------------------------------------

    async def _client_left(self, reason: str) -> None:
        """The client's doing: stop the engine, learn the exact counts, charge what was produced."""
        finish_reason: str | None = None
        try:
            self._stop_engine()
            with suppress(TimeoutError, EngineGoneError):
                async with asyncio.timeout(FINAL_COUNTS_S):
                    finish_reason = await self._last_output()
        finally:
            self._settle(self._produced, finish_reason if finish_reason in COMPLETE else reason)

    async def _last_output(self) -> str | None:
        """Read on to the last frame, which may have been taken by a pull that nobody has looked at yet."""
        while True:
            if self._pull is None:
                if self._generation is None or self._generation.finished:
                    return None
                self._pull = asyncio.create_task(self._generation.__anext__())
            await asyncio.wait({self._pull})
            output = self._pulled()
            if output.finish_reason is not None:
                return output.finish_reason

    async def _broken(self, error: Exception, reason: str) -> None:
        """Our doing: charge only what was delivered, and tell the client in the way that is still open."""
        self._stop_engine()
        await self._settled_soon(self._delivered, reason)
        if not self._events.opened:
            raise error
        problem = problem_of(error)
        if problem is None:
            log.error("exchange.failed", request_id=self._admission.request_id, **bug_report(error))
            problem = internal_problem(self._admission.request_id)
        with suppress(SlowReaderError):
            await self._events.write(event(problem.error()))
            await self._events.close()

    def _stop_engine(self) -> None:
        if self._generation is not None and not self._generation.finished:
            self._client.abort(self._generation.sequence_id)

    def _settle(self, usage: Usage, reason: str) -> asyncio.Task[None]:
        """Start the settlement; only the first call counts."""
        if self._settlement is not None:
            return self._settlement
        if usage.num_completion_tokens == 0 and reason not in COMPLETE:
            usage = NOTHING
        num_quota_tokens = usage.num_prompt_tokens + usage.num_completion_tokens
        if reason in ("client_gone", "client_slow") and self._generation is not None:
            # The prompt may have been computed: leaving early must not make prompts free of the rate limit.
            num_quota_tokens = max(num_quota_tokens, self._admission.num_prompt_tokens)
        outcome = Outcome(usage, reason, self._services.world.now_ns(), num_quota_tokens)
        self._settlement = self._settler.settle(self._admission, outcome)
        self._services.metrics.ended(
            self._admission.principal.tenant_name,
            reason,
            self._elapsed_s(),
            num_prompt_tokens=usage.num_prompt_tokens,
            num_cached_tokens=usage.num_cached_tokens,
            num_completion_tokens=usage.num_completion_tokens,
        )
        log.info(
            "exchange.ended",
            request_id=self._admission.request_id,
            tenant_id=self._admission.principal.tenant_id,
            finish_reason=reason,
            num_prompt_tokens=usage.num_prompt_tokens,
            num_cached_tokens=usage.num_cached_tokens,
            num_completion_tokens=usage.num_completion_tokens,
            num_produced_tokens=self._produced.num_completion_tokens,
        )
        return self._settlement

    async def _settled_soon(self, usage: Usage, reason: str) -> None:
        await asyncio.wait({self._settle(usage, reason)}, timeout=SETTLE_WAIT_S)

    # --- beside the answer --------------------------------------------------------------------------------------------

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _renew_lease(self) -> None:
        """Without Valkey the lease runs out and its place may be given away while we still run: logged, not fatal."""
        while True:
            await asyncio.sleep(self._services.settings.lease_ttl_s / 3)
            try:
                kept = await self._services.quota.renew(self._admission.lease)
                if not kept:
                    log.warning("lease.expired", request_id=self._admission.request_id)
            except QuotaUnavailableError as error:
                log.warning("lease.not_renewed", request_id=self._admission.request_id, error=str(error))


def _checked_reason(output: TokenOutput) -> str | None:
    """The output's finish reason. Raises EngineRefusedError for an ending that is not a complete answer."""
    if output.finish_reason is None or output.finish_reason in COMPLETE:
        return output.finish_reason
    raise EngineRefusedError(output.error or output.finish_reason)


async def _cancel(*tasks: asyncio.Task[Any] | None) -> None:
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
