from __future__ import annotations

import math
import sys

import pytest

from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.rewards.questions import (
    Atom,
    answer_forms,
    atoms_of,
    check_template,
    fill,
    mean,
    share_of_yes,
)


@pytest.mark.parametrize(
    ("answer", "forms"),
    [
        ("Yes", {"Yes", "yes"}),
        ("no", {"no", "No"}),
        ("two", {"two", "Two", "2"}),
        ("2", {"2", "two", "Two"}),
        ("TEN", {"TEN", "ten", "Ten", "10"}),
        ("40", {"40"}),
        ("²", {"²"}),
        (" dark Blue ", {"dark Blue", "dark blue", "Dark blue"}),
    ],
)
def test_ways_to_write_an_answer(answer: str, forms: set[str]) -> None:
    found = answer_forms(answer)
    assert set(found) == forms
    assert len(found) == len(forms), "each counts once"
    assert found[0] == answer.strip()


def test_shares_and_means() -> None:
    assert share_of_yes(0.6, 0.2) == pytest.approx(0.75)
    assert math.isnan(share_of_yes(0.0, 0.0))
    assert mean([0.1, 0.4], "geometric") == pytest.approx(0.2)
    assert mean([0.1, 0.4], "arithmetic") == pytest.approx(0.25)
    assert mean([0.0, 1.0], "geometric") == 0
    assert mean([1e-300] * 3, "geometric") == pytest.approx(1e-300), "products would underflow"
    for kind in ("geometric", "arithmetic"):
        assert math.isnan(mean([0.0, math.nan], kind))
        assert mean([0.3] * 7, kind) == pytest.approx(0.3)


def test_braces_in_a_prompt_stay() -> None:
    assert fill('Does it show "{text}"?', "text", "{a} {text}") == 'Does it show "{a} {text}"?'
    check_template("vqascore", "{text} {more}", "text")
    for wrong in ("", "{text}{text}", None):
        with pytest.raises(UserError, match="in it once"):
            check_template("vqascore", wrong, "text")


@pytest.mark.parametrize(
    "metadata",
    [
        {
            "questions": [
                {"question": "How many?", "answer": "two"},
                {"question": "Red?", "answer": "Yes", "skill": "x"},
            ]
        },
        {"vqa_list": [["How many?", "two"], ["Red?", "Yes"]]},
        {"questions": (("How many? ", "two"), ("Red?", " Yes")), "vqa_list": 7},
        {"vqa_list": '[["How many?", "two"], ["Red?", "Yes"]]'},
    ],
)
def test_forms_of_questions(metadata: dict[str, object]) -> None:
    assert atoms_of(Prompt("x", 0, metadata), "soft_tifa") == (Atom("How many?", "two"), Atom("Red?", "Yes"))


def test_numbers_are_answers() -> None:
    assert atoms_of(Prompt("x", 0, {"questions": [["How many?", 2]]}), "soft_tifa") == (Atom("How many?", "2"),)


@pytest.mark.parametrize(
    "value",
    [
        [],
        None,
        3,
        {"question": "a", "answer": "b"},
        [["a"]],
        [["a", ""]],
        [["a", True]],
        ["ab"],
        [{"question": "a"}],
        "5",
    ],
)
def test_other_forms_are_refused(value: object) -> None:
    with pytest.raises(
        UserError, match=r"cannot score the prompt 'x' \(row 8\): its column 'questions' holds .*for inst"
    ):
        atoms_of(Prompt("x", 7, {"questions": value}), "soft_tifa")


def test_a_text_that_is_no_json_is_refused() -> None:
    with pytest.raises(UserError, match="holds 'How many.*which is no JSON"):
        atoms_of(Prompt("x", 0, {"questions": "How many?"}), "soft_tifa")


def test_questions_need_no_torch() -> None:
    """A server's client asks the same questions; importing them must not bring more than the package itself does."""
    import ast
    import inspect

    from calibri_lightning.rewards import questions

    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(inspect.getsource(questions)))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= {*sys.stdlib_module_names, "calibri_lightning"}
