"""Stacked bars as SVG, made on the server: integers in, path data out. No library, no script, no inline style.

A chart is one <path> per kind of token, so that a live update is three attributes. Colours come from the style
sheet (class ``bar-prompt`` and so on), text for those who do not see it from ``Chart.title`` and from the table
that the page offers beside it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

KINDS = ("completion", "prompt", "cached")  # from the bottom of the stack to its top
LABELS = {"completion": "Completion", "prompt": "Prompt, computed", "cached": "Prompt, from cache"}
BAR_WIDTH = 5  # of which BAR_GAP stay empty
BAR_GAP = 1
HEIGHT = 100  # units of the view box; the style sheet decides the pixels
VISIBLE_MIN = 3  # a bar that is not zero is never invisible


@dataclass(frozen=True, slots=True)
class Bar:
    """One minute: counts that do not overlap (`prompt` leaves out what came from the cache)."""

    label: str  # "18:42"
    completion: int = 0
    prompt: int = 0
    cached: int = 0

    @property
    def total(self) -> int:
        return self.completion + self.prompt + self.cached


@dataclass(frozen=True, slots=True)
class Chart:
    bars: tuple[Bar, ...]
    title: str  # one sentence that says what the picture shows
    paths: Mapping[str, str]  # kind -> path data; empty where there is nothing to draw
    peak: int  # the tallest bar's tokens

    @property
    def width(self) -> int:
        return len(self.bars) * BAR_WIDTH

    @property
    def height(self) -> int:
        return HEIGHT


def stacked_bars(bars: Sequence[Bar], *, subject: str) -> Chart:
    """A chart of tokens per bar. `subject` says whose: "acme", "all tenants"."""
    peak = max((bar.total for bar in bars), default=0)
    paths: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for index, bar in enumerate(bars):
        bottom = HEIGHT
        for kind in KINDS:
            height = _height(getattr(bar, kind), peak, room=bottom)
            if height:
                bottom -= height
                paths[kind].append(
                    f"M{index * BAR_WIDTH} {bottom}h{BAR_WIDTH - BAR_GAP}v{height}h-{BAR_WIDTH - BAR_GAP}z"
                )
    return Chart(
        bars=tuple(bars),
        title=_title(bars, peak, subject),
        paths={kind: "".join(pieces) for kind, pieces in paths.items()},
        peak=peak,
    )


def _height(value: int, peak: int, *, room: int) -> int:
    if value == 0:
        return 0
    return min(room, max(VISIBLE_MIN, value * HEIGHT // peak))


def _title(bars: Sequence[Bar], peak: int, subject: str) -> str:
    if peak == 0:
        return f"{subject}: no tokens in the last {len(bars)} minutes."
    tallest = max(bars, key=lambda bar: bar.total)
    total = sum(bar.total for bar in bars)
    return (
        f"{subject}: {total:,} tokens in the last {len(bars)} minutes, "
        f"most in the minute from {tallest.label} UTC ({peak:,})."
    )
