import re

from hypothesis import given
from hypothesis import strategies as st

from gateway.admin.chart import BAR_GAP, BAR_WIDTH, HEIGHT, KINDS, Bar, stacked_bars

counts = st.integers(0, 10**12)
bars = st.lists(st.builds(Bar, st.just("18:42"), counts, counts, counts), max_size=60)
RECTANGLE = re.compile(rf"M(\d+) (\d+)h{BAR_WIDTH - BAR_GAP}v(\d+)h-{BAR_WIDTH - BAR_GAP}z")


def rectangles(path: str) -> list[tuple[int, int, int]]:
    """(x, top, height) of every rectangle; fails when the path holds anything else."""
    found = RECTANGLE.findall(path)
    assert "".join(f"M{x} {y}h4v{h}h-4z" for x, y, h in found) == path
    return [(int(x), int(y), int(h)) for x, y, h in found]


@given(bars)
def test_bars_stay_in_their_box_and_nothing_that_exists_is_invisible(bars: list[Bar]) -> None:
    chart = stacked_bars(bars, subject="acme")
    assert chart.peak == max((bar.total for bar in bars), default=0)
    drawn = {kind: {x // BAR_WIDTH: (y, h) for x, y, h in rectangles(chart.paths[kind])} for kind in KINDS}
    for index, bar in enumerate(bars):
        bottom = HEIGHT
        for kind in KINDS:
            if index in drawn[kind]:
                top, height = drawn[kind][index]
                assert top + height == bottom, "parts of a bar touch and never overlap"
                assert top >= 0
                assert getattr(bar, kind) > 0
                bottom = top
        assert (bottom < HEIGHT) == (bar.total > 0)


@given(st.integers(1, 10**12), st.integers(1, 60))
def test_equal_minutes_have_equal_bars(value: int, number: int) -> None:
    heights = {h for _, _, h in rectangles(stacked_bars([Bar("", value)] * number, subject="").paths["completion"])}
    assert heights == {HEIGHT}


def test_the_title_says_what_is_seen() -> None:
    chart = stacked_bars([Bar("18:01", 1, 2, 3), Bar("18:02", 1000, 200, 34)], subject="acme")
    assert chart.title == "acme: 1,240 tokens in the last 2 minutes, most in the minute from 18:02 UTC (1,234)."
    assert stacked_bars([Bar("18:01")] * 60, subject="acme").title == "acme: no tokens in the last 60 minutes."
