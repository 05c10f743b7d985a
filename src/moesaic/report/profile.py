"""The page of a profile: what takes the time, beside the dense twin and the limits of the machine.

write_profile("small", sheets, headline, details, notes, colours, Path("profile.html"))     # sheets: from moesaic.profile.page
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moesaic.report.charts import PHONE_WIDTH, Frame
from moesaic.report.figures import WIDE, figure, section
from moesaic.report.shell import assemble, write_page
from moesaic.report.stacks import LIMIT, Bar, legend, picture, stacked_bars
from moesaic.report.text import escape


@dataclass(frozen=True)
class Sheet:
    """One section: a chart of bars on one scale, and a table.

    Attributes:
        anchor, short: of the section, in its address and in the navigation. title, lead, reading: of it and its chart.
        bars: from top to bottom.
        columns, rows: heads and cells of the table, all as they are to be shown. meanings: a line below the first cell.
    """

    anchor: str
    short: str
    title: str
    lead: str
    reading: str
    bars: tuple[Bar, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    meanings: tuple[str, ...]


@dataclass(frozen=True)
class Tile:
    """A figure at the top: its name, the number, a line below."""

    name: str
    number: str
    words: str


def write_profile(
    name: str,
    sheets: Sequence[Sheet],
    headline: str,
    details: Sequence[str],
    tiles: Sequence[Tile],
    notes: Sequence[str],
    colours: Mapping[str, int],
    out: Path,
) -> Path:
    """Write the page to ``out``, atomically. ``colours``: group of time -> number in the palette."""
    parts = [
        (sheet.anchor, sheet.short, section(sheet.anchor, sheet.title, sheet.lead, _sheet(sheet, colours)))
        for sheet in sheets
    ]
    points = "".join(f"<li>{escape(note)}</li>" for note in notes)
    parts.append(("how", "How", section("how", "How it was measured", "", f'<ul class="details how">{points}</ul>')))
    write_page(
        assemble(escape(name), _hero(name, headline, details, tiles), parts, {"charts": {}}, "moesaic profile"), out
    )
    return out


def write_picture(name: str, sheets: Sequence[Sheet], colours: Mapping[str, int], out: Path) -> Path:
    """Write all charts as one SVG file, atomically."""
    charts = [(sheet.title, sheet.bars) for sheet in sheets]
    bars = [bar for sheet in sheets for bar in sheet.bars]
    write_page(picture(f"{name}: where the time goes", charts, groups_of(bars, colours), colours), out)
    return out


def groups_of(bars: Sequence[Bar], colours: Mapping[str, int]) -> list[str]:
    """The groups that these bars show, in the order of ``colours``."""
    shown = {group for bar in bars for group, seconds in bar.segments if seconds}
    return [group for group in colours if group in shown and group != LIMIT]


def _sheet(sheet: Sheet, colours: Mapping[str, int]) -> str:
    draw = "".join(
        stacked_bars(sheet.bars, Frame(sheet.title, "seconds", "", width=width), colours)
        for width in (WIDE, PHONE_WIDTH)
    )
    body = legend(groups_of(sheet.bars, colours), colours) + draw
    head = "".join(f"<th>{escape(column)}</th>" for column in sheet.columns)
    lines = ""
    for (name, *cells), meaning in zip(sheet.rows, sheet.meanings, strict=True):
        below = f"<small>{escape(meaning)}</small>" if meaning else ""
        lines += f"<tr><th>{escape(name)}{below}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
    table = f'<table class="numbers parts"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>'
    return figure("By group", sheet.reading, body) + f'<div class="scroll">{table}</div>'


def _hero(name: str, headline: str, details: Sequence[str], tiles: Sequence[Tile]) -> str:
    points = "".join(f"<li>{escape(sentence)}</li>" for sentence in details)
    figures = "".join(
        f'<div class="tile"><dt>{escape(tile.name)}</dt><dd>{escape(tile.number)}</dd><p>{escape(tile.words)}</p></div>'
        for tile in tiles
    )
    return (
        f'<header class="hero"><p class="eyebrow">Profile</p><h1>{escape(name)}</h1>'
        f'<p class="verdict">{escape(headline)}</p><ul class="details">{points}</ul><dl class="tiles">{figures}</dl></header>'
    )
