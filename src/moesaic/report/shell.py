"""The shell every page shares: head, content policy, navigation, theme, script. Sections come from elsewhere.

The page forbids itself every load and every script but its own (a content policy with the script's hash), so model text
could not run even if an escape were forgotten.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from moesaic.errors import disk_errors
from moesaic.report.figures import Data
from moesaic.report.text import escape


def assemble(
    name: str, hero: str, parts: Sequence[tuple[str, str, str]], data: Data, sources: str, picker: str = ""
) -> str:
    """A whole page as a string.

    Args:
        name: escaped, for the title. hero, picker: HTML.
        parts: (anchor, name in the navigation, HTML of the section).
        data: what the page's script reads. sources: files the page was made from, in words.
    """
    nav = "".join(f'<a href="#{anchor}">{label}</a>' for anchor, label, _ in parts)
    style, script = _asset("page.css"), _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{name} – moesaic report</title><style>{style}</style></head><body>"
        f'<div class="bar"><div class="inner"><b class="brand">moesaic</b><nav aria-label="Sections">{nav}</nav>'
        f'{picker}<button id="theme" type="button" aria-label="Colour theme: automatic">Theme: auto</button>'
        f"</div></div><main>{hero}{''.join(html for _, _, html in parts)}</main>"
        f"<footer><p>Written by moesaic from {escape(sources)}. This page loads nothing from the network.</p></footer>"
        '<div id="tip" role="status" hidden></div>'
        f'<script type="application/json" id="data">{script_json(data)}</script><script>{script}</script></body></html>\n'
    )


def write_page(page: str, out: Path) -> None:
    """Write a page so that it is whole or absent. Raises ``MoesaicError`` for a place that cannot be written to."""
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f"{out.name}.incomplete-{os.getpid()}")
        try:
            with partial.open("wb") as file:
                file.write(page.encode("utf-8"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, out)
        finally:
            partial.unlink(missing_ok=True)


def script_json(data: object) -> str:
    """JSON that is safe inside <script>: no character in it can open a tag or end the element."""
    dumped = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return dumped.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
