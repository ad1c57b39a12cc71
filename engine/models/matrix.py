"""The conformance matrix on paper: written by `make models`, never by hand."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from engine.models.served import REFUSED, SERVED

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- matrix: written by make models -->", "<!-- end of matrix -->"
HEADER = '''"""Which architectures of transformers are served, and why the others are not: measured by
engine/models/conformance.py and written by `make models`, not by hand.

SERVED: model_type -> (class, route, what its attention uses, what it promises on native kernels).
REFUSED: model_type -> (class, reason).
"""

'''


class Result(Protocol):
    @property
    def model_type(self) -> str: ...

    @property
    def architecture(self) -> str: ...

    @property
    def route(self) -> str: ...

    @property
    def features(self) -> tuple[str, ...]: ...

    @property
    def isolation(self) -> str: ...

    @property
    def reason(self) -> str: ...


def write(results: Iterable[Result]) -> None:
    """Into engine/models/served.py and docs/models.md."""
    served, refused = {}, {}
    for result in sorted(results, key=lambda result: result.model_type):
        if result.reason:
            refused[result.model_type] = (result.architecture, result.reason)
        else:
            served[result.model_type] = (result.architecture, result.route, result.features, result.isolation)
    lines = [f"    {name!r}: {value!r}," for name, value in served.items()]
    text = HEADER + "SERVED: dict[str, tuple[str, str, tuple[str, ...], str]] = {\n" + "\n".join(lines) + "\n}\n"
    lines = [f"    {name!r}: {value!r}," for name, value in refused.items()]
    text += "REFUSED: dict[str, tuple[str, str]] = {\n" + "\n".join(lines) + "\n}\n"
    (ROOT / "engine/models/served.py").write_text(text)
    page = ROOT / "docs/models.md"
    before, rest = page.read_text().split(BEGIN)
    page.write_text(before + table(served, refused) + rest.split(END)[1])


def table(
    served: dict[str, tuple[str, str, tuple[str, ...], str]] = SERVED, refused: dict[str, tuple[str, str]] = REFUSED
) -> str:
    """The part of docs/models.md between BEGIN and END, with both."""
    num_own = sum(route == "own" for _, route, _, _ in served.values())
    num_exact = sum(isolation == "bitwise" for _, _, _, isolation in served.values())
    counted = f"**{len(served)} of {len(served) + len(refused)} architectures are served**"
    routes = f"{num_own} by the engine's own decoder, {len(served) - num_own} by transformers' code"
    kernels = f"All give transformers' logits on plain torch and on the native kernels; {num_exact} are bitwise there."
    lines = [
        BEGIN,
        "",
        f"{counted}: {routes}. {kernels}",
        "",
        "| model_type | architecture | route | attention uses | on native kernels |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {kind} | {route} | {', '.join(features).replace('_', ' ') or '-'} | {isolation} |"
            for name, (kind, route, features, isolation) in served.items()
        ),
        "",
        f"Not served, {len(refused)}:",
        "",
        "| model_type | architecture | why |",
        "|---|---|---|",
        *(f"| {name} | {kind} | {reason.replace('|', '/')} |" for name, (kind, reason) in refused.items()),
        "",
        END,
    ]
    return "\n".join(lines)
