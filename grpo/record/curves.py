"""curves.png: a run at a glance. Reads metrics.jsonl, so that it can be drawn again at any time.

Knows nothing of the run that writes the file. Drawn without pyplot, which keeps global state.
"""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter
from numpy.typing import NDArray

from grpo.errors import UserError
from grpo.metrics import HEADLINES, is_share
from grpo.record.jsonl import read_metrics
from grpo.record.names import in_lines, told_apart
from grpo.record.sinks import Numbers, Sink
from grpo.types import Group

_INK = "#22262e"
_MAIN, _SECOND = "#1f5fbf", "#d9622b"
_PARTS = ("#d9622b", "#2a9d6f", "#8a5bc4", "#c9a227", "#5aa9c7", "#b5487a", "#7a7f87", "#6b8e23")
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#b8bdc7",
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e8eaee",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
}

_SELDOM = 10.0  # seconds: drawing takes a third of one
_WIDEST_LABEL = 16  # cells of a line of a reward's name beside its curve
_MOST_POINTS = 2000  # of a curve
_LARGEST_DRAWN = 1e30  # a larger number is left out: no axis can be made for it
_DASHES = ("-", "--", ":")  # solid until the colours are used up
_LEGEND_LINES = 13  # that fit beside a panel at the usual size

Points = dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]  # {metric: (steps [n], values [n])}


class Curves(Sink):
    """Draws the picture with a held-out score, but not all the time, and when the run is over."""

    def __init__(self, metrics_path: Path, out_png: Path, tell: Callable[[str], object]):
        self._metrics_path, self._out_png, self._tell = metrics_path, out_png, tell
        self._last = time.monotonic()

    def evaluation(self, step: int, scores: Numbers, groups: Sequence[Group] = ()) -> None:
        if time.monotonic() - self._last > _SELDOM:
            self._draw()
            self._last = time.monotonic()

    def close(self) -> None:
        self._draw()

    def _draw(self) -> None:
        # A picture is no reason to stop: it can be drawn again at any time.
        try:
            draw_curves(self._metrics_path, self._out_png)
        except (UserError, FileNotFoundError, PermissionError) as error:
            self._tell(f"note: curves.png is not drawn. {error}")


def draw_curves(metrics_path: Path, out_png: Path) -> None:
    """Draw the metrics of a run, if it has any; the old picture stands until the new one is whole."""
    curves = _read_curves(metrics_path)
    if not curves:
        return
    with matplotlib.rc_context(_STYLE):
        # Placed by hand: a layout engine would take longer than the drawing itself.
        figure = Figure(figsize=(11, 6.2))
        above = figure.add_gridspec(1, 2, left=0.045, right=0.885, top=0.945, bottom=0.55, wspace=0.46)
        below = figure.add_gridspec(1, 4, left=0.045, right=0.985, top=0.425, bottom=0.085, wspace=0.52)
        for panel, draw in zip([*above, *below], _PANELS, strict=True):
            axes = figure.add_subplot(panel)
            axes.set_xlabel("step", labelpad=2)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
            draw(axes, curves)
            axes.set_xlim(*_span(curves))
        partial = out_png.with_name(out_png.name + ".partial")
        partial.unlink(missing_ok=True)  # a link would lead out of the run's folder
        with warnings.catch_warnings():
            # A letter that the font lacks is drawn as a box; that is no news in the middle of a run.
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            figure.savefig(partial, format="png", dpi=130)
    os.replace(partial, out_png)


def _read_curves(metrics_path: Path) -> Points:
    points: dict[str, list[tuple[float, float]]] = {}
    for step, record in read_metrics(metrics_path):
        for name, value in record.items():
            drawn = np.nan if value is None or abs(value) > _LARGEST_DRAWN else value
            points.setdefault(name, []).append((step, drawn))
    columns = {name: _thinned(np.array(pairs, dtype=np.float64).T) for name, pairs in points.items()}
    return {name: (steps, values) for name, (steps, values) in columns.items()}


def _thinned(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """[2, n] -> [2, at most _MOST_POINTS]: means of neighbours, NaN left out, where there are more than can be seen."""
    size = -(-columns.shape[1] // _MOST_POINTS)
    starts = np.arange(0, columns.shape[1], size)
    known = np.isfinite(columns)
    counts = np.add.reduceat(known.astype(np.float64), starts, axis=1)
    totals = np.add.reduceat(np.where(known, columns, 0.0), starts, axis=1)
    return np.divide(totals, counts, out=np.full(totals.shape, np.nan), where=counts > 0)


def _span(curves: Points) -> tuple[float, float]:
    """From the first step to the last one, with a little margin: the same for every panel."""
    ends = [end for steps, _ in curves.values() for end in (steps[0], steps[-1])]
    margin = 0.04 * max(1.0, max(ends) - min(ends))
    return min(ends) - margin, max(ends) + margin


def _draw_what_is_learnt(axes: Axes, curves: Points) -> None:
    draw = _draw_reward if "reward/mean" in curves else _drawer("policy/loss", "Loss of a step")
    draw(axes, curves)


def _draw_reward(axes: Axes, curves: Points) -> None:
    # Not of the parts of a reward, nor of its failures.
    names = [name for name in curves if re.fullmatch("reward/(?!(mean|std)$)[^/]+", name)]
    for index, (name, label) in enumerate(zip(names, labels(names), strict=True)):
        dashes = _DASHES[index // len(_PARTS) % len(_DASHES)]
        _line(axes, curves, name, _PARTS[index % len(_PARTS)], label=label, width=1.4, dashes=dashes)
    _line(axes, curves, "reward/mean", _MAIN, label="total", width=2.4)
    axes.set_title("Reward, mean of a step")
    _legend_beside(axes)


_HELD_OUT = {
    "eval/pass@1": "Held-out problems solved, with 95% interval",
    "eval/reward": "Held-out reward, with 95% interval",
    "eval/accuracy": "Held-out pairs right, with 95% interval",
    "eval/logprob": "Held-out log p a token, with 95% interval",
}


def _draw_held_out(axes: Axes, curves: Points) -> None:
    main = next((name for name in HEADLINES if f"{name}/low" in curves), HEADLINES[0])
    names = sorted(name for name in curves if re.fullmatch(r"eval/(pass|majority)@\d+", name) or name == main)
    axes.set_title(_HELD_OUT[main], y=1.0)  # without y the axis is laid out once more, to find where nothing is
    if is_share(main):
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
    styles = {main: (_MAIN, "-", 2.4)}
    others = [name for name in names if name not in styles]
    styles |= {name: (_PARTS[index % len(_PARTS)], "--", 1.4) for index, name in enumerate(others)}
    for name in names:
        colour, dashes, width = styles[name]
        steps, values = curves[name]
        label = name.removeprefix("eval/")
        axes.plot(steps, values, dashes, color=colour, linewidth=width, marker="o", markersize=4, label=label)
    if {f"{main}/low", f"{main}/high"} <= curves.keys():
        (steps, low), (_, high) = curves[f"{main}/low"], curves[f"{main}/high"]
        axes.fill_between(steps, low, high, color=_MAIN, alpha=0.15, linewidth=0)
    _legend_beside(axes)


def _draw_length(axes: Axes, curves: Points) -> None:
    _line(axes, curves, "completion/length", _MAIN)
    axes.set_title("Length, tokens")
    axes.set_ylim(bottom=0)
    if "completion/truncated" not in curves:
        return
    share = axes.twinx()
    _line(share, curves, "completion/truncated", _SECOND, width=1.4)
    share.set_ylim(0, 1)
    share.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
    share.tick_params(axis="y", colors=_SECOND)
    share.set_title("cut off", loc="right", x=1.24, color=_SECOND, fontweight="normal")
    share.grid(False)


def _drawer(metric: str, title: str) -> Callable[[Axes, Points], None]:
    def draw(axes: Axes, curves: Points) -> None:
        _line(axes, curves, metric, _MAIN)
        axes.set_title(title, y=1.0)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
        # A log-probability gap estimated from samples may be below 0; the others start at it.
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0] * (axes.dataLim.y0 < 0)))

    return draw


def _draw_drift(axes: Axes, curves: Points) -> None:
    """How far sampler and trainer are apart, where somebody samples; else what moves."""
    titles = {"mismatch/kl": "KL, sampler to trainer", "dpo/margin": "Margin of a pair", "optim/learning_rate": "Rate"}
    metric = next((name for name in titles if name in curves), "mismatch/kl")
    _drawer(metric, titles[metric])(axes, curves)


def _legend_beside(axes: Axes) -> None:
    """A legend to the right of the axes, where it hides nothing, in the order in which the lines end."""
    lines = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    lines.sort(key=lambda line: -np.nan_to_num(np.asarray(line.get_ydata())[-1]))
    rows = sum(str(line.get_label()).count("\n") + 1 for line in lines)
    size = _STYLE["legend.fontsize"] * min(1.0, _LEGEND_LINES / max(1, rows))
    axes.legend(handles=lines, loc="upper left", bbox_to_anchor=(1.0, 1.02), handlelength=1.4, fontsize=size)


def labels(metrics: Sequence[str]) -> list[str]:
    """What stands beside the curves of these rewards: their names, on two lines where they are long, all different."""
    names = [metric.removeprefix("reward/") for metric in metrics]
    told = told_apart([in_lines(name, _WIDEST_LABEL, _WIDEST_LABEL, fewest=1, most=2) for name in names])
    # A pair of dollar signs would be read as a formula.
    return ["\n".join(lines).replace("$", r"\$") for lines in told]


def _line(
    axes: Axes,
    curves: Points,
    metric: str,
    colour: str,
    label: str | None = None,
    width: float = 2.0,
    dashes: str = "-",
) -> None:
    """The values as they are, faint, and their running mean over a tenth of the run."""
    if metric not in curves:
        return
    steps, values = curves[metric]
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    smooth = _running_mean(values, len(values) // 20)
    axes.plot(steps, smooth, dashes, color=colour, linewidth=width, label=label)


def _running_mean(values: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """[n] -> [n]: the mean of the values at most `reach` values away, NaN left out."""
    known = np.isfinite(values)
    ones = np.ones(2 * reach + 1)
    # "full" and cut, because "same" gives as many values as the longer of the two.
    totals = np.convolve(np.where(known, values, 0.0), ones, "full")[reach : reach + len(values)]
    counts = np.convolve(known.astype(np.float64), ones, "full")[reach : reach + len(values)]
    return np.divide(totals, counts, out=np.full(len(values), np.nan), where=counts > 0.5)


# Two above, four below.
_PANELS: tuple[Callable[[Axes, Points], None], ...] = (
    _draw_what_is_learnt,
    _draw_held_out,
    _draw_length,
    _drawer("policy/entropy", "Entropy, nats a token"),
    _draw_drift,
    _drawer("optim/grad_norm", "Gradient norm"),
)
