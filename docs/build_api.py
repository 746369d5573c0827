"""Writes docs/api from the docstrings: python docs/build_api.py.

Sources are read, not imported: the pages do not depend on the versions of Python or of any package. A test compares
the pages with what this script would write.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
API = ROOT / "docs" / "api"
PACKAGE = "calibri_lightning"

PAGES: Mapping[str, tuple[str, Sequence[str]]] = {
    "run": (
        "The module, the data and the configuration of a run",
        ("module", "data", "assembly", "sharding.strategy", "errors"),
    ),
    "backbones": ("Models", ("backbones", "backbones.native", "backbones.memory")),
    "calibration": ("Scales, files, folding", ("calibration", "calibration.sites", "calibration.tables.helpers")),
    "strategies": (
        "Searches and policy gradients",
        (
            *("strategies", "strategies.search", "strategies.plan", "strategies.turns", "strategies.advantages"),
            *("strategies.grpo_loss", "strategies.nft_loss", "strategies.ema", "strategies.gradient_step"),
        ),
    ),
    "sampling": ("Steps with noise, and windows of them", ("sampling.kernels", "sampling.windows")),
    "rewards": ("Rewards", ("rewards",)),
    "remote": ("Rewards on servers", ("remote.wire", "serving.scorer")),
    "adapters": ("LoRA and trained weights", ("adapters",)),
    "metrics": ("Metrics for other loops", ("metrics",)),
    "evaluation": ("Intervals, diversity, plots", ("evaluation",)),
    "planning": ("Memory, before anything is loaded", ("planning",)),
}
"""Title and modules of each page. A package shows what its `__all__` names, a module all that is public in it."""

WIDTH = 110
"""Longest signature that stays on one line."""
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")

INDEX = """# API

Written by `python docs/build_api.py` from the docstrings; a test compares. The tools behind `compare`, `export`,
`convert`, `ablate`, `sweep`, `serve` and `bench`, and what starts and watches several processes, are not listed: they
are used as commands. What `calibri_lightning` itself exports is in **bold**.

| page | names |
|---|---|
"""

Definition = ast.ClassDef | ast.FunctionDef | ast.Assign | ast.AnnAssign


@dataclass(frozen=True)
class Entry:
    """A public name."""

    name: str
    module: str
    """Where it is defined, without the package's name."""
    node: Definition
    text: str
    """Its docstring."""


@cache
def source(module: str) -> str:
    """The text of a module of the package."""
    path = ROOT.joinpath(PACKAGE, *module.split(".")) if module else ROOT / PACKAGE
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")


@cache
def source_lines(module: str) -> tuple[bytes, ...]:
    """The lines of a module, encoded."""
    return tuple(line.encode() for line in source(module).splitlines())


@cache
def tree(module: str) -> ast.Module:
    """The syntax tree of a module of the package."""
    return ast.parse(source(module))


def exported(module: str) -> list[str]:
    """Names in a module's `__all__`; public classes, functions and types where it has none."""
    for node in tree(module).body:
        if isinstance(node, ast.Assign) and names_of(node) == ["__all__"]:
            return list(ast.literal_eval(node.value))
    return [name for node in tree(module).body for name in names_of(node) if name[0] != "_" and not name.isupper()]


def names_of(node: ast.stmt) -> list[str]:
    """What a statement defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def find(module: str, name: str) -> Entry | None:
    """Follows a name to its definition; None for what is not of this package, and for modules."""
    body = tree(module).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if name in names_of(node) and isinstance(node, Definition):
            return Entry(name, module, node, doc_of(node, after))
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{PACKAGE}."):
            for alias in node.names:
                if (alias.asname or alias.name) == name and node.module != f"{PACKAGE}.{module}":
                    return find(node.module.removeprefix(f"{PACKAGE}."), alias.name)
    return None


def doc_of(node: ast.stmt, after: ast.stmt | None) -> str:
    """A docstring, or the string below an assignment."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return ast.get_docstring(node) or ""
    text = after.value if isinstance(after, ast.Expr) else None
    return inspect.cleandoc(text.value) if isinstance(text, ast.Constant) and isinstance(text.value, str) else ""


def segment(module: str, node: ast.AST | None) -> str:
    """The source of an expression or assignment, on one line."""
    if node is None:
        return ""
    assert isinstance(node, ast.expr | ast.stmt | ast.arg)
    assert node.end_lineno is not None
    lines = source_lines(module)[node.lineno - 1 : node.end_lineno]
    # Columns count bytes. The end first, for it may be on the same line.
    lines = [*lines[:-1], lines[-1][: node.end_col_offset]]
    return re.sub(r"\s+", " ", b" ".join([lines[0][node.col_offset :], *lines[1:]]).decode())


def parameters(module: str, function: ast.FunctionDef) -> list[str]:
    """The parameters of a function as written, without self and cls."""
    given = function.args
    plain = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(plain) - len(given.defaults)) + list(given.defaults)
    words = [one(module, arg, default) for arg, default in zip(plain, defaults, strict=True)]
    if given.vararg is not None:
        words.append("*" + one(module, given.vararg, None))
    elif given.kwonlyargs:
        words.append("*")
    words += [one(module, arg, default) for arg, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    if given.kwarg is not None:
        words.append("**" + one(module, given.kwarg, None))
    return words[1:] if plain and plain[0].arg in ("self", "cls") else words


def one(module: str, arg: ast.arg, default: ast.expr | None) -> str:
    """A parameter with its type and default."""
    typed = f"{arg.arg}: {segment(module, arg.annotation)}" if arg.annotation is not None else arg.arg
    return typed if default is None else f"{typed} = {segment(module, default)}"


def signature(head: str, words: Sequence[str], tail: str) -> str:
    """On one line where it fits, else a line for each parameter."""
    if not words and head.startswith("class"):
        return head
    line = f"{head}({', '.join(words)}){tail}"
    return line if len(line) <= WIDTH else f"{head}(\n" + "".join(f"    {word},\n" for word in words) + f"){tail}"


def constructor(entry: Entry) -> tuple[list[str], str]:
    """Parameters of a class and the docstring of its `__init__`, inherited ones included."""
    node = entry.node
    if not isinstance(node, ast.ClassDef):
        return [], ""
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            return parameters(entry.module, part), ast.get_docstring(part) or ""
    bases = [find(entry.module, base.id) for base in node.bases if isinstance(base, ast.Name)]
    inherited = next((made for base in bases if base is not None and (made := constructor(base))[0]), ([], ""))
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return [*inherited[0], *(f"{name}: {kind}" for name, kind, _ in fields(entry))], ""
    return inherited


def fields(entry: Entry) -> Iterator[tuple[str, str, str]]:
    """Name, type with default, and docstring of each public variable of a class."""
    assert isinstance(entry.node, ast.ClassDef)
    body = entry.node.body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and not names_of(node)[0].startswith("_"):
            default = f" = {segment(entry.module, node.value)}" if node.value is not None else ""
            yield names_of(node)[0], segment(entry.module, node.annotation) + default, doc_of(node, after)


def sections(text: str) -> dict[str, str]:
    """Splits a docstring of Google's style; what comes first is under the empty name."""
    found, name = {"": ""}, ""
    for line in text.splitlines():
        if line.rstrip(":") in SECTIONS and line.endswith(":"):
            name = line.rstrip(":")
            found[name] = ""
        elif name and line and not line.startswith(" "):
            name = ""
            found[""] += line + "\n"
        else:
            found[name] += line + "\n"
    return {key: textwrap.dedent(value).strip() for key, value in found.items()}


def prose(text: str) -> str:
    """A paragraph on one line; what Markdown would take for HTML is escaped."""
    return re.sub(r"\s+", " ", text).replace("<", "\\<").strip()


def items(text: str) -> str:
    """`name: text` lines, with continuations, as a list."""
    parts = re.split(r"\n(?=\S)", text)
    pairs = [part.partition(":") for part in parts if part.strip()]
    return "".join(f"* `{name.strip()}`: {prose(said)}\n" for name, _, said in pairs)


def paragraphs(text: str) -> str:
    """All paragraphs before the first section."""
    return "\n\n".join(prose(part) for part in re.split(r"\n\s*\n", text) if part.strip())


def render(entry: Entry) -> str:
    """The entry of one name."""
    node = entry.node
    if isinstance(node, ast.ClassDef):
        words, init = constructor(entry)
        head, doc = signature(f"class {entry.name}", words, ""), sections(entry.text)
        doc = {**{k: v for k, v in sections(init).items() if k == "Args"}, **doc}
    elif isinstance(node, ast.FunctionDef):
        returns = f" -> {segment(entry.module, node.returns)}" if node.returns is not None else ""
        head, doc = signature(f"def {entry.name}", parameters(entry.module, node), returns), sections(entry.text)
    else:
        head, doc = segment(entry.module, node), sections(entry.text)
    lines = [f"### `{entry.name}`", "", "```python", head, "```", "", paragraphs(doc[""]), ""]
    for name in ("Args", "Attributes"):
        if doc.get(name):
            lines += [items(doc[name])]
    for name in ("Returns", "Yields"):
        if doc.get(name):
            lines += [f"{name}: {prose(doc[name])}", ""]
    if doc.get("Raises"):
        lines += ["Raises:", "", items(doc["Raises"])]
    if isinstance(node, ast.ClassDef):
        lines += members(entry)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def members(entry: Entry) -> list[str]:
    """Variables and methods that a class defines itself, each with the first sentence of its docstring."""
    assert isinstance(entry.node, ast.ClassDef)
    lines = [f"* `{name}: {kind}`: {prose(text)}" for name, kind, text in fields(entry) if text]
    hooks = ("setup", "on_train_start", "on_train_batch_start", "on_train_batch_end")
    for part in entry.node.body:
        if isinstance(part, ast.FunctionDef) and part.name[0] != "_" and part.name not in hooks:
            first = prose(re.split(r"\n\s*\n", ast.get_docstring(part) or "")[0])
            is_property = any("property" in ast.unparse(decorator) for decorator in part.decorator_list)
            words = ", ".join(word.partition(":")[0].partition(" =")[0] for word in parameters(entry.module, part))
            lines.append(f"* `{part.name if is_property else f'{part.name}({words})'}`: {first}")
    return ["", "Members:", "", *lines] if lines else []


def build() -> dict[str, str]:
    """All pages by file name."""
    exports, pages, index, shown = set(exported("")), {}, INDEX, set[tuple[str, str]]()
    for page, (title, modules) in PAGES.items():
        text, links = f"# {title}\n", []
        for module in modules:
            found = [entry for name in exported(module) if (entry := find(module, name)) is not None and entry.text]
            # What a package exports is not shown a second time with its module.
            found = [entry for entry in found if (entry.module, entry.name) not in shown]
            shown |= {(entry.module, entry.name) for entry in found}
            text += f"\n## {PACKAGE}.{module}\n\n{module_text(module)}\n"
            for entry in sorted(found, key=lambda entry: entry.name.lower()):
                text += f"\n{render(entry)}"
                # A second heading of the same letters gets a number.
                again = sum(link.lower().startswith(f"[{entry.name.lower()}]") for link in links)
                links.append(f"[{entry.name}]({page}.md#{entry.name.lower()}{f'-{again}' if again else ''})")
        names = ", ".join(f"**{link}**" if link[1:].partition("]")[0] in exports else link for link in sorted(links))
        pages[f"{page}.md"] = text
        index += f"| [{title}]({page}.md) | {names} |\n"
    return {"README.md": index, **pages}


def module_text(module: str) -> str:
    """What a module says of itself."""
    return paragraphs(ast.get_docstring(tree(module)) or "")


if __name__ == "__main__":
    API.mkdir(exist_ok=True)
    made = build()
    for old in API.glob("*.md"):
        if old.name not in made:
            old.unlink()
    for file, content in made.items():
        (API / file).write_text(content, encoding="utf-8")
