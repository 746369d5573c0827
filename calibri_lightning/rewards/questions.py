"""What a model that sees is asked about a picture, and how its answer becomes a number.

Nothing here knows where the model runs: in this process (`calibri_lightning.rewards.vqa`) or behind a server that
reports the log-probabilities of its first token. All numbers are probabilities in 0..1.

VQAScore (Lin et al., arXiv 2404.01291): the probability of "Yes" to one question about the whole prompt.
Soft-TIFA (Kamath et al., GenEval 2, arXiv 2512.16853): the mean of the probabilities of the expected answers to one
question for each thing that the prompt asks for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt

Mean = Literal["geometric", "arithmetic"]

VQASCORE_TEMPLATE = 'Does this figure show "{text}"? Please answer yes or no.'
"""The question of VQAScore (arXiv 2404.01291); {text} is the prompt."""
SOFT_TIFA_TEMPLATE = "{question} Answer in one word."
"""What GenEval 2 makes of a question (`soft_tifa` in evaluation.py of facebookresearch/GenEval2)."""
QUESTION_KEYS: tuple[str, ...] = ("questions", "vqa_list")
"""Metadata that can hold a prompt's questions; the second is GenEval 2's own. The first one that is there is taken."""

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_EXAMPLE = '[{"question": "How many dogs are in the image?", "answer": "two"}]'


@dataclass(frozen=True)
class Atom:
    """One thing that a prompt asks for.

    Attributes:
        question: A question about the picture.
        answer: Its answer if the picture is right.
    """

    question: str
    answer: str


@dataclass(frozen=True)
class Query:
    """One question about one picture.

    Attributes:
        picture: Its place in the batch.
        question: What the model is asked, template and all.
        answers: Answers whose probabilities are wanted.
    """

    picture: int
    question: str
    answers: tuple[str, ...]


def fill(template: str, field: str, value: str) -> str:
    """Puts a text into a template; braces in the text stay as they are.

    Args:
        template: A template with {field} in it.
        field: The name in braces.
        value: The text.

    Returns:
        The question.
    """
    return template.replace(f"{{{field}}}", value)


def check_template(reward: str, template: object, field: str) -> None:
    """Refuses a template that does not ask about the prompt.

    Args:
        reward: Name of the reward, for the message.
        template: The template.
        field: What must stand in it in braces.

    Raises:
        UserError: If it does not stand there once.
    """
    if not isinstance(template, str) or template.count(f"{{{field}}}") != 1:
        raise UserError(
            f"The template of the reward {reward!r} is {template!r}; it must be a text with {{{field}}} in it once, "
            f"for instance {VQASCORE_TEMPLATE if field == 'text' else SOFT_TIFA_TEMPLATE!r}."
        )


def answer_forms(answer: str) -> tuple[str, ...]:
    """The ways to write an answer that count as that answer.

    As in GenEval 2: as it stands, in lower case and capitalised; a number also as the digit or the word. GenEval 2
    counts a form twice where two of them are the same; here each counts once.

    Args:
        answer: The answer, for instance "Yes" or "two".

    Returns:
        Different texts without space around them, the answer itself first.
    """
    bare = answer.strip()
    lower = bare.lower()
    forms = [bare, lower, lower.capitalize()]
    if lower in _NUMBERS:
        forms.append(str(_NUMBERS.index(lower)))
    elif bare.isascii() and bare.isdigit() and int(bare) < len(_NUMBERS):
        word = _NUMBERS[int(bare)]
        forms += [word, word.capitalize()]
    return tuple(dict.fromkeys(forms))


def share_of_yes(yes: float, no: float) -> float:
    """P(yes) / (P(yes) + P(no)): what Flow-Factory's `vllm_evaluate` takes (arXiv 2602.12529).

    Args:
        yes: Probability of "Yes".
        no: Probability of "No".

    Returns:
        The share; NaN if both are 0: the model answered something else.
    """
    return yes / (yes + no) if yes + no > 0 else math.nan


def mean(probabilities: Sequence[float], kind: Mean) -> float:
    """The mean of a picture's probabilities (GenEval 2, arXiv 2512.16853, Soft-TIFA AM and GM).

    Args:
        probabilities: One for each of its questions; at least one.
        kind: Geometric: near 0 as soon as one answer is wrong, an estimate for the whole prompt. Arithmetic: an
            estimate for its parts.

    Returns:
        The mean; NaN if one of them is.
    """
    if kind == "arithmetic":
        return math.fsum(probabilities) / len(probabilities)
    if 0 in probabilities:
        return math.nan if any(math.isnan(value) for value in probabilities) else 0.0
    return math.exp(math.fsum(math.log(value) for value in probabilities) / len(probabilities))


def check_mean(reward: str, kind: object) -> None:
    """Refuses an unknown mean.

    Args:
        reward: Name of the reward, for the message.
        kind: The mean.

    Raises:
        UserError: If there is none of that name.
    """
    if kind not in get_args(Mean):
        raise UserError(f"mean of the reward {reward!r} is {kind!r}; it must be {' or '.join(get_args(Mean))}.")


def atoms_of(prompt: Prompt, reward: str) -> tuple[Atom, ...]:
    """Reads the questions of a prompt from its metadata.

    Args:
        prompt: The prompt; its metadata has "questions", a list of {"question": ..., "answer": ...}, or GenEval 2's
            "vqa_list", a list of [question, answer]. A text that holds such a list as JSON (a cell of a .csv) will do.
        reward: Name of the reward, for the message.

    Returns:
        The questions with their expected answers, at least one.

    Raises:
        UserError: If there are none, or they have another form.
    """
    key = next((key for key in QUESTION_KEYS if key in prompt.metadata), None)
    where = f"The reward {reward!r} cannot score the prompt {prompt.text!r} (row {prompt.index + 1})"
    rule = f"the rule is a list of questions with their answers, for instance {_EXAMPLE}"
    if key is None:
        raise UserError(
            f"{where}: it has no questions; {rule}. Give each prompt a column 'questions' (.jsonl, .json or .parquet), "
            "or use vqascore, which asks about the whole prompt."
        )
    value = prompt.metadata[key]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise UserError(f"{where}: its column {key!r} holds {value!r:.80}, which is no JSON; {rule}.") from None
    rows = value if isinstance(value, Sequence) and not isinstance(value, str) else []
    atoms = tuple(_atom(row) for row in rows)
    if not atoms or None in atoms:
        raise UserError(f"{where}: its column {key!r} holds {value!r:.80}; {rule}. Correct the column.")
    return tuple(atom for atom in atoms if atom is not None)


def _atom(row: object) -> Atom | None:
    if isinstance(row, Mapping):
        pair: Sequence[object] = (row.get("question"), row.get("answer"))
    elif isinstance(row, Sequence) and not isinstance(row, str) and len(row) == 2:
        pair = row
    else:
        return None
    question, answer = pair
    # A number is an answer that a table gives without its quotes.
    if isinstance(answer, int) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(question, str) or not isinstance(answer, str) or not question.strip() or not answer.strip():
        return None
    return Atom(question.strip(), answer.strip())
