"""The report as a page: structure, escaping, and that it loads nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest
from comparisons import GAINS, example

from calibri_lightning.tools.compare import render_page
from calibri_lightning.tools.compare.page import clean
from calibri_lightning.tools.compare.plots import draw_plots

VOID = {"meta", "img", "input", "link", "br", "hr"}
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"' {{ 7 * 7 }} </style> & \u202e\x00\ud800"


class Page(HTMLParser):
    """Elements with their attributes; fails where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} is there twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    comparison = example()
    return render_page(comparison, draw_plots(tmp_path_factory.mktemp("plots"), comparison))


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_nothing_is_loaded(page: Page, text: str) -> None:
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "poster", "data", "action", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#")), value
    assert not page.all("link")
    assert all("src" not in script for script in page.all("script"))
    assert not re.search(r"https?:|//\w+\.\w|@import|url\(", re.sub(r"data:image/\w+;base64,[\w+/=]+", "", text))
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_the_verdict_comes_first_and_everything_is_there(page: Page) -> None:
    headings = [text for tag, text in page.texts if tag == "h2"]
    assert headings == ["Verdict", "Numbers", "Plots", "Pictures"]
    # Two rewards, runs against each other, diversity, costs.
    assert len(page.all("table")) == 5
    assert len(page.all("figure")) == 5  # over NFE, over budget, diversity, two runs with scales
    assert len(page.all("article")) == 2
    pictures = [image for image in page.all("img") if (image.get("src") or "").startswith("data:image/webp")]
    assert len(pictures) == 2 * len(GAINS)


def test_it_can_be_read_on_a_phone_by_keyboard_and_aloud(page: Page, text: str) -> None:
    assert page.all("html")[0]["lang"] == "en"
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    assert "prefers-color-scheme: dark" in text
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for _, attributes in page.elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name) in (None, *ids)
    assert all("alt" in image for image in page.all("img"))
    assert all("aria-label" in field for field in page.all("input"))
    scrolling = [a for _, a in page.elements if a.get("class") == "scroll"]
    assert scrolling
    assert all(a["tabindex"] == "0" for a in scrolling)


def test_prompts_and_labels_are_text_and_never_markup() -> None:
    prompts = (EVIL, "x" * 10_000)
    plain, comparison = Page(render_page(example())), example(prompts, title=EVIL)
    run = replace(comparison.contenders[1], folder=EVIL, method=EVIL)
    comparison = replace(comparison, model=EVIL, contenders=(comparison.base, run, *comparison.contenders[2:]))
    made = render_page(comparison)
    made.encode()  # lone surrogates would not do
    page = Page(made)
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    shown = [text for tag, text in page.texts if tag == "p"]
    assert clean(EVIL) in shown
    assert prompts[1] in shown
    assert "49" not in clean(EVIL)
    assert "overflow-wrap: anywhere" in made
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_every_cell_can_be_sorted_by(page: Page) -> None:
    cells = [a for tag, a in page.elements if tag == "td" or (tag == "th" and a.get("scope") == "row")]
    assert cells
    for cell in cells:
        assert "data-key" in cell
        if "number" in (cell.get("class") or "").split() and cell["data-key"]:
            float(cell["data-key"])


def test_a_picture_is_stored_once(text: str) -> None:
    for uri in set(re.findall(r"data:image/webp;base64,[\w+/=]+", text)):
        assert text.count(f'"{uri}"') == 1
    assert len(text) < 2_000_000


@pytest.mark.skipif(shutil.which("node") is None, reason="the script is tried where there is a node")
def test_sorting_keeps_missing_numbers_last(tmp_path: Path) -> None:
    script = resources.files("calibri_lightning.tools.compare.page").joinpath("report.js").read_text(encoding="utf-8")
    order = script[script.index("const order") : script.index("};") + 2]
    code = f'{order} console.log(["10", "-2", "9.5"].sort(order).join(), ["b", "a"].sort(order).join())'
    done = subprocess.run(["node", "-e", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "-2,9.5,10 a,b"
