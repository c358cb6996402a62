"""Interactive plotly figures of pages: hover, zoom, lines hidden by the legend, linear or logarithmic axis. Imports no torch.

Each page embeds plotly's script (4.9 MB), so that it works offline, as a mail attachment and in the long term. The Python package
has no smaller bundle.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

Series = list[tuple[float, float]]

# Okabe & Ito's colours, distinguishable with colour blindness; first those that are visible on white and on black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8a8a8a")
DASHES = ("solid", "dash", "dot", "dashdot")  # when the colours are used up
SIDES = ("bottom right", "top left", "bottom left", "top right")  # of a point's label: neighbours have different ones
STEPS = "optimiser steps"
CONFIG = {"responsive": True, "displaylogo": False, "displayModeBar": False}
ROW = 34  # px per row of a forest plot
# Axes and text in the page's own colours, in light and dark mode.
THEME = """<script>(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const paint = () => {
    const [text, grid] = dark.matches ? ["#ddd", "#444"] : ["#333", "#ddd"];
    for (const plot of document.querySelectorAll(".plotly-graph-div")) {
      const colours = {"font.color": text};
      for (const axis of ["xaxis", "yaxis"])
        for (const line of ["gridcolor", "linecolor", "zerolinecolor"]) colours[axis + "." + line] = grid;
      Plotly.relayout(plot, colours);
    }
  };
  dark.addEventListener("change", paint);
  document.addEventListener("toggle", (event) => {  // a figure in a closed <details> was laid out without width
    if (event.target.open) for (const plot of event.target.querySelectorAll(".plotly-graph-div")) Plotly.Plots.resize(plot);
  }, true);
  paint();
})();</script>"""


class Line(NamedTuple):
    """A line of a chart.

    Args:
        points: (x, y); NaN leaves a gap.
        place: in the palette.
        faint: thin and pale, behind the others.
        band: low and high y at the points' x, or nothing.
    """

    points: Series
    name: str = ""
    place: int = 0
    faint: bool = False
    band: tuple[list[float], list[float]] | None = None


class Effect(NamedTuple):
    """A row of a forest plot: a difference and its interval; NaN where there is none."""

    name: str
    mean: float
    low: float
    high: float


class Point(NamedTuple):
    """A point of a scatter plot.

    Args:
        x, y: value, and the low and high ends of its interval; NaN where there is none.
        filled: a filled marker; otherwise an outline.
    """

    name: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]
    filled: bool = True


def script() -> str:
    """The part of a page's head that its figures need."""
    return f"<style>.plot{{overflow:hidden}}</style><script>{get_plotlyjs()}</script>"  # while it is being laid out anew


def chart(
    caption: str, lines: Sequence[Line], *, x: str = STEPS, y: str = "", from_zero: bool = False, level: float | None = None,
    mark: float | None = None,
) -> str:  # fmt: skip
    """Lines in one frame.

    Args:
        caption: shown below, also the alternative text.
        x, y: the axes' names, with units.
        from_zero: the y axis starts at 0.
        level: y of a dashed line, the reference.
        mark: x of a vertical line, the chosen step.
    """
    figure = go.Figure()
    for line in lines:
        if line.band:
            figure.add_trace(_band(line))
        figure.add_trace(_line(line, x))
    if level is not None:
        figure.add_hline(level, line={"dash": "dash", "width": 1, "color": COLOURS[-1]})
    if mark is not None:
        figure.add_vline(mark, line={"width": 2, "color": COLOURS[2]})
    figure.update_xaxes(title=x)
    figure.update_yaxes(title=y, rangemode="tozero" if from_zero else "normal")
    values = [value for line in lines for _, value in line.points]
    if values and min(values) > 0:
        figure.update_layout(updatemenus=[_scales()])
    return _figure(figure, caption, 300)


def forest(caption: str, effects: Sequence[Effect], x: str) -> str:
    """A forest plot: differences from a reference with their intervals, one row each, and a line at 0.

    Args:
        x: the axis' name, with its unit.
    """
    names, means = [effect.name for effect in effects], [effect.mean for effect in effects]
    reach = [[abs(end - e.mean) if end == end else 0.0 for e, end in zip(effects, ends, strict=True)]
             for ends in ([e.high for e in effects], [e.low for e in effects])]  # fmt: skip
    lines = [f"{e.mean:+.4g}" + (f" ({e.low:+.4g} to {e.high:+.4g})" if e.low == e.low else "") for e in effects]
    figure = go.Figure(
        go.Scatter(
            x=means, y=list(range(len(names))), mode="markers", marker={"size": 9, "color": COLOURS[0]}, text=lines,
            error_x={"type": "data", "array": reach[0], "arrayminus": reach[1], "thickness": 2},
            hovertemplate="%{text}<extra></extra>", showlegend=False,
        )
    )  # fmt: skip
    for row, name in enumerate(names):  # above the row: long names would leave a phone no room for a left margin
        figure.add_annotation(x=0, xref="paper", y=row, yshift=11, text=_text(name), showarrow=False, xanchor="left")
    figure.add_vline(0, line={"width": 1, "color": COLOURS[-1]})
    figure.update_xaxes(title=x)
    figure.update_yaxes(showticklabels=False, range=[len(names) - 0.4, -0.9], showgrid=False, zeroline=False)
    return _figure(figure, caption, 80 + ROW * len(names))


def scatter(caption: str, points: Sequence[Point], *, x: str, y: str, mark: float | None = None) -> str:
    """Named points with intervals in both directions.

    Args:
        x, y: the axes' names, with units.
        mark: x of a dashed vertical line.
    """
    figure = go.Figure()
    for place, point in enumerate(sorted(points, key=lambda point: point.y[0])):
        figure.add_trace(
            go.Scatter(
                x=[point.x[0]], y=[point.y[0]], error_x=_reach(point.x), error_y=_reach(point.y), mode="markers+text",
                text=[_text(point.name)], textposition=SIDES[place % len(SIDES)], showlegend=False, name=_text(point.name),
                marker={"size": 10, "color": _colour(place), "symbol": "circle" if point.filled else "circle-open"},
                textfont={"color": _colour(place)}, hovertemplate="%{x:.4g}, %{y:.4g}", cliponaxis=False,
            )
        )  # fmt: skip
    if mark is not None:
        figure.add_vline(mark, line={"dash": "dash", "width": 1, "color": COLOURS[-1]})
    figure.update_xaxes(title=x)
    figure.update_yaxes(title=y)
    return _figure(figure, caption, 480)


def _reach(values: tuple[float, float, float]) -> dict[str, Any]:
    mean, low, high = values
    known = low == low
    return {"type": "data", "array": [high - mean], "arrayminus": [mean - low], "thickness": 1.5, "visible": known}


def smoothed(points: Series) -> Series:
    """A running mean over a twentieth of the points."""
    share, mean, smooth = min(1.0, 20 / len(points)), points[0][1], []
    for x, value in points:
        mean += share * (value - mean)
        smooth.append((x, mean))
    return smooth


def _line(line: Line, x: str) -> go.Scatter:
    few = len(line.points) < 30
    return go.Scatter(
        x=[at for at, _ in line.points], y=[value for _, value in line.points], name=_text(line.name),
        mode="lines+markers" if few and not line.faint else "lines", showlegend=bool(line.name),
        line={"color": _colour(line.place), "dash": _dash(line.place), "width": 1 if line.faint else 2.5},
        opacity=0.4 if line.faint else 1.0, marker={"size": 5},
        hovertemplate=f"%{{y:.5g}}<br>%{{x:,}} {_text(x)}<extra>{_text(line.name)}</extra>",
    )  # fmt: skip


def _band(line: Line) -> go.Scatter:
    assert line.band
    at, (low, high) = [x for x, _ in line.points], line.band
    return go.Scatter(
        x=at + at[::-1], y=low + high[::-1], fill="toself", fillcolor=_colour(line.place), opacity=0.18, line={"width": 0},
        mode="lines", hoverinfo="skip", showlegend=False,
    )  # fmt: skip


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _dash(place: int) -> str:
    return DASHES[place // len(COLOURS) % len(DASHES)]


def _scales() -> dict[str, Any]:
    """The switch of the y axis."""
    buttons = [{"label": kind, "method": "relayout", "args": [{"yaxis.type": kind}]} for kind in ("linear", "log")]
    place = {"x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom", "pad": {"t": 0, "b": 2}}
    colours = {"font": {"size": 11, "color": "#333"}, "bgcolor": "#ddd"}
    return {"type": "buttons", "direction": "left", "buttons": buttons, "showactive": True, **place, **colours}


def _figure(figure: go.Figure, caption: str, height: int) -> str:
    figure.update_layout(
        template="none", height=height, autosize=True, margin={"l": 56, "r": 12, "t": 30, "b": 44}, paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)", font={"size": 12}, hovermode="closest",
        legend={"orientation": "h", "x": 0, "y": -0.28, "yanchor": "top"},
    )  # fmt: skip
    figure.update_xaxes(title_standoff=6, zeroline=False, automargin=True)
    figure.update_yaxes(title_standoff=6, automargin=True, exponentformat="power")
    drawn = figure.to_html(full_html=False, include_plotlyjs=False, config=CONFIG, default_width="100%")
    label = escape(caption)
    return f'<figure class="plot" role="img" aria-label="{label}">{drawn}<figcaption>{label}</figcaption></figure>'


def _text(text: str) -> str:
    """For plotly, which reads some HTML in its texts."""
    return escape(text, quote=False)
