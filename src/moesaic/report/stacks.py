"""Stacked horizontal bars on one scale of time, as SVG: in a page, or as a picture of its own.

    stacked_bars([Bar("this model", (("attention", 0.1), ("experts", 0.3)), "400 ms")], Frame(...), colours)

A bar with no group for its only segment is an outline: a limit, not something that was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moesaic.report.charts import PHONE_WIDTH, Frame, nice_ticks, short, tick_labels
from moesaic.report.text import escape

LIMIT = ""  # the group of a limit
_ROW, _BAR, _TOP = 62, 24, 4
_SIDE = 12
# The colours of page.css that a picture of its own must bring along: light, then dark.
_LIGHT = ("#2f9e8f", "#d9b93b", "#c7566a", "#4455a8", "#7cc0e4", "#8a8f2b", "#a0489a", "#1c7040", "#8d8f98")
_DARK = ("#45b8a8", "#e2c554", "#df7a8b", "#7d8fe6", "#9bd3f2", "#b3b84e", "#c978c3", "#4fa572", "#9a9ca5")
_INKS = {"paper": ("#fbfaf7", "#14151a"), "ink": ("#1c1d21", "#eceae4"), "soft": ("#5b5d66", "#a9abb5")}
_INKS |= {"faint": ("#70727b", "#8a8c98"), "grid": ("#ebe8e1", "#292b33")}


@dataclass(frozen=True)
class Bar:
    """One bar: its name, (group, seconds) from left to right, and what is written beside the name."""

    name: str
    segments: tuple[tuple[str, float], ...]
    words: str = ""

    @property
    def seconds(self) -> float:
        """Its length."""
        return sum(seconds for _, seconds in self.segments)


def stacked_bars(bars: Sequence[Bar], frame: Frame, colours: Mapping[str, int]) -> str:
    """The chart, as high as its bars need; ``colours`` gives each group its number in the page's palette (``d0`` to ``d8``)."""
    height = chart_height(bars)
    size = "narrow" if frame.width <= PHONE_WIDTH else "wide"
    label = escape(f"{frame.title}. {'; '.join(_said(bar) for bar in bars)}.")
    head = f'<svg class="chart stack {size}" role="img" aria-label="{label}" viewBox="0 0 {frame.width} {height}">'
    return head + drawn(bars, frame, colours) + "</svg>"


def chart_height(bars: Sequence[Bar]) -> int:
    """Units of the chart's view box."""
    return _TOP + _ROW * len(bars) + 36


def drawn(bars: Sequence[Bar], frame: Frame, colours: Mapping[str, int]) -> str:
    """What is inside the chart."""
    width = frame.width - 2 * _SIDE
    longest = max((bar.seconds for bar in bars), default=0.0) or 1.0
    unit, name = (1e3, "ms") if longest < 10 else (1.0, "s")
    scale = width / longest
    bottom = _TOP + _ROW * len(bars)
    out = []
    ticks = nice_ticks(0, longest * unit, max(2, width // 110))
    for tick, words in zip(ticks, tick_labels(ticks, lambda value: f"{value:g}"), strict=True):
        x = _SIDE + tick / unit * scale
        side = "start" if tick == 0 else "end" if x > frame.width - 30 else "middle"
        out.append(f'<path class="grid" d="M{short(x)} {_TOP}V{bottom + 4}"/>')
        out.append(f'<text class="tick" x="{short(x)}" y="{bottom + 19}" text-anchor="{side}">{escape(words)}</text>')
    out.append(f'<text class="axis" x="{frame.width - _SIDE}" y="{bottom + 34}" text-anchor="end">{name}</text>')
    for row, bar in enumerate(bars):
        y = _TOP + _ROW * row
        out.append(f'<text class="name" x="{_SIDE}" y="{y + 16}">{escape(bar.name)}</text>')
        out.append(
            f'<text class="tick" x="{frame.width - _SIDE}" y="{y + 16}" text-anchor="end">{escape(bar.words)}</text>'
        )
        out.append(_segments(bar, y + 24, scale, colours))
    return "".join(out)


def _segments(bar: Bar, y: float, scale: float, colours: Mapping[str, int]) -> str:
    out, x = [], float(_SIDE)
    for group, seconds in bar.segments:
        length = seconds * scale
        box = f'x="{x:.2f}" y="{y}" width="{max(length, 0.01):.2f}" height="{_BAR}"'
        title = f"<title>{escape(group or bar.name)}: {seconds / bar.seconds if bar.seconds else 0:.1%}, {_ms(seconds)}</title>"
        if group == LIMIT:
            out.append(f'<rect class="limit" {box}>{title}</rect>')
        else:
            number = colours[group]
            out.append(f'<rect class="segment d{number}" {box}>{title}</rect>')
            if length >= 34:
                out.append(f'<text class="on on{number}" x="{x + length / 2:.1f}" y="{y + 16}" text-anchor="middle">')
                out.append(f"{seconds / bar.seconds:.0%}</text>")
        x += length
    return "".join(out)


def legend(groups: Sequence[str], colours: Mapping[str, int]) -> str:
    """The groups and their colours, as HTML."""
    keys = (f'<span class="key"><i class="square d{colours[g]}"></i>{escape(g)}</span>' for g in groups)
    return f'<div class="legend">{"".join(keys)}</div>'


def picture(
    title: str, charts: Sequence[tuple[str, Sequence[Bar]]], groups: Sequence[str], colours: Mapping[str, int], width: int = 860
) -> str:  # fmt: skip
    """An SVG document: the charts, each under its heading, one legend; light or dark as its reader prefers."""
    out, y = [f'<text class="title" x="{_SIDE}" y="30">{escape(title)}</text>'], 52
    x = _SIDE
    for group in groups:
        wide = 26 + 6.9 * len(group)
        if x + wide > width - _SIDE:
            x, y = _SIDE, y + 22
        out.append(f'<rect class="d{colours[group]}" x="{short(x)}" y="{y - 10}" width="11" height="11" rx="2"/>')
        out.append(f'<text class="tick" x="{short(x + 16)}" y="{y}">{escape(group)}</text>')
        x += int(wide) + 6
    y += 18
    for heading, bars in charts:
        frame = Frame(heading, "seconds", "", width=width)
        out.append(f'<text class="heading" x="{_SIDE}" y="{y + 22}">{escape(heading)}</text>')
        out.append(f'<g transform="translate(0 {y + 34})">{drawn(bars, frame, colours)}</g>')
        y += 34 + chart_height(bars) + 10
    size = f'viewBox="0 0 {width} {y + 6}" width="{width}" height="{y + 6}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(title)}"><style>{_style()}</style>'
        f'<rect class="paper" width="100%" height="100%"/>{"".join(out)}</svg>\n'
    )


def _style() -> str:
    def inks(which: int, palette: Sequence[str]) -> str:
        named = "".join(f"--{name}:{pair[which]};" for name, pair in _INKS.items())
        return named + "".join(f"--d{i}:{colour};" for i, colour in enumerate(palette))

    fills = "".join(f".d{i}{{fill:var(--d{i})}}" for i in range(len(_LIGHT)))
    return (
        f"svg{{{inks(0, _LIGHT)}font-family:system-ui,sans-serif}}"
        f"@media(prefers-color-scheme:dark){{svg{{{inks(1, _DARK)}}}}}"
        ".paper{fill:var(--paper)}text{fill:var(--soft);font-size:12px}.title{fill:var(--ink);font-size:18px}"
        ".heading{fill:var(--ink);font-size:14px;font-weight:600}.name{fill:var(--ink);font-size:13px}"
        ".axis{fill:var(--faint)}.grid{stroke:var(--grid);fill:none}.segment{stroke:var(--paper);stroke-width:1}"
        ".limit{fill:none;stroke:var(--faint);stroke-dasharray:4 3}.on{fill:var(--paper);font-size:11.5px}"
        f".on1,.on4{{fill:#1c1d21}}{fills}"
    )


def _said(bar: Bar) -> str:
    shares = ", ".join(
        f"{group} {seconds / bar.seconds:.0%}" for group, seconds in bar.segments if group and bar.seconds
    )
    return f"{bar.name} {bar.words}" + (f": {shares}" if shares else "")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
