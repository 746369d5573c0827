"""The report in a real browser: it sorts, slides, fits a phone, is dark where that is asked for, and loads nothing."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import DESKTOP, PHONE, browser, emulate, eventually, requests
from comparisons import GAINS, example
from PIL import Image

from calibri_lightning.tools.compare import write_report

PROMPTS = ("a red circle", "<script>window.harmed = 1</script><img src=x onerror='window.harmed = 2'>", "word " * 2000)
OVERFLOW = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        found.report = write_report(tmp_path_factory.mktemp("out") / "report", example(PROMPTS, PROMPTS[1]))[0]
        yield found


@pytest.fixture
def page(window: Any) -> Iterator[Any]:
    """The page, just opened; after the test, nothing was complained about and nothing loaded."""
    emulate(window)
    window.get_log("browser")
    requests(window)
    window.get(Path(window.report).as_uri())
    yield window
    assert window.get_log("browser") == []
    asked = requests(window)
    assert any(url.startswith("file://") for url in asked)
    assert all(url.startswith(("file://", "data:")) for url in asked)
    assert {url for url in asked if url.startswith("file://")} <= {Path(window.report).as_uri()} | {
        f"{Path(window.report).as_uri()}#{part}" for part in ("numbers", "plots", "gallery")
    }


def first_column(page: Any, table: int) -> list[str]:
    rows = page.find_elements("css selector", "table.sortable")[table].find_elements("css selector", "tbody tr")
    return [row.find_element("css selector", "th").text for row in rows if row.is_displayed()]


def head(page: Any, table: int, name: str) -> Any:
    heads = page.find_elements("css selector", "table.sortable")[table].find_elements("css selector", "thead th")
    return next(each for each in heads if each.text.split("\n")[0].strip() == name)


def test_tables_sort_by_mouse_and_by_keyboard_and_say_so(page: Any) -> None:
    names = list(GAINS)
    assert first_column(page, 0) == names, "one number of steps is shown at first"
    mean = head(page, 0, "mean")
    mean.find_element("css selector", "button").click()
    assert mean.get_attribute("aria-sort") == "descending"
    assert first_column(page, 0) == names[::-1]
    mean.find_element("css selector", "button").send_keys("\n")
    assert mean.get_attribute("aria-sort") == "ascending"
    assert first_column(page, 0) == names
    over = head(page, 0, "over equal NFE")
    for _ in range(2):  # what is missing, the base's, is last both ways
        over.find_element("css selector", "button").click()
        assert first_column(page, 0)[-1] == "base"
    assert mean.get_attribute("aria-sort") is None


def test_tables_show_one_number_of_steps_or_all(page: Any) -> None:
    buttons = {b.text: b for b in page.find_elements("css selector", ".filter button")}
    assert list(buttons) == ["8", "28", "all"]
    for name, count in (("all", 8), ("28", 4), ("8", 4)):
        buttons[name].click()
        assert len(first_column(page, 0)) == count
        assert buttons[name].get_attribute("aria-pressed") == "true"


def shown(page: Any, stage: Any) -> np.ndarray:
    """The pixels of a slider, without its line: two thirds to the right of the middle, and as much to the left."""
    with Image.open(io.BytesIO(base64.b64decode(stage.screenshot_as_base64))) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    width = pixels.shape[1]
    return np.stack([pixels[:, width // 3 - 4 : width // 3 + 4], pixels[:, 2 * width // 3 - 4 : 2 * width // 3 + 4]])


def test_the_slider_changes_the_picture_by_keyboard_mouse_and_touch(page: Any) -> None:
    from selenium.webdriver import ActionChains

    stage = page.find_element("css selector", ".stage")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", stage)
    knob = stage.find_element("css selector", "input")
    half = shown(page, stage)
    page.execute_script("arguments[0].focus()", knob)
    knob.send_keys("\ue010")  # End: all of the left picture, the base
    all_base = shown(page, stage)
    assert np.array_equal(all_base[0], half[0]), "left of the middle it was the base already"
    assert not np.array_equal(all_base[1], half[1])
    knob.send_keys("\ue011")  # Home: all of the right one
    all_after = shown(page, stage)
    assert not np.array_equal(all_after[0], all_base[0])
    assert np.array_equal(all_after[1], half[1])
    width = stage.size["width"]
    ActionChains(page).move_to_element(stage).click_and_hold().move_by_offset(width // 2 - 2, 0).release().perform()
    assert int(knob.get_attribute("value")) > 95
    assert np.array_equal(shown(page, stage), all_base)
    box = page.execute_script("const b = arguments[0].getBoundingClientRect(); return [b.x, b.y, b.width]", stage)
    touch(page, box[0] + 0.9 * box[2], box[1] + 50, -0.8 * box[2], 0)
    assert eventually(lambda: int(knob.get_attribute("value")) < 15)


def touch(page: Any, x: float, y: float, dx: float, dy: float) -> None:
    """A finger goes down, moves and goes up."""
    for kind, part in (("touchStart", 0.0), *(("touchMove", i / 5) for i in range(1, 6)), ("touchEnd", None)):
        points = [] if part is None else [{"x": x + part * dx, "y": y + part * dy}]
        page.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})


def test_any_two_pictures_can_be_laid_over_each_other(page: Any) -> None:
    stage = page.find_element("css selector", ".stage")
    cards = page.find_elements("css selector", ".prompt:first-of-type .card")
    assert [card.get_attribute("aria-pressed") for card in cards] == ["false", "false", "false", "true"]
    cards[1].click()
    assert [card.get_attribute("aria-pressed") for card in cards] == ["false", "true", "false", "false"]
    sources = [card.find_element("css selector", "img").get_attribute("src") for card in cards]
    assert stage.find_element("css selector", ".after").get_attribute("src") == sources[1]
    left = page.find_element("css selector", "select.left")
    left.send_keys("stacked")
    assert eventually(lambda: stage.find_element("css selector", ".before").get_attribute("src") == sources[3])


def test_a_phone_never_scrolls_sideways_and_tables_do_inside_their_box(page: Any) -> None:
    for size in (PHONE, (320, 640), DESKTOP):
        emulate(page, size)
        assert page.execute_script(OVERFLOW) == 0, size
    emulate(page, PHONE)
    assert page.execute_script("const b = document.querySelector('.scroll'); return b.scrollWidth > b.clientWidth")
    text = page.find_elements("css selector", ".text")[2]
    assert text.size["height"] < 200, "a prompt of 10,000 characters scrolls in a box of its own"


def test_dark_is_dark_and_light_is_light_and_text_can_be_read_in_both(page: Any) -> None:
    paper = {}
    for scheme in ("light", "dark"):
        emulate(page, scheme=scheme)
        paper[scheme] = luminance(style(page, "body", "background-color"))
        for part in (
            ".lead",
            ".note",
            ".facts",
            ".gain.up",
            ".place b.down",
            ".score",
            ".best",
            "thead button",
            "nav a",
        ):
            box = luminance(page.execute_script(BEHIND, page.find_element("css selector", part)))
            ink = luminance(style(page, part, "color"))
            contrast = (max(ink, box) + 0.05) / (min(ink, box) + 0.05)
            assert contrast >= 4.5, (scheme, part, contrast)  # WCAG 2.2, 1.4.3
    assert paper["dark"] < 0.05 < 0.8 < paper["light"]


BEHIND = """
for (let e = arguments[0]; e; e = e.parentElement) {
  const colour = getComputedStyle(e).backgroundColor;
  if (!colour.endsWith(", 0)")) return colour;
}
"""


def style(page: Any, part: str, name: str) -> str:
    return page.find_element("css selector", part).value_of_css_property(name)


def luminance(colour: str) -> float:
    """Relative luminance of an sRGB colour such as rgb(0, 95, 148) (WCAG 2.2)."""
    values = np.array([float(v) for v in colour[colour.index("(") + 1 : -1].split(",")[:3]]) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_prompts_and_titles_are_text_and_nothing_else(page: Any) -> None:
    assert page.execute_script("return window.harmed === undefined")
    assert page.find_element("css selector", "h1").text == PROMPTS[1]
    assert page.find_elements("css selector", ".text")[1].text == PROMPTS[1]


def test_nothing_moves_while_the_page_is_built(page: Any) -> None:
    shifts = page.execute_async_script(
        "const done = arguments[0]; let sum = 0; new PerformanceObserver((list) => {"
        " for (const e of list.getEntries()) sum += e.value; }).observe({type: 'layout-shift', buffered: true});"
        " setTimeout(() => done(sum), 200);"
    )
    assert shifts < 0.02


def test_without_scripts_all_rows_and_pictures_are_there(page: Any) -> None:
    page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page.refresh()
        assert len(page.find_elements("css selector", ".card img")) == 4 * len(PROMPTS)
        assert not page.find_element("css selector", ".stage").is_displayed()
        rows = page.find_element("css selector", "table.sortable").find_elements("css selector", "tbody tr")
        assert [row.is_displayed() for row in rows] == [True] * 8
    finally:
        page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
