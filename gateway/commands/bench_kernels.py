"""bulkhead bench kernels: the CPU kernels beside plain torch, measured in a process of their own: this one never
imports torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gateway.commands.session import CommandError

TIMEOUT_S = 1_800
TIMES = {"ours us": "ours_us", "inside us": "library_us", "twin us": "twin_us", "torch us": "torch_us"}


def bench_kernels(
    threads: Annotated[int, typer.Option(min=1, max=256, help="threads of the kernels and of torch")] = 1,
    rows: Annotated[str, typer.Option(help="numbers of rows, with commas")] = "1,8,32,256",
    context: Annotated[int, typer.Option(min=1, help="tokens of each decode row")] = 300,
    chunk: Annotated[int, typer.Option(min=1, help="tokens of a prefill chunk")] = 512,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="the best of so many")] = 7,
    json_file: Annotated[Path | None, typer.Option("--json", help="write every figure here")] = None,
) -> None:
    """Time, bytes and bandwidth of every CPU kernel, beside its twin and torch's own op; where there is a GPU, of its
    kernels, beside their floors."""
    command = [sys.executable, "-m", "kernels.bench", "--num-threads", str(threads), "--rows", rows]
    command += ["--context", str(context), "--chunk", str(chunk), "--rounds", str(rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=False)  # noqa: S603
    if done.returncode:
        raise CommandError("the kernels could not be measured; the reason stands above")
    result = json.loads(done.stdout)
    if json_file is not None:
        json_file.write_text(done.stdout)
    console = Console()
    console.print(
        f"{result['kernels']}, {result['num_threads']} threads, copy bandwidth {result['copy_gb_per_s']} GB/s"
    )
    console.print(table_of(result["figures"]))
    console.print(steps_table(result["steps"]))
    prefill = result["chunk"]
    console.print(
        f"one layer of a chunk of {prefill['tokens']} tokens: "
        f"attention {prefill['attention_us']:,.0f} us, products {prefill['products_us']:,.0f} us"
    )
    if result["gpu"] is not None:
        console.print(result["gpu"]["device"])
        console.print(gpu_table(result["gpu"]["figures"]))


def steps_table(steps: list[dict[str, Any]]) -> Table:
    """Milliseconds of a whole step that are not products or attention: what norms, rope and activation add to the calls
    that they are part of, and what they take apart."""
    parts = {"norms": "norms_ms", "rope": "rope_ms", "activation": "activation_ms", "together": "together_ms"}
    parts |= {"inside": "library_ms", "norms apart": "norms_apart_ms", "rope apart": "rope_apart_ms"}
    parts |= {"activation apart": "activation_apart_ms", "warm": "warm_ms"}
    parts |= {"step": "step_ms", "step apart": "step_apart_ms"}
    table = Table("rows of a step", *(f"{name} ms" for name in parts), box=None)
    for step in steps:
        table.add_row(str(step["rows"]), *(f"{step[key]:.2f}" for key in parts.values()))
    return table


def gpu_table(figures: list[dict[str, Any]]) -> Table:
    table = Table("model", "step", "op", "case", "median us", "MB", "GB/s", "TFLOP/s", "floor us", "of floor", box=None)
    for figure in figures:
        has_floor = figure["floor_us"] is not None
        table.add_row(
            *(figure[name] for name in ("model", "step", "op", "case")),
            f"{figure['median_us']:,.1f}",
            f"{figure['bytes'] / 1e6:.2f}",
            f"{figure['gb_per_s']:,.0f}",
            f"{figure['tflop_per_s']:.1f}",
            f"{figure['floor_us']:,.1f}" if has_floor else "-",
            f"{figure['of_floor']:.0%}" if has_floor else "-",
        )
    return table


def table_of(figures: list[dict[str, Any]]) -> Table:
    table = Table("op", "case", *TIMES, "MB", "GB/s", "of copy", "GFLOP/s", box=None)
    for figure in figures:
        times = [f"{figure[name]:,.1f}" for name in TIMES.values()]
        table.add_row(
            figure["op"],
            figure["case"],
            *times,
            f"{figure['bytes'] / 1e6:.2f}",
            f"{figure['gb_per_s']:.1f}",
            f"{figure['copy_share']:.0%}",
            f"{figure['gflop_per_s']:.1f}",
        )
    return table
