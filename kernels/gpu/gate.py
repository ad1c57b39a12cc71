"""`python -m kernels.gpu.gate`: compile every kernel for every GPU, without a GPU, and hold the result to the table in
docs/kernels.md. `make kernels` runs it.

    compiles · no stack, no local loads or stores (spills), no scratch memory · registers and shared memory no more than
    the table's · the table's matrix instruction · as many instructions as the table has, within 5 %

--write puts what was found into the table; --quick compiles the few that `make test` looks at, --only NAME those whose
names begin so (all of them: three minutes). A run ends with 0 where
all holds and prints one line for each thing that does not.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.gpu.launch import is_interpreted
from kernels.gpu.variants import CAPABILITIES, Variant, variants

PAGE = Path(__file__).parents[2] / "docs/kernels.md"
BEGIN, END = "<!-- table: written by make kernels -->", "<!-- end of table -->"
SLACK = 0.05  # of the number of instructions
SHARED_MAX = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # bytes of one program, CUDA guide
MATRIX = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")  # in PTX; as SASS: UTCHMMA, HGMMA, HMMA
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True, slots=True)
class Compiled:
    name: str
    capability: int
    registers: int  # of a thread
    shared: int  # bytes
    matrix: str  # in PTX, empty where there is none
    instructions: int  # SASS
    stack: int = 0  # bytes
    spills: int = 0  # SASS loads and stores of local memory
    scratch: int = 0  # bytes of global memory that a launch would have to find

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.capability


def compile_variant(variant: Variant, capability: int) -> Compiled:
    """Raises what Triton raises where it does not compile."""
    names = variant.kernel.arg_names
    assert {*variant.types, *variant.constants} == {*names}, f"{variant.name}: {names}"
    source = ASTSource(
        variant.kernel,
        {name: variant.types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in variant.constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name, kind in variant.types.items() if kind[0] == "*"},
    )
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=variant.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        code = tool("nvdisasm", "-c", file.name)
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", code, re.MULTILINE)
    ptx = built.asm["ptx"]
    return Compiled(
        variant.name,
        capability,
        used["REG"],
        built.metadata.shared,
        next((name for name in MATRIX if name in ptx), ""),
        len(opcodes),
        used["STACK"] + used["LOCAL"],
        sum(opcode in ("STL", "LDL") for opcode in opcodes),
        built.metadata.global_scratch_size,
    )


def tool(name: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True, timeout=120)  # noqa: S603
    return done.stdout


def faults(found: Compiled, known: Compiled | None, *, multiplies: bool) -> list[str]:
    """What is wrong with a kernel, beside the table's line for it."""
    wrong = []
    if found.stack or found.spills:
        wrong.append(f"spills: {found.stack} bytes of stack, {found.spills} local loads and stores")
    if found.scratch:
        wrong.append(f"{found.scratch} bytes of scratch memory: a CUDA graph could not launch it again")
    if found.shared > SHARED_MAX[found.capability]:
        wrong.append(f"{found.shared} bytes of shared memory, the GPU has {SHARED_MAX[found.capability]}")
    if multiplies and not found.matrix:
        wrong.append("no matrix instruction")
    if known is None:
        return [*wrong, "the table does not have it"]
    if found.registers > known.registers:
        wrong.append(f"{found.registers} registers, the table has {known.registers}")
    if found.shared > known.shared:
        wrong.append(f"{found.shared} bytes of shared memory, the table has {known.shared}")
    if found.matrix != known.matrix:
        wrong.append(f"matrix instruction {found.matrix or 'none'}, the table has {known.matrix or 'none'}")
    if abs(found.instructions - known.instructions) > SLACK * known.instructions:
        wrong.append(f"{found.instructions} instructions, the table has {known.instructions}")
    return wrong


def table(compiled: Iterable[Compiled]) -> str:
    """The page's part between BEGIN and END, with both."""
    lines = [
        BEGIN,
        "",
        f"Triton {triton.__version__} and its own ptxas. No kernel has a stack or a spill.",
        "",
        "| kernel | GPU | registers | shared bytes | matrix instruction | instructions |",
        "|---|---|---|---|---|---|",
        *(
            f"| {one.name} | sm_{one.capability} | {one.registers} | {one.shared} | {one.matrix or '-'} "
            f"| {one.instructions} |"
            for one in sorted(compiled, key=lambda one: one.key)
        ),
        "",
        END,
    ]
    return "\n".join(lines)


def read(page: str) -> tuple[str, dict[tuple[str, int], Compiled]]:
    """Triton's version and the lines of a page's table."""
    part = page.split(BEGIN)[1].split(END)[0]
    version = re.search(r"^Triton (\S+) and", part, re.MULTILINE)
    lines = re.findall(r"^\| (.+?) \| sm_(\d+) \| (\d+) \| (\d+) \| (\S+) \| (\d+) \|$", part, re.MULTILINE)
    known = [
        Compiled(name, int(capability), int(registers), int(shared), matrix.removesuffix("-"), int(instructions))
        for name, capability, registers, shared, matrix, instructions in lines
    ]
    return version.group(1) if version else "", {one.key: one for one in known}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="kernels.gpu.gate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="rewrite the table in docs/kernels.md")
    parser.add_argument("--quick", action="store_true", help="only the kernels of `make test`")
    parser.add_argument("--only", default="", help="only the kernels whose names begin so")
    options = parser.parse_args(arguments)
    is_whole = not (options.quick or options.only)
    if options.write and not is_whole:
        parser.error("a table is written whole")
    assert not is_interpreted(), "unset TRITON_INTERPRET: interpreted kernels cannot be compiled"
    page = PAGE.read_text()
    version, known = read(page)
    if version != triton.__version__ and not options.write:
        say(f"the table is of Triton {version}, this is {triton.__version__}: look at make kernels-write")
        return 1
    compiled, num_wrong = [], 0
    for capability in CAPABILITIES:
        for variant in variants(capability):
            if (options.quick and not variant.is_quick) or not variant.name.startswith(options.only):
                continue
            found = compile_variant(variant, capability)
            compiled.append(found)
            line = None if options.write else known.get(found.key)
            wrong = faults(found, line, multiplies=variant.multiplies)
            if options.write:
                wrong.remove("the table does not have it")
            num_wrong += bool(wrong)
            say(f"{'  ' if not wrong else '! '}sm_{capability} {variant.name}: {'; '.join(wrong) or 'ok'}")
    if options.write and not num_wrong:
        before, rest = page.split(BEGIN)
        PAGE.write_text(before + table(compiled) + rest.split(END)[1])
    elif is_whole and not options.write:
        for key in known.keys() - {one.key for one in compiled}:
            num_wrong += 1
            say(f"! sm_{key[1]} {key[0]}: in the table, and no kernel of ours")
    say(f"{len(compiled)} compiled, {num_wrong} not as they should be")
    return int(num_wrong > 0)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
