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
    engine_gone, engine errors, deadline, shutdown, error,                    what had been sent in a stream
    tenant_inactive, key_revoked
"""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import msgspec
import structlog
from starlette.types import Receive, Scope, Send

from engine.client import EngineClient
from engine.errors import EngineGoneError
from engine.protocol import TokenLogprob, TokenOutput
from gateway.api.admission import Admission, Claim, admit
from gateway.api.auth import Caller
from gateway.api.choices import NOTHING, Choices
from gateway.api.cover import Cover
from gateway.api.endings import COMPLETE, REASON_OF_ERROR, checked_reason, reason_of_all
from gateway.api.life import Life
from gateway.api.problems import (
    DeadlineExceededError,
    EngineRefusedError,
    bug_report,
    internal_problem,
    problem_of,
)
from gateway.api.settlement import Outcome, Settler
from gateway.api.shapes import Choice, Shape
from gateway.api.streaming import HEARTBEAT, HEARTBEAT_S, EventStream, SlowReaderError, bounded_send, event
from gateway.api.translation import Work, submits_of
from gateway.services import Services
from gateway.stages import passed
from tenancy.access.keys import KeyRevokedError
from tenancy.closing import TenantInactiveError
from tenancy.idempotency import IdempotencyKey
from tenancy.quotas.quota import QuotaUnavailableError
from tenancy.usage.meter import Usage

FINAL_COUNTS_S = 30.0  # how long an aborted sequence's last frame is awaited: nobody but its place waits for it
SETTLE_WAIT_S = 2.0  # how long the last frame waits for T2; then it is settled behind the client's back

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
    key: IdempotencyKey | None = None,
) -> bool:
    """Admit, run, settle; whether the answer was whole. Raises what problems.py knows, as long as nothing was sent."""
    request_id: str = scope["state"]["request_id"]
    settler.opened(request_id)
    claim = Claim(request_id, key=key)
    claiming = asyncio.create_task(admit(services, caller, work, claim, scope["state"]))
    try:
        admission = await asyncio.shield(claiming)  # never cut in the middle: a script or commit ends by itself
    except BaseException:
        settler.undo(claim, claiming)
        raise
    exchange = Exchange(services, settler, client, admission, work, shape, scope["state"], receive, send)
    await exchange.run()
    return exchange.answered


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
        state: Mapping[str, Any],
        receive: Receive,
        send: Send,
    ) -> None:
        self._services = services
        self._settler = settler
        self._admission = admission
        self._work = work
        self._shape = shape
        self._state = state
        self._receive = receive
        self._send = send
        cover = Cover.of(services.settings, work.cover, services.world.entropy)
        self._events = EventStream(send, services.settings.send_timeout_s, cover)
        submits = submits_of(
            work,
            max_tokens=admission.max_tokens,
            request_id=admission.request_id,
            tenant_id=admission.principal.tenant_id,
            weight=admission.principal.weight,
            secrets=services.secrets,
            entropy=services.world.entropy,
        )
        self._choices = Choices(client, submits)
        self._pull: asyncio.Task[tuple[int, TokenOutput]] | None = None
        self._gone: asyncio.Task[None] | None = None
        self._settlement: asyncio.Task[bool] | None = None
        self._dismissed: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self._renewing: asyncio.Task[None] | None = None
        self._started_ns = services.world.monotonic_ns()
        self._life = Life(services.world, admission.expires_ns, services.settings.hold_ttl_s)
        self._last_text: dict[int, tuple[float, int]] = {}  # by choice: when it came, tokens until then
        self.answered = False  # wholly, and so settled
        self._prompt_logprobs: tuple[TokenLogprob, ...] = ()  # complete before anything of an answer

    async def run(self) -> None:
        self._gone = asyncio.create_task(self._until_gone())
        renewal = asyncio.get_running_loop().call_later(self._services.settings.lease_ttl_s / 3, self._renew)
        principal, running = self._admission.principal, self._services.running
        running.add(principal, self)
        try:
            self._life.require()
            async with asyncio.timeout(self._life.left_s):
                await self._answer()
            self.answered = True
        except ClientGoneError:
            await self._client_left("client_gone")
        except SlowReaderError:
            await self._client_left("client_slow")
        except TenantInactiveError as error:
            await self._broken(error, "tenant_inactive")
        except KeyRevokedError as error:
            await self._broken(error, "key_revoked")
        except (TimeoutError, DeadlineExceededError):
            await self._broken(DeadlineExceededError(), "deadline")
        except EngineGoneError as error:
            await self._broken(error, "engine_gone")
        except EngineRefusedError as error:
            await self._broken(error, REASON_OF_ERROR.get(error.code, "engine_error"))
        except asyncio.CancelledError:
            self._choices.abort()
            self._settle(self._choices.delivered, "shutdown")
            raise
        except Exception as error:
            await self._broken(error, "error")
        finally:
            running.remove(principal, self)
            renewal.cancel()
            await _cancel(self._gone, self._renewing, self._pull)
            await self._events.stop()
            await self._choices.close()

    def dismiss(self, why: Exception) -> None:
        """Free the engine at once; the answer ends with `why` when it next looks."""
        if not self._dismissed.done():
            self._dismissed.set_result(why)
        self._choices.abort()

    # --- the answer ---------------------------------------------------------------------------------------------------

    async def _answer(self) -> None:
        await self._choices.start()
        if self._work.stream:
            await self._answer_stream()
        else:
            await self._answer_whole()

    async def _answer_whole(self) -> None:
        outputs: list[list[TokenOutput]] = [[] for _ in range(self._work.n)]
        reasons: dict[int, str] = {}
        while len(reasons) < self._work.n:
            found = await self._next(None)
            assert found is not None
            index, output = found
            outputs[index].append(output)
            if reason := checked_reason(output):
                reasons[index] = reason
        choices = [
            Choice("".join(one.text for one in parts), tuple(x for one in parts for x in one.logprobs), reasons[index])
            for index, parts in enumerate(outputs)
        ]
        usage = self._choices.produced
        await self._settled_soon(usage, reason_of_all(reasons.values()))
        self._require_billed()
        content = msgspec.json.encode(self._shape.whole(choices, self._prompt_logprobs, usage))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        head = {"type": "http.response.start", "status": 200, "headers": headers}
        body = {"type": "http.response.body", "body": content}
        await bounded_send(self._send, head, body, timeout_s=self._services.settings.send_timeout_s)

    async def _answer_stream(self) -> None:
        """Status and headers wait for the first output, so that an early refusal still gets its own status."""
        events, shape = self._events, self._shape
        reasons: dict[int, str] = {}
        begun = False
        while len(reasons) < self._work.n:
            found = await self._next(HEARTBEAT_S)
            frames: list[bytes] = []
            shown = False
            if found is None:
                frames.append(HEARTBEAT)
            else:
                index, output = found
                reason = checked_reason(output)
                if output.text or output.logprobs:
                    frames += map(event, shape.delta(index, output.text, output.logprobs))
                shown = bool(frames)
                if reason is not None:
                    reasons[index] = reason
                    closing = shape.closing(index, reason)
                    frames += map(event, closing)
                    shown = shown or len(closing) > 1
                if frames and not begun:
                    begun = True
                    frames[:0] = [event(opening) for opening in shape.opening(self._prompt_logprobs)]
            if frames:
                self._life.require()
                await events.open()
                await events.write(*frames)
            if found is not None and shown:
                self._choices.mark_delivered(index)
        usage = self._choices.produced
        if self._work.include_usage:
            await events.write(event(shape.usage_chunk(usage)))
        await self._settled_soon(usage, reason_of_all(reasons.values()))
        await events.close()

    async def _next(self, timeout_s: float | None) -> tuple[int, TokenOutput] | None:
        """The next output and whose it is; None when there was none for `timeout_s`.

        Raises ClientGoneError, TenantInactiveError, KeyRevokedError or EngineGoneError.
        """
        assert self._gone is not None
        if self._pull is None:
            self._pull = asyncio.create_task(self._choices.next())
        ends: set[asyncio.Future[Any]] = {self._pull, self._gone, self._dismissed}
        await asyncio.wait(ends, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if self._gone.done():
            raise ClientGoneError
        if self._dismissed.done():
            raise self._dismissed.result()
        return self._pulled() if self._pull.done() else None

    def _pulled(self) -> tuple[int, TokenOutput]:
        assert self._pull is not None
        found, self._pull = self._pull.result(), None
        self._prompt_logprobs += found[1].prompt_logprobs
        if found[1].text:
            self._time(*found)
        return found

    def _time(self, index: int, output: TokenOutput) -> None:
        at_s, num_tokens = self._elapsed_s(), output.num_completion_tokens
        if index in self._last_text:
            last_s, num_before = self._last_text[index]
            self._services.metrics.next_text(at_s - last_s, num_tokens - num_before)
        elif not self._last_text:
            self._services.metrics.first_text(at_s)
        self._last_text[index] = (at_s, num_tokens)

    def _elapsed_s(self) -> float:
        return (self._services.world.monotonic_ns() - self._started_ns) / 1e9

    # --- endings ------------------------------------------------------------------------------------------------------

    async def _client_left(self, reason: str) -> None:
        """The client's doing: stop the engine, learn the exact counts, charge what was produced."""
        complete: str | None = None
        try:
            self._choices.abort()
            with suppress(TimeoutError, EngineGoneError):
                async with asyncio.timeout(FINAL_COUNTS_S):
                    complete = await self._last_outputs()
        finally:
            self._settle(self._choices.produced, complete or reason)

    async def _last_outputs(self) -> str | None:
        """Read on to each last frame, which may have been taken by a pull that nobody has looked at yet. The finish
        reason, if nothing was cut off by our stopping."""
        reasons: list[str | None] = []
        while self._pull is not None or not self._choices.finished:
            if self._pull is None:
                self._pull = asyncio.create_task(self._choices.next())
            await asyncio.wait({self._pull})
            _, output = self._pulled()
            if output.finish_reason is not None:
                reasons.append(output.finish_reason)
        complete = bool(reasons) and COMPLETE.issuperset(reasons) and not self._choices.cut
        return reason_of_all(reasons) if complete else None

    async def _broken(self, error: Exception, reason: str) -> None:
        """Our doing: charge only what was delivered, and tell the client in the way that is still open."""
        self._choices.abort()
        await self._settled_soon(self._choices.delivered, reason)
        if not self._events.opened:
            raise error
        problem = problem_of(error)
        if problem is None:
            log.error("exchange.failed", request_id=self._admission.request_id, **bug_report(error))
            problem = internal_problem(self._admission.request_id)
        with suppress(SlowReaderError):
            await self._events.write(event(problem.error()))
            await self._events.close()

    def _settle(self, usage: Usage, reason: str) -> asyncio.Task[bool]:
        """Start the settlement; only the first call counts."""
        if self._settlement is not None:
            return self._settlement
        if usage.num_completion_tokens == 0 and reason not in COMPLETE:
            usage = NOTHING
        num_quota_tokens = usage.num_prompt_tokens + usage.num_completion_tokens
        if reason in ("client_gone", "client_slow") and self._choices.started:
            # The prompt may have been computed: leaving early must not make prompts free of the rate limit.
            num_quota_tokens = max(num_quota_tokens, self._admission.num_prompt_tokens)
        outcome = Outcome(usage, reason, self._services.world.now_ns(), num_quota_tokens, self._choices.effort)
        self._settlement = self._settler.settle(self._admission, outcome)
        principal = self._admission.principal
        self._services.metrics.ended(
            principal.tenant_name,
            reason,
            self._elapsed_s(),
            num_prompt_tokens=usage.num_prompt_tokens,
            num_cached_tokens=usage.num_cached_tokens,
            num_completion_tokens=usage.num_completion_tokens,
        )
        log.info(
            "exchange.ended",
            request_id=self._admission.request_id,
            tenant_id=principal.tenant_id,
            finish_reason=reason,
            num_prompt_tokens=usage.num_prompt_tokens,
            num_cached_tokens=usage.num_cached_tokens,
            num_completion_tokens=usage.num_completion_tokens,
            num_produced_tokens=self._choices.produced.num_completion_tokens,
        )
        return self._settlement

    async def _settled_soon(self, usage: Usage, reason: str) -> None:
        passed(self._state, "engine")
        await asyncio.wait({self._settle(usage, reason)}, timeout=SETTLE_WAIT_S)
        passed(self._state, "settle")

    def _require_billed(self) -> None:
        """Nothing has been sent yet, and nothing is where the hold was over. Raises DeadlineExceededError."""
        if self._settlement is not None and self._settlement.done() and not self._settlement.result():
            raise DeadlineExceededError

    # --- beside the answer --------------------------------------------------------------------------------------------

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    def _renew(self) -> None:
        """The first time is due; most requests end before."""
        self._renewing = asyncio.create_task(self._renew_lease())

    async def _renew_lease(self) -> None:
        """Without Valkey the lease runs out and its place may be given away while we still run: logged, not fatal."""
        while True:
            try:
                kept = await self._services.allowance.renew(self._admission.lease)
                if not kept:
                    log.warning("lease.expired", request_id=self._admission.request_id)
            except QuotaUnavailableError as error:
                log.warning("lease.not_renewed", request_id=self._admission.request_id, error=str(error))
            await asyncio.sleep(self._services.settings.lease_ttl_s / 3)


async def _cancel(*tasks: asyncio.Task[Any] | None) -> None:
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
