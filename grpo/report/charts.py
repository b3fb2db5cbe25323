"""Charts: numbers -> inline SVG. Knows nothing of runs.

Colours are classes that the page's style sheet sets, for light and dark. All that is not a number of ours is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 460, 216
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 32
MOST_POINTS = 240  # of a line
DOTS_UP_TO = 40  # points that are drawn as dots too
LARGEST = 1e30  # a larger number is left out: no axis can be made for it
TICKS = 4


@dataclass
class Line:
    """A series of a chart."""

    label: str
    points: Mapping[int, float]  # step -> value
    colour: int = 0  # class c0, c1 ...
    band: Mapping[int, tuple[float, float]] = field(default_factory=dict)  # step -> (low, high), drawn behind the line
    is_thin: bool = False


@dataclass
class Chart:
    """A picture with its title and its legend."""

    title: str
    svg: Markup
    lines: list[Line]
    note: str = ""


def chart(title: str, lines: Sequence[Line], note: str = "", form: str = "g", zero: bool = False) -> Chart | None:
    """Lines over steps; None where there is nothing to draw. form: "%" for shares. zero: the axis begins there."""
    drawn = [(line, _thinned(line)) for line in lines]
    drawn = [(line, points) for line, points in drawn if len(points)]
    if not drawn:
        return None
    ends = np.concatenate([points[:, 1:].ravel() for _, points in drawn])
    ends = ends[np.isfinite(ends)]
    low, high = min(0.0, ends.min()) if zero else ends.min(), ends.max()
    axes = Axes.of([points[0, 0] for _, points in drawn], [points[-1, 0] for _, points in drawn], low, high)
    parts = [axes.grid(form)]
    parts += [_band(axes, line, points) for line, points in drawn if line.band]
    parts += [_line(axes, line, points, form) for line, points in drawn]
    return Chart(title, _svg(title, parts), [line for line, _ in drawn], note)


def stacked(title: str, lines: Sequence[Line], note: str = "") -> Chart | None:
    """Areas one above the other, over the steps that all of them have."""
    lines = [line for line in lines if line.points]
    steps = sorted(set.intersection(*(set(line.points) for line in lines))) if lines else []
    if not steps:
        return None
    total = dict.fromkeys(steps, 0.0)
    drawn = []
    for line in lines:
        below = dict(total)
        for step in steps:
            value = line.points[step]
            total[step] += value if math.isfinite(value) else 0.0
        drawn.append((line, _thinned(Line(line.label, dict(total), band={s: (below[s], total[s]) for s in steps}))))
    axes = Axes.of([steps[0]], [steps[-1]], 0.0, max(total.values()))
    parts = [axes.grid("g"), *(_band(axes, line, points, "area") for line, points in drawn)]
    return Chart(title, _svg(title, parts), lines, note)


def scatter(
    title: str, points: Sequence[tuple[float, float, bool | None]], x_label: str, note: str = ""
) -> Chart | None:
    """(x, y, kind) as dots of three colours."""
    known = [(x, y, kind) for x, y, kind in points if _drawable(x) and _drawable(y)]
    if not known:
        return None
    xs, ys = [x for x, _, _ in known], [y for _, y, _ in known]
    axes = Axes.of([min(xs)], [max(xs)], min(ys), max(ys), x_label)
    dots = "".join(
        f'<circle class="dot {_KINDS[kind]}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="2.6"/>'
        for x, y, kind in known
    )
    return Chart(title, _svg(title, [axes.grid("g"), Markup(dots)]), [], note)


_KINDS = {True: "right", False: "wrong", None: "c0"}


@dataclass(frozen=True)
class Axes:
    """Where numbers are on the picture."""

    first: float
    last: float
    low: float
    high: float
    x_label: str = "step"

    @classmethod
    def of(
        cls, firsts: Sequence[float], lasts: Sequence[float], low: float, high: float, x_label: str = "step"
    ) -> Axes:
        margin = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
        bottom = low if low == 0 else low - margin
        return cls(float(min(firsts)), float(max(lasts)), float(bottom), float(high + margin), x_label)

    def x(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.first) / ((self.last - self.first) or 1.0)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.low) / ((self.high - self.low) or 1.0)

    def grid(self, form: str) -> Markup:
        """Lines at round numbers, and what they are."""
        parts = []
        for value in ticks(self.low, self.high, TICKS):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{y + 3.5:.1f}">{shown(value, form)}</text>')
        for value in ticks(self.first, self.last, 5):
            if value == int(value):
                parts.append(f'<text class="tick mid" x="{self.x(value):.1f}" y="{HEIGHT - 17}">{value:g}</text>')
        parts.append(f'<text class="tick end" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}">{escape(self.x_label)}</text>')
        return Markup("".join(parts))


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low] if math.isfinite(low) else []
    unit = 10.0 ** math.floor(math.log10(span / most))
    step = next(unit * factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= most)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, math.floor(high / step + 1e-9) + 1)]


def shown(value: float, form: str) -> str:
    """A number as a reader wants it."""
    if not math.isfinite(value):
        return "–"
    if form == "%":
        return f"{value:.0%}" if abs(value) >= 0.1 or value == 0 else f"{value:.1%}"
    if form == "%1":
        return f"{value:.1%}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.3g}"


def _thinned(line: Line) -> np.ndarray:
    """[n, 4]: step, value, low, high; means of neighbours where there are more than can be seen."""
    nothing = (math.nan, math.nan)
    rows = [
        (step, value, *line.band.get(step, nothing)) for step, value in sorted(line.points.items()) if _drawable(value)
    ]
    if not rows:
        return np.empty((0, 4))
    array = np.array(rows, dtype=np.float64)
    array[np.abs(array) > LARGEST] = np.nan
    size = -(-len(array) // MOST_POINTS)
    groups = [array[start : start + size] for start in range(0, len(array), size)]
    with np.errstate(all="ignore"):
        return np.array([[_nanmean(group[:, column]) for column in range(4)] for group in groups])


def _nanmean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def _drawable(value: float) -> bool:
    return math.isfinite(value) and abs(value) < LARGEST


def _line(axes: Axes, line: Line, points: np.ndarray, form: str) -> Markup:
    places = [(axes.x(step), axes.y(value), step, value) for step, value, _, _ in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in places)
    thin = " thin" if line.is_thin else ""
    drawn = f'<polyline class="line c{line.colour}{thin}" points="{path}"/>'
    dots = places if len(places) <= DOTS_UP_TO else []
    label = escape(line.label)
    drawn += "".join(
        f'<circle class="dot c{line.colour}" cx="{x:.1f}" cy="{y:.1f}" r="{2 if thin else 2.6}">'
        f"<title>{label}, step {step:g}: {shown(value, form)}</title></circle>"
        for x, y, step, value in dots
    )
    return Markup(drawn)


def _band(axes: Axes, line: Line, points: np.ndarray, kind: str = "band") -> Markup:
    known = points[np.isfinite(points[:, 2:]).all(axis=1)]
    if not len(known):
        return Markup("")
    above = [f"{axes.x(step):.1f},{axes.y(high):.1f}" for step, _, _, high in known]
    below = [f"{axes.x(step):.1f},{axes.y(low):.1f}" for step, _, low, _ in known[::-1]]
    return Markup(f'<polygon class="{kind} c{line.colour}" points="{" ".join([*above, *below])}"/>')


def _svg(title: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, title, Markup("").join(parts)
    )
