"""The documentation as tests read it: pages, blocks of code, commands, headings and links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from config_files import ROOT

LOG = ROOT / "docs" / "log.md"
"""Commands there are history: what was run at the time, some of it by versions that are gone."""
API = ROOT / "docs" / "api"
"""Written from the sources, and compared with them."""
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = ("bash", "sh", "console")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^ {4}(python -m .*)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A block of code."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_script(self) -> bool:
        """Whether it defines functions of the shell and has to be run whole."""
        return "() {" in self.text


@dataclass(frozen=True)
class Shell:
    """One simple command of a block."""

    place: str
    words: tuple[str, ...]
    stdin: str = ""
    """What a here-document gives it."""

    @property
    def text(self) -> str:
        return shlex.join(self.words)


@cache
def blocks(page: Path) -> tuple[Block, ...]:
    text = page.read_text(encoding="utf-8")
    found = [Block(page, text[: match.start()].count("\n") + 1, match[1], match[2]) for match in _FENCE.finditer(text)]
    # Blanked out, so that lines keep their numbers.
    rest = _FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    for match in _INDENTED.finditer(rest):
        found.append(Block(page, rest[: match.start()].count("\n") + 1, "bash", match[1]))
    return tuple(found)


def is_shell(block: Block) -> bool:
    """Blocks without a language are commands where they begin with one, else tables and output."""
    return block.language in SHELL or (not block.language and block.text.startswith(("python ", "$ ")))


def shells(block: Block) -> Iterator[Shell]:
    """The simple commands of a block, without redirections and comments."""
    lines = iter(block.text.replace("\\\n", " ").splitlines())
    for line in lines:
        stdin = ""
        if here := re.search(r"<<'(\w+)'", line):
            stdin = "\n".join(iter(lambda: next(lines), here[1])) + "\n"
            line = line.replace(here[0], "")
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";<>|&")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        redirected = False
        for word in [*lexer, ";"]:
            if redirected:
                redirected = False
            elif word in (">", "<"):
                redirected = True
            elif set(word) <= set(";|&"):
                if words:
                    yield Shell(block.place, tuple(words), stdin)
                words = []
            else:
                words.append(word)


def documented() -> list[Shell]:
    """All commands of all pages but the log, in their order."""
    found = [block for page in PAGES if page != LOG and API not in page.parents for block in blocks(page)]
    return [shell for block in found if is_shell(block) and not block.is_script for shell in shells(block)]


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return _FENCE.sub(lambda match: "\n" * match[0].count("\n"), page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors that a forge makes of a page's headings."""
    seen: dict[str, int] = {}
    found = set()
    for heading in re.findall(r"^#{1,6} (.+)$", prose(page), flags=re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        count = seen[slug] = seen.get(slug, -1) + 1
        found.add(f"{slug}-{count}" if count else slug)
    return found


def links(page: Path) -> Iterator[str]:
    """Targets of the links and pictures of a page that stay inside the repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "``", prose(page))):
        if not re.match(r"[a-z]+:", target):
            yield target
