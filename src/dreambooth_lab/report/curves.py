"""Curves as inline SVG: nothing to load, sharp at any width."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

Series = list[tuple[float, float]]

WIDTH, HEIGHT, TOP, BOTTOM = 1000, 240, 10, 210  # of the drawing, in its own units


class Line(NamedTuple):
    points: Series
    style: str  # a class of the page's stylesheet
    name: str = ""  # for the legend


class Frame(NamedTuple):
    """What the axes span."""

    left: float
    right: float
    low: float
    high: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.left) / ((self.right - self.left) or 1)
        return WIDTH * across, BOTTOM - (BOTTOM - TOP) * (y - self.low) / ((self.high - self.low) or 1)


def chart(
    caption: str, lines: Sequence[Line], *, from_zero: bool = False, level: float | None = None, mark: float | None = None
) -> str:
    """A figure of lines in one frame.

    Args:
        from_zero: the y axis begins at 0 and the x axis too.
        level: a dashed horizontal line, the reference.
        mark: x of a vertical line, the choice.
    """
    frame = _frame(lines, from_zero, level)
    drawn = "".join(f'<path class="{line.style}" d="{path(line.points, frame)}"/>' for line in lines)
    if level is not None:
        y = frame.at(frame.left, level)[1]
        drawn += f'<path class="level" d="M0 {y:.1f}L{WIDTH} {y:.1f}"/>'
    if mark is not None:
        x = frame.at(mark, frame.low)[0]
        drawn += f'<path class="mark" d="M{x:.1f} {TOP}L{x:.1f} {BOTTOM}"/>'
    for y, text in ((TOP + 16, frame.high), (BOTTOM - 4, frame.low)):
        drawn += f'<text x="4" y="{y}">{text:.3g}</text>'
    for x, anchor, text in ((4, "start", frame.left), (WIDTH - 4, "end", frame.right)):
        drawn += f'<text x="{x}" y="{HEIGHT - 8}" text-anchor="{anchor}">{text:,g}</text>'
    legend = "".join(f'<span class="key {line.style}">{escape(line.name)}</span>' for line in lines if line.name)
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(caption)}">{drawn}</svg>'
    return f"<figure>{picture}<figcaption>{escape(caption)} {legend}</figcaption></figure>"


def smoothed(points: Series) -> Series:
    """A running mean over a twentieth of the points."""
    share, mean, smooth = min(1.0, 20 / len(points)), points[0][1], []
    for x, value in points:
        mean += share * (value - mean)
        smooth.append((x, mean))
    return smooth


def _frame(lines: Sequence[Line], from_zero: bool, level: float | None) -> Frame:
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points if y == y] + ([] if level is None else [level]) or [0.0]
    if from_zero:
        return Frame(0, max(xs), 0, max(ys) or 1.0)
    return Frame(min(xs), max(xs), min(ys), max(ys))


def path(points: Series, frame: Frame) -> str:
    """The line's path; values that are no numbers are left out, and a single point becomes a short stroke."""
    places = [frame.at(x, y) for x, y in points if y == y]
    if not places:
        return ""
    if len(places) == 1:
        places.append((places[0][0] + 4, places[0][1]))
    move = f"M{places[0][0]:.1f} {places[0][1]:.1f}"
    return move + "".join(f"L{x:.1f} {y:.1f}" for _, (x, y) in pairwise(places))
