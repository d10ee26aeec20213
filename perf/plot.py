"""Bars as SVG: groups of horizontal bars on one scale, readable on light and on dark paper."""

from __future__ import annotations

from html import escape

_COLOURS = {
    "isthmus": "#0b7a75", "before": "#8a8f94", "checkout": "#2f958c", "ordinary path": "#4fb3a5",
    "envoy": "#9a4f96", "meshed envoy": "#c48bc0",
    "haproxy": "#4a7fb5", "nginx": "#7a9a3a", "nghttpx": "#b5762f",
}  # fmt: skip
_WIDTH, _LEFT, _RIGHT, _BAR, _GAP = 790, 120, 80, 16, 5


def bars(title: str, groups: dict[str, dict[str, float]]) -> str:
    """`groups`: label -> name -> value. Every bar carries its value."""
    most = max(value for values in groups.values() for value in values.values())
    parts, y = [], 46
    for label, values in groups.items():
        parts.append(f'<text x="12" y="{y + 10}" class="label">{escape(label)}</text>')
        y += 20
        for name, value in values.items():
            width = max(1.0, value / most * (_WIDTH - _LEFT - _RIGHT))
            parts.append(f'<text x="{_LEFT - 8}" y="{y + 12}" class="name">{escape(name)}</text>')
            parts.append(
                f'<rect x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_BAR}" rx="2"'
                f' fill="{_COLOURS.get(name, "#888")}"/>'
            )
            parts.append(
                f'<text x="{_LEFT + width + 6:.1f}" y="{y + 12}" class="value">{value:.0f}</text>'
            )
            y += _BAR + _GAP
        y += 12
    style = (
        "text{font:13px system-ui,sans-serif;fill:#222}"
        ".title{font-size:16px;font-weight:600}.label{font-weight:600}"
        ".name{text-anchor:end}.value{font-variant-numeric:tabular-nums}"
    )
    words = "; ".join(
        f"{label}: " + ", ".join(f"{name} {value:.0f}" for name, value in values.items())
        for label, values in groups.items()
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y}" role="img">'
        f"<title>{escape(title)}</title><desc>{escape(words)}</desc>"
        f'<style>{style}</style><rect width="{_WIDTH}" height="{y}" fill="#fff"/>'
        f'<text x="12" y="26" class="title">{escape(title)}</text>{"".join(parts)}</svg>\n'
    )
