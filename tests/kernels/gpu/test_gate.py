"""The gate for kernels that no GPU runs here: what it lets through, and what it does not."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kernels.gpu.gate import PAGE, SLACK, Compiled, faults, read, table
from kernels.gpu.roofline import GPUS, LOADS, after_layers, layer
from kernels.gpu.roofline import table as roofline_table
from kernels.gpu.variants import CAPABILITIES, LLAMA_8B, variants

ROOT = Path(__file__).parents[3]
GOOD = Compiled("kernel of a test", 90, 100, 4096, "wgmma.mma_async", 1000)


def gate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kernels.gpu.gate", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_attention_compiles_for_every_gpu_as_the_table_says() -> None:
    done = gate("--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(CAPABILITIES)} compiled, 0 not" in done.stdout


@pytest.mark.deep
def test_every_kernel_compiles_for_every_gpu_as_the_table_says() -> None:
    done = gate()
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("found", "known", "said"),
    [
        (GOOD, GOOD, []),
        (replace(GOOD, instructions=1000 + int(SLACK * 1000)), GOOD, []),
        (replace(GOOD, instructions=1001 + int(SLACK * 1000)), GOOD, ["instructions"]),
        (replace(GOOD, instructions=900), GOOD, ["instructions"]),
        (replace(GOOD, registers=101), GOOD, ["registers"]),
        (replace(GOOD, registers=90, shared=4000), GOOD, []),
        (replace(GOOD, shared=4097), GOOD, ["shared memory"]),
        (replace(GOOD, stack=8), GOOD, ["spills"]),
        (replace(GOOD, spills=1), GOOD, ["spills"]),
        (replace(GOOD, scratch=128), GOOD, ["scratch memory"]),
        (replace(GOOD, matrix="mma.sync"), GOOD, ["matrix instruction"]),
        (replace(GOOD, matrix=""), GOOD, ["no matrix instruction", "matrix instruction none"]),
        (replace(GOOD, shared=1 << 20), replace(GOOD, shared=1 << 20), ["the GPU has"]),
        (GOOD, None, ["does not have it"]),
    ],
)
def test_the_gate_says_what_is_wrong(found: Compiled, known: Compiled | None, said: list[str]) -> None:
    wrong = faults(found, known, multiplies=True)
    assert len(wrong) == len(said)
    assert all(words in line for words, line in zip(said, wrong, strict=True))


def test_the_table_reads_back() -> None:
    lines = [GOOD, replace(GOOD, name="another", capability=120, matrix="")]
    version, known = read(f"before\n{table(lines)}\nafter")
    assert version
    assert sorted(known.values(), key=lambda one: one.name) == sorted(lines, key=lambda one: one.name)


def test_the_page_has_every_kernel_on_every_gpu() -> None:
    page = PAGE.read_text()
    _, known = read(page)
    assert set(known) == {(one.name, capability) for capability in CAPABILITIES for one in variants(capability)}
    assert roofline_table() in page


def test_floors_are_those_counted_by_hand() -> None:
    decode, prefill = ({work.op: work for work in layer(LLAMA_8B, load)} for load in LOADS)
    assert decode["matmul down"].bytes == 2 * (14336 * 4096 + 32 * (14336 + 4096))
    assert decode["matmul down"].flop == 2 * 32 * 14336 * 4096
    # 32 rows, 2048 keys and values of 8 heads of 128; each is met by 4 query heads, twice, a product and a sum each
    assert decode["paged_attention"].flop == 32 * 2048 * 8 * 128 * 4 * 2 * 2
    assert decode["paged_attention"].bytes == 32 * 2048 * 2 * 8 * 128 * 2 + 32 * 64 * 12 + 2 * 32 * 32 * 128 * 2
    assert prefill["paged_attention"].flop == 4 * 32 * 128 * (2048 * 2049 // 2)
    head, best = after_layers(LLAMA_8B, LOADS[0])
    assert head.bytes == 2 * 128256 * 4096 + 32 * 4096 * 2 + 32 * 128256 * 4
    assert head.flop == 2 * 32 * 4096 * 128256
    assert best.bytes == 32 * 128256 * 4
    assert decode["matmul down"].floor_us(GPUS[0]) == pytest.approx(1e6 * decode["matmul down"].bytes / 2.039e12)
