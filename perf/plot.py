"""Plots as SVG, by matplotlib: groups of horizontal bars with their ranges."""

from __future__ import annotations

import io
from collections.abc import Mapping
from html import escape

from matplotlib import rc_context
from matplotlib.figure import Figure

from perf.tables import Range

_COLOURS = {
    "isthmus": "#0b7a75", "before": "#8a8f94", "checkout": "#2f958c", "ordinary path": "#4fb3a5",
    "envoy": "#9a4f96", "meshed envoy": "#c48bc0",
    "haproxy": "#4a7fb5", "nginx": "#7a9a3a", "nghttpx": "#b5762f",
}  # fmt: skip
_OTHER = "#888888"
# In inches: the height of a bar, of a group's title, and of the margins above and below.
_BAR, _TITLE, _MARGIN = 0.24, 0.42, 0.9


def bars(title: str, groups: Mapping[str, Mapping[str, Range]]) -> str:
    """`groups`: label -> name -> range. A bar ends at the middle value, which stands beside it; a
    line goes from the lowest to the highest."""
    with rc_context(
        {
            "svg.fonttype": "none",  # text stays text
            "svg.hashsalt": "isthmus",  # the same figures make the same file
            "font.family": ["sans-serif"],
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
        }
    ):
        text = _draw(title, groups)
    words = "; ".join(
        f"{label}: "
        + ", ".join(
            f"{name} {value.middle:.0f} ({value.lowest:.0f} to {value.highest:.0f})"
            for name, value in values.items()
        )
        for label, values in groups.items()
    )
    text = text.replace("</title>", f"</title>\n <desc>{escape(words)}</desc>", 1)
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def _draw(title: str, groups: Mapping[str, Mapping[str, Range]]) -> str:
    count = sum(map(len, groups.values()))
    height = _BAR * count + _TITLE * len(groups) + _MARGIN
    figure = Figure(figsize=(8, height), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    ticks: list[tuple[float, str]] = []
    y = 0.0
    for label, values in groups.items():
        y += _TITLE
        axes.annotate(label, (0, y - _BAR * 0.8), xycoords=("axes fraction", "data"), weight="bold")
        for name, (lowest, middle, highest) in values.items():
            axes.barh(
                y,
                middle,
                height=_BAR * 0.75,
                color=_COLOURS.get(name, _OTHER),
                xerr=[[middle - lowest], [highest - middle]],
                error_kw={"elinewidth": 1, "capsize": 2.5, "ecolor": "#222222"},
            )
            axes.annotate(
                f"{middle:.0f}",
                (highest, y),
                xytext=(6, 0),
                textcoords="offset points",
                verticalalignment="center",
            )
            ticks.append((y, name))
            y += _BAR
    axes.set_title(title, loc="left", weight="bold")
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    axes.tick_params("y", length=0)
    axes.set_ylim(y, 0)
    axes.margins(x=0.08)
    axes.set_xlim(left=0)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Title": title, "Date": None, "Creator": None})
    return out.getvalue()
