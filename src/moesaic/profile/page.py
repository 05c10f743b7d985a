"""A profile as a page or a picture: which bars, which table, which figures on top."""

from __future__ import annotations

from pathlib import Path

from moesaic.profile.result import ALL_GROUPS, COMPUTING, MOVING, Side
from moesaic.profile.run import MODEL, TWIN, Pair, Profile
from moesaic.profile.words import meaning, milliseconds, notes, percent, scaled, sentences, table
from moesaic.report.profile import Sheet, Tile, write_picture, write_profile
from moesaic.report.stacks import LIMIT, Bar

# Group -> its number in the page's palette; also the order of the segments of a bar.
COLOURS = {
    "attention": 3,
    COMPUTING: 0,
    MOVING: 1,
    "router": 2,
    "head": 4,
    "loss": 6,
    "optimiser": 5,
    "sampling": 7,
    "everything else": 8,
}
assert set(COLOURS) == set(ALL_GROUPS)


def write_page(profile: Profile, out: Path) -> Path:
    """The page of a profile, written atomically."""
    headline, *details = sentences(profile)
    return write_profile(
        profile.name, sheets(profile), headline, details, _tiles(profile), notes(profile), COLOURS, out
    )


def write_svg(profile: Profile, out: Path) -> Path:
    """Its charts as one SVG file."""
    return write_picture(profile.name, sheets(profile), COLOURS, out)


def sheets(profile: Profile) -> list[Sheet]:
    """A section for training, one for reading a prompt, one for a decoded token."""
    work = profile.work
    found = []
    if profile.training is not None:
        tokens = work.batch * work.seq * work.accumulate
        title = f"A training step of {tokens:,} tokens"
        found.append(_sheet("training", title, profile.training, f"{profile.gflops:,.0f} GFLOP/s", "arithmetic", True))
    if profile.token is not None:
        limit = f"{profile.read_gb_per_s:.1f} GB/s"
        found.append(_sheet("token", "A decoded token", profile.token, limit, "reading its weights", False))
    if profile.prompt is not None:
        title = f"Reading a prompt of {work.prompt:,} tokens"
        found.append(_sheet("prompt", title, profile.prompt, f"{profile.gflops:,.0f} GFLOP/s", "arithmetic", False))
    return found


def _sheet(anchor: str, title: str, pair: Pair, speed: str, limit: str, training: bool) -> Sheet:
    bars = [_bar(MODEL, pair.model)]
    if pair.twin is not None:
        bars.append(_bar(TWIN, pair.twin))
    reached = f"{milliseconds(pair.model.limit_seconds)}, {percent(pair.model.of_limit)} of it reached"
    bars.append(Bar(f"{limit} at {speed}", ((LIMIT, pair.model.limit_seconds),), reached))
    unit = "FLOP" if limit == "arithmetic" else "B"
    columns = (
        "part",
        "ms",
        "share",
        *(("forward, ms", "backward, ms") if training else ()),
        "arithmetic" if unit == "FLOP" else "weights",
        "of the limit",
    )
    rows = []
    for row, (name, forward, backward, both, share, _, of_limit) in zip(
        pair.model.rows, table(pair.model), strict=True
    ):
        work = "" if row.work is None else scaled(row.work, unit)
        rows.append((name, both, share, *((forward, backward) if training else ()), work, of_limit))
    spread = "" if pair.tax is None else f"{pair.tax.least:.2f} to {pair.tax.most:.2f} over rounds"
    tax = "" if pair.tax is None else f"Sparsity tax {pair.tax.ratio:.2f} ({spread})."
    meanings = tuple(meaning(row.part, pair.model) for row in pair.model.rows)
    reading = "Bars are on one scale. The dashed outline is the time the same work takes at the speed measured beside the runs."
    return Sheet(anchor, anchor.capitalize(), title, tax, reading, tuple(bars), columns, tuple(rows), meanings)


def _bar(name: str, side: Side) -> Bar:
    """A side's groups, scaled to the plain run: tracing must not lengthen the picture."""
    scale = side.seconds / side.traced
    segments = tuple((group, seconds) for group in COLOURS if (seconds := side.group(group) * side.traced * scale) > 0)
    return Bar(name, segments, milliseconds(side.seconds))


def _tiles(profile: Profile) -> list[Tile]:
    tiles = []
    for name, pair, limit in (
        ("training step", profile.training, "measured arithmetic"),
        ("decoded token", profile.token, "measured bandwidth"),
    ):
        if pair is None:
            continue
        if pair.tax is not None:
            spread = f"{pair.tax.least:.2f} to {pair.tax.most:.2f} times the dense twin"
            tiles.append(Tile(f"sparsity tax, {name}", f"{pair.tax.ratio:.2f}", spread))
        words = f"{milliseconds(pair.model.seconds)}, {limit}"
        tiles.append(Tile(f"{name}, of the limit", percent(pair.model.of_limit), words))
    return tiles
