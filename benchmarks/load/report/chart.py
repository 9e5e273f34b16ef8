"""Line charts as SVG elements, in the colours of the page that contains them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 12, 44
TICKS = 5
COLORS = 6

Points = Sequence[tuple[float, float]]


class Series(NamedTuple):
    """A line of a chart: its name, and its points as (x, y)."""

    name: str
    points: Points


class Scale:
    """Maps values to pixels."""

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool) -> None:
        """Span all values, from 0, or on a logarithmic scale from the power of ten below them.

        Args:
            values: The values to show.
            start: Pixel of the lowest tick.
            end: Pixel of the highest tick.
            log: Whether the scale is logarithmic.
        """
        self._log, self._start, self._end = log, start, end
        top = max(values)
        if log:
            low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(top))
            self.ticks = [10.0**power for power in range(low, max(high, low + 1) + 1)]
        else:
            step = _round_up(top / TICKS)
            self.ticks = [step * number for number in range(math.ceil(top / step) + 1)]

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high = self._place(self.ticks[0]), self._place(self.ticks[-1])
        return self._start + (self._end - self._start) * (self._place(value) - low) / (high - low)

    def _place(self, value: float) -> float:
        return math.log10(value) if self._log else value


def draw(title: str, x_label: str, y_label: str, series: Sequence[Series], log: bool = False) -> str:
    """Return a chart as an `svg` element; empty if there is nothing to draw.

    Args:
        title: Label for screen readers.
        x_label: Label of the horizontal axis.
        y_label: Label of the vertical axis.
        series: The lines; their classes are `line-0` to `line-5` in turn, for the page to colour.
        log: Whether the vertical axis is logarithmic; its values must be above 0 then.
    """
    series = [line for line in series if line.points]
    xs, ys = ([point[axis] for line in series for point in line.points] for axis in (0, 1))
    if not xs or not max(xs) or not max(ys):
        return ""
    across = Scale(xs, LEFT, WIDTH - RIGHT, log=False)
    up = Scale(ys, HEIGHT - BOTTOM, TOP, log=log)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in up.ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {up.at(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{up.at(tick) + 4:.1f}" text-anchor="end">{tick:,g}</text>')
    for tick in across.ticks:
        parts.append(f'<path class="grid" d="M{across.at(tick):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text x="{across.at(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:,g}</text>'
        )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    parts.append(f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    for number, (name, points) in enumerate(series):
        places = [(across.at(x), up.at(y)) for x, y in points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<g class="line-{number % COLORS}"><path class="line" d="M{path}"/>')
        for (x, y), (at_x, at_y) in zip(points, places, strict=True):
            tip = f"{name}: {y:,.4g} at {x:,.4g}"
            parts.append(f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="3.5"><title>{escape(tip)}</title></circle>')
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def _round_up(step: float) -> float:
    """Return the next higher of 1, 2, 5, 10, and so on, times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= step * (1 - 1e-9))
