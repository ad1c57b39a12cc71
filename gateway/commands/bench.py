"""bulkhead bench gateway: load on a running server, measured from outside. Bounded in count and time; stops by
itself."""

import http.client
import json
import ssl
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from gateway.commands.bench_engine import bench_engine
from gateway.commands.bench_isolation import bench_isolation
from gateway.commands.bench_scheduling import bench_fairness, bench_policies
from gateway.commands.bench_soak import bench_soak
from gateway.commands.session import CommandError

app = typer.Typer(no_args_is_help=True, help="Measure a running server, or the engine alone.")
app.command("engine")(bench_engine)
app.command("policies")(bench_policies)
app.command("fairness")(bench_fairness)
app.command("isolation")(bench_isolation)
app.command("soak")(bench_soak)

PROMPT = "Write a short story about a lighthouse keeper and the sea. Part {number}."
REQUEST_TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class Sample:
    """One streamed request. Times in milliseconds, as a client sees them."""

    ttft_ms: float  # from sending the request to the first text
    total_ms: float
    num_prompt_tokens: int
    num_completion_tokens: int
    num_body_bytes: int  # of the answer, padding included

    @property
    def tpot_ms(self) -> float:
        """Time per output token after the first."""
        return (self.total_ms - self.ttft_ms) / max(1, self.num_completion_tokens - 1)


@app.command("gateway")
def bench_gateway(
    key: Annotated[str, typer.Option(envvar="BULKHEAD_KEY", help="API key of the tenant that pays for the run")],
    ca: Annotated[Path, typer.Option(help="certificate authority to trust")] = Path("data/tls/ca.pem"),
    url: Annotated[str, typer.Option(help="the server")] = "https://127.0.0.1:8443",
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="requests in flight")] = 8,
    requests: Annotated[int, typer.Option(min=1, max=100_000, help="requests in all")] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, help="output tokens of each")] = 64,
    covered: Annotated[bool, typer.Option("--covered", help="ask for streams that hide their tokens' lengths")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write every sample and the summary here")] = None,
) -> None:
    """Stream chat completions through the whole way of a request and report rates and latencies."""
    target = Target(url, key, ca)
    model = target.model()
    started = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        work = pool.map(lambda number: target.stream(model, number, max_tokens, covered), range(requests))
        samples = list(track(work, total=requests, description="requests", console=Console(stderr=True)))
    wall_s = time.perf_counter() - started
    summary = summarise(samples, wall_s) | {"concurrency": concurrency, "max_tokens": max_tokens, "model": model}
    summary |= {"covered": covered}
    if json_file is not None:
        json_file.write_text(json.dumps({"summary": summary, "samples": [asdict(s) for s in samples]}, indent=1))
    table = Table("figure", "value", box=None)
    for name, value in summary.items():
        table.add_row(name, str(value))
    Console().print(table)


def summarise(samples: Sequence[Sample], wall_s: float) -> dict[str, Any]:
    """Rates over the whole run; medians and 99th percentiles over its requests."""
    ttft, tpot = [s.ttft_ms for s in samples], [s.tpot_ms for s in samples]
    num_completion_tokens = sum(s.num_completion_tokens for s in samples)
    return {
        "num_requests": len(samples),
        "wall_s": round(wall_s, 2),
        "requests_per_s": round(len(samples) / wall_s, 2),
        "output_tokens_per_s": round(num_completion_tokens / wall_s, 1),
        "num_prompt_tokens": sum(s.num_prompt_tokens for s in samples),
        "num_completion_tokens": num_completion_tokens,
        "body_bytes_per_token": round(sum(s.num_body_bytes for s in samples) / max(1, num_completion_tokens)),
        "ttft_p50_ms": round(statistics.median(ttft), 1),
        "ttft_p99_ms": round(percentile(ttft, 99), 1),
        "tpot_p50_ms": round(statistics.median(tpot), 1),
        "tpot_p99_ms": round(percentile(tpot, 99), 1),
    }


def percentile(values: Sequence[float], percent: int) -> float:
    """Nearest rank: the smallest value that at least `percent` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


class Target:
    """A server and the key to use on it; one connection per request, as short-lived clients make them."""

    def __init__(self, url: str, key: str, ca: Path) -> None:
        parts = urlsplit(url)
        if parts.scheme != "https" or parts.hostname is None:
            raise CommandError(f"--url {url!r} must be https://host:port")
        if not ca.is_file():
            raise CommandError(f"there is no certificate authority at {ca}: point --ca at the server's data/tls/ca.pem")
        self._host, self._port = parts.hostname, parts.port or 443
        self._context = ssl.create_default_context(cafile=str(ca))
        self._headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}

    def model(self) -> str:
        connection = self._connect()
        try:
            connection.request("GET", "/v1/models", headers=self._headers)
            answer = _checked(connection.getresponse())
            return str(json.loads(answer.read())["data"][0]["id"])
        except OSError as error:
            raise CommandError(
                f"{self._host}:{self._port} does not answer ({error}): is the server running?"
            ) from error
        finally:
            connection.close()

    def stream(self, model: str, number: int, max_tokens: int, covered: bool) -> Sample:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": PROMPT.format(number=number)}],
            "max_tokens": max_tokens,
            "temperature": 1.0,
            "seed": number,
            "stream": True,
            "stream_options": {"include_usage": True, "include_obfuscation": covered},
        }
        num_body_bytes = 0
        connection = self._connect()
        started = time.perf_counter()
        first = None
        usage: dict[str, int] = {}
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), self._headers)
            for line in _checked(connection.getresponse()):
                num_body_bytes += len(line)
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise CommandError(f"request {number} broke: {event['error']['message']}")
                if first is None and event["choices"] and event["choices"][0]["delta"].get("content"):
                    first = time.perf_counter()
                usage = event.get("usage") or usage
        finally:
            connection.close()
        ended = time.perf_counter()
        return Sample(
            ttft_ms=((first or ended) - started) * 1_000,
            total_ms=(ended - started) * 1_000,
            num_prompt_tokens=usage["prompt_tokens"],
            num_completion_tokens=usage["completion_tokens"],
            num_body_bytes=num_body_bytes,
        )

    def _connect(self) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(self._host, self._port, timeout=REQUEST_TIMEOUT_S, context=self._context)


def _checked(answer: http.client.HTTPResponse) -> http.client.HTTPResponse:
    if answer.status != 200:
        raise CommandError(f"the server answered {answer.status}: {answer.read(2_000).decode(errors='replace')}")
    return answer
