"""How charts look: in a page, whose colours follow the reader's, and as pictures for paper."""

from __future__ import annotations

from typing import Any

# The page's own: Vega measures how wide its words are, to leave room for them.
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"


def in_page() -> dict[str, Any]:
    """Vega-Lite's configuration. Ink and lines are the page's own, so that one chart does for dark, light and print."""
    return _config(ink="currentColor", lines="var(--line)", font=FONT)


def on_paper() -> dict[str, Any]:
    """... for a picture on white."""
    return _config(ink="#222222", lines="#dddddd", font="Helvetica, Arial, sans-serif") | {"background": "white"}


def _config(*, ink: str, lines: str, font: str) -> dict[str, Any]:
    words = {
        "labelColor": ink,
        "titleColor": ink,
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
    }
    return {
        "background": None,
        "font": font,
        "view": {"stroke": None},
        "axis": {
            **words,
            "domainColor": lines,
            "tickColor": lines,
            "gridColor": lines,
            "labelOverlap": "greedy",
            "labelSeparation": 8,
        },
        "axisQuantitative": {"tickCount": {"expr": "max(3, min(7, ceil(width / 70)))"}},
        "legend": {**words, "symbolOpacity": 1},
        "text": {"fontSize": 11},
    }
