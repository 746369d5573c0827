"""Foreign text in Markdown: prompts and names may hold anything."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path

_SPECIAL = re.compile(r"([\\`*_{}\[\]#|~!$])")
_LIST = re.compile(r"^(-|\+(?=\s)|\d+(?=[.)](\s|$)))")
"""What begins a list where a line begins with it."""


def escape(text: str, most: int | None = None) -> str:
    """Makes text harmless, on one line.

    Args:
        text: Any text.
        most: Characters to keep; all by default.

    Returns:
        The text, which Markdown and HTML show as it is.
    """
    shown = "".join(c if c.isprintable() or c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)
    line = " ".join(shown.split())
    if most is not None and len(line) > most:
        line = line[: most - 1] + "…"
    safe = _SPECIAL.sub(r"\\\1", html.escape(line, quote=False))
    return _LIST.sub(lambda begin: f"\\{begin[0]}" if begin[0] in "-+" else f"{begin[0]}\\", safe)


def source_name(source: str) -> str:
    """Names a source of prompts as others may see it.

    Args:
        source: A file, or a name such as shapes:test or hf:owner/name.

    Returns:
        A file's name without its folders; all else as it is, without backticks.
    """
    named = re.match(r"[a-z]+:(?!/)", source) is not None
    return (source if named else Path(source).name).replace("`", "'").replace("\n", " ")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lays out a table.

    Args:
        head: Titles of the columns.
        rows: Cells, escaped.

    Returns:
        Lines of Markdown.
    """
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
