"""Random load with aborts on a real worker process, for a stated time; then nothing may be left of it.

`concurrency` clients each send one request after another: prompts and answers of random lengths, of several domains
and tiers, many that begin alike. A quarter is aborted, before its first token or in the middle. No torch here: the
worker is a process of its own, started by the command that the caller names.
"""

import asyncio
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from engine.client import EngineClient, Generation
from engine.protocol import Incident, SamplingParams, Submit
from engine.scheduling.tiers import TIERS

DOMAINS = tuple("abcd")
PROMPT_TOKENS_MAX = 400
OUTPUT_TOKENS_MAX = 64
ALIKE_TOKENS = 160  # with which half of a domain's prompts begin
ABORTED = 0.25  # of the requests
START_TIMEOUT_S = 120.0
SETTLE_TIMEOUT_S = 60.0  # until the worker tells that all blocks are free: an answer may just be run again alone
ENDING_TIMEOUT_S = 120.0  # of all that is in flight at the end, and of the worker's exit
WARM_SHARE = 0.3  # of the time; then the memory is looked at first
JUDGED_SECONDS = 300  # a shorter soak tells how memory grew and does not judge it: the cache is touched bit by bit
GROWTH_BYTES_MAX = 48 * 1024 * 1024  # what an allocator may keep more at the end


@dataclass(slots=True)
class Load:
    client: EngineClient
    until_s: float
    now: Callable[[], float]
    ended: Counter[str] = field(default_factory=Counter)  # by finish reason, and "error: ..." by code
    num_output_tokens: int = 0
    _in_flight: set[str] = field(default_factory=set)

    async def run_client(self, number: int, seed: int) -> None:
        random = Random(f"{seed}.{number}")  # noqa: S311  load, not secrets
        index = 0
        while self.now() < self.until_s:
            submit = self._draw(f"{number}.{index}", random)
            abort_after = random.randrange(submit.sampling.max_tokens) if random.random() < ABORTED else -1
            await self._take(await self.client.submit(submit), abort_after)
            index += 1

    def stop(self) -> None:
        """Abort what is still in flight: the time is over."""
        for name in self._in_flight:
            self.client.abort(name)

    async def _take(self, generation: Generation, abort_after: int) -> None:
        self._in_flight.add(generation.sequence_id)
        if abort_after == 0:
            self.client.abort(generation.sequence_id)
        async for output in generation:
            self.num_output_tokens += len(output.token_ids)
            if 0 < abort_after <= output.num_completion_tokens:
                self.client.abort(generation.sequence_id)
            if output.finish_reason is not None:
                self.ended[f"error: {output.error}" if output.error else output.finish_reason] += 1
        self._in_flight.discard(generation.sequence_id)

    def _draw(self, name: str, random: Random) -> Submit:
        domain = random.choice(DOMAINS)
        vocab_size = self.client.ready.vocab_size
        prompt = random.choices(range(vocab_size), k=random.randint(1, PROMPT_TOKENS_MAX))
        if random.random() < 0.5:
            prompt = Random(domain).choices(range(vocab_size), k=ALIKE_TOKENS) + prompt  # noqa: S311
        room = self.client.ready.context_max - OUTPUT_TOKENS_MAX
        sampling = SamplingParams(
            max_tokens=random.randint(1, OUTPUT_TOKENS_MAX),
            temperature=random.choice([0.0, 1.0]),
            seed=random.randrange(2**31),
            ignore_eos=True,
        )
        tier = random.choice(list(TIERS.values()))
        return Submit(name, domain, domain.encode(), prompt[:room], sampling, priority=tier)


async def soak(
    command: Sequence[str],
    environment: Mapping[str, str],
    socket_path: Path,
    *,
    seconds: float,
    concurrency: int,
    seed: int,
    now: Callable[[], float],
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Start the worker, load it, look at what is left, drain it. ``failures`` of the answer is empty if all is well."""
    incidents: list[Incident] = []
    with subprocess.Popen(command, env=dict(environment), stdout=subprocess.DEVNULL) as process:  # noqa: S603, ASYNC220
        try:
            client = await EngineClient.connect(socket_path, on_incident=incidents.append, timeout_s=START_TIMEOUT_S)
            start = Memory.of(process.pid)
            load = Load(client, now() + seconds, now)
            clients = [asyncio.create_task(load.run_client(number, seed)) for number in range(concurrency)]
            await asyncio.sleep(seconds * WARM_SHARE)
            warm = Memory.of(process.pid)
            progress(f"soak: warm after {seconds * WARM_SHARE:.0f} s, {warm.rss_bytes / 2**20:.0f} MiB")
            await asyncio.sleep(seconds * (1 - WARM_SHARE))
            end = Memory.of(process.pid)
            load.stop()
            async with asyncio.timeout(ENDING_TIMEOUT_S):
                await asyncio.gather(*clients)
            num_free = await _settled(client)
            client.drain(1_000)
            async with asyncio.timeout(ENDING_TIMEOUT_S):
                await client.closed.wait()
                await asyncio.to_thread(process.wait)
        finally:
            process.kill()
    answer: dict[str, Any] = {
        "seconds": seconds,
        "concurrency": concurrency,
        "num_requests": load.ended.total(),
        "ended": dict(load.ended),
        "num_output_tokens": load.num_output_tokens,
        "num_blocks": client.ready.num_blocks,
        "num_blocks_free": num_free,
        "num_preemptions": client.stats.num_preemptions if client.stats is not None else 0,
        "num_incidents": len(incidents),
        "rss_start_bytes": start.rss_bytes,
        "rss_warm_bytes": warm.rss_bytes,
        "rss_end_bytes": end.rss_bytes,
        "rss_growth_bytes": end.rss_bytes - warm.rss_bytes,
        "rss_anonymous_bytes": end.anonymous_bytes,
        "rss_files_bytes": end.rss_bytes - end.anonymous_bytes,
        "rss_load_peak_bytes": start.peak_bytes,
        "rss_peak_bytes": end.peak_bytes,
        "exit_code": process.returncode,
    }
    return answer | {"failures": failures(answer)}


def failures(answer: Mapping[str, Any]) -> list[str]:
    found = [f"{num} requests ended with {name}" for name, num in answer["ended"].items() if name.startswith("error")]
    if answer["num_blocks_free"] != answer["num_blocks"]:
        found.append(f"{answer['num_blocks'] - answer['num_blocks_free']} blocks were not given back")
    if answer["seconds"] >= JUDGED_SECONDS and answer["rss_growth_bytes"] > GROWTH_BYTES_MAX:
        found.append(f"memory grew by {answer['rss_growth_bytes']} bytes after the start")
    if answer["num_incidents"]:
        found.append(f"{answer['num_incidents']} incidents")
    if answer["exit_code"] != 0:
        found.append(f"the worker ended with {answer['exit_code']}")
    return found


@dataclass(frozen=True, slots=True)
class Memory:
    """What a process has in memory (Linux): now, the most so far, and of what is there now its own pages; the rest are
    pages of files, which other processes may share."""

    rss_bytes: int
    peak_bytes: int
    anonymous_bytes: int

    @classmethod
    def of(cls, pid: int) -> "Memory":
        values = {}
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ("VmRSS", "VmHWM", "RssAnon"):
                values[name] = int(rest.split()[0]) * 1024
        return cls(values.get("VmRSS", 0), values.get("VmHWM", 0), values.get("RssAnon", 0))


async def _settled(client: EngineClient) -> int:
    """Free blocks once nothing runs, or after SETTLE_TIMEOUT_S whatever is told then."""
    for _ in range(int(SETTLE_TIMEOUT_S / 0.1)):
        await asyncio.sleep(0.1)
        stats = client.stats
        if (
            stats is not None
            and not stats.num_running + stats.num_waiting
            and stats.num_blocks_free == stats.num_blocks
        ):
            break
    return client.stats.num_blocks_free if client.stats is not None else 0
