"""Heat maps and stacked bars as pure functions: encoded cells in, an SVG string out.

    rows = [encode(np.array([1.0, 2.0, 0.0]))]          # load over fair share: fair, twice, no token
    heat_map(rows, Frame("Load", "expert", "layer"), x_ticks, y_ticks, kind="overview")

A cell is one character, so that the page's script (page.js) can redraw any layer from a short string.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from moesaic.report.charts import Frame, anchor, axis_labels, open_chart, short
from moesaic.report.text import escape, shorten

# One character per heat-map cell: log2(load / fair share) in eighths, then "no token", then "not logged".
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_."
_HALF, _DEAD, _GAP = 32, 65, 66


def encode(ratio: np.ndarray) -> str:
    """Load over fair share, any shape (read row by row), one character a cell; NaN is a gap, 0 means no token."""
    flat = np.asarray(ratio, dtype=float).reshape(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        eighths = np.clip(np.floor(np.log2(flat) * 8 + 0.5), -_HALF, _HALF)
    codes = np.where(np.isnan(flat), _GAP, np.where(flat <= 0, _DEAD, np.nan_to_num(eighths) + _HALF))
    return "".join(ALPHABET[int(code)] for code in codes)


def cell_class(char: str) -> str | None:
    """The colour class of a cell: h0 (a quarter of the fair share or less) .. h6 (fair) .. h12, "dead", or None."""
    code = ALPHABET.index(char)
    if code == _GAP:
        return None
    if code == _DEAD:
        return "dead"
    return f"h{max(0, min(12, math.floor((code - _HALF) * 3 / 8 + 0.5) + 6))}"


def cells(rows: Sequence[str]) -> str:
    """Rows of encoded cells as one path per colour in unit coordinates, equal neighbours joined."""
    paths: dict[str, list[str]] = {}
    for y, row in enumerate(rows):
        start = 0
        while start < len(row):
            stop = start + 1
            css = cell_class(row[start])
            while stop < len(row) and cell_class(row[stop]) == css:
                stop += 1
            if css:
                paths.setdefault(css, []).append(f"M{start} {y}h{stop - start}v1H{start}z")
            start = stop
    return "".join(f'<path class="{css}" d="{"".join(d)}"/>' for css, d in sorted(paths.items()))


def mesh(columns: int, rows: int) -> str:
    """Hairlines between the cells of a small grid (charts with very many cells are clearer without)."""
    d = "".join(f"M{x} 0v{rows}" for x in range(1, columns)) if columns <= 40 else ""
    d += "".join(f"M0 {y}h{columns}" for y in range(1, rows)) if rows <= 40 else ""
    return f'<path class="mesh" d="{d}"/>' if d else ""


def heat_map(
    rows: Sequence[str],
    frame: Frame,
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    *,
    kind: str,
    left: float = 48,
) -> str:
    """Encoded rows as a grid. Ticks are (cell position, label). ``kind`` tells the page's script what the cells are."""
    right, top, bottom = 14, 30, 42
    width, height = frame.width - left - right, frame.height - top - bottom
    num_columns = max([len(row) for row in rows], default=1) or 1
    box = (left, top, width, height)
    out = [open_chart(frame, box, (0, num_columns), (0, len(rows)), kind)]
    out.append('<g class="yt">')
    for y, label in y_ticks:
        name = shorten(label, max(4, int((left - 8) / 6.4)))
        out.append(f'<text class="tick" x="{short(left - 8)}" y="{short(top + y / max(1, len(rows)) * height + 4)}" ')
        out.append(f'text-anchor="end"><title>{escape(label)}</title>{escape(name)}</text>')
    out.append('</g><g class="xt">')
    for x, label in x_ticks:
        place = left + x / num_columns * width
        out.append(
            f'<text class="tick" x="{short(place)}" y="{top + height + 16}" text-anchor="{anchor(place, frame)}">'
        )
        out.append(f"{escape(label)}</text>")
    out.append("</g>")
    out.append(f'<rect class="gap" x="{short(left)}" y="{top}" width="{short(width)}" height="{short(height)}"/>')
    out.append(f'<svg class="cells" x="{short(left)}" y="{top}" width="{short(width)}" height="{short(height)}" ')
    out.append(f'viewBox="0 0 {num_columns} {max(1, len(rows))}" preserveAspectRatio="none">')
    out.append(cells(rows) + mesh(num_columns, len(rows)) + "</svg>")
    out.append(axis_labels(frame, left + width))
    return "".join(out) + "</svg>"


def stack_paths(shares_DE: Sequence[Sequence[int]]) -> list[str]:
    """Shares in thousandths, one ``d`` per domain in coordinates E wide and 1000 high, stacked from the bottom."""
    if not shares_DE:
        return []
    base = [1000] * len(shares_DE[0])
    paths = []
    for row in shares_DE:
        d = ""
        for e, share in enumerate(row):
            if share > 0:
                d += f"M{e}.08 {base[e]}h.84v{-share}h-.84z"
                base[e] -= share
        paths.append(d)
    return paths


def stacked_bars(shares_DE: Sequence[Sequence[int]], frame: Frame, x_ticks: Sequence[tuple[float, str]]) -> str:
    """One full-height bar per expert, split by domain (thousandths); an expert without tokens has no bar."""
    left, right, top, bottom = 48, 14, 30, 42
    width, height = frame.width - left - right, frame.height - top - bottom
    num_experts = len(shares_DE[0]) if shares_DE else 1
    out = [open_chart(frame, (left, top, width, height), (0, num_experts), (0, 1000), "stack")]
    for share in (0, 50, 100):
        y = top + height * (1 - share / 100)
        out.append(f'<path class="grid" d="M{left} {short(y)}h{width}"/>')
        out.append(f'<text class="tick" x="{left - 8}" y="{short(y + 4)}" text-anchor="end">{share}%</text>')
    out.append('<g class="xt">')
    for x, label in x_ticks:
        place = left + x / num_experts * width
        out.append(f'<text class="tick" x="{short(place)}" y="{top + height + 16}" text-anchor="middle">{label}</text>')
    out.append("</g>")
    out.append(f'<svg class="cells" x="{left}" y="{top}" width="{width}" height="{height}" ')
    out.append(f'viewBox="0 0 {num_experts} 1000" preserveAspectRatio="none">')
    out += [f'<path class="fill d{i}" d="{d}"/>' for i, d in enumerate(stack_paths(shares_DE))]
    out.append("</svg>" + axis_labels(frame, left + width))
    return "".join(out) + "</svg>"
