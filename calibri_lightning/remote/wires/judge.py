"""Vision-language models as judges, behind the OpenAI chat API as vLLM and sglang serve it.

One request asks about one picture. The score is either the probability of Yes (VQAScore, Lin et al. 2024,
https://arxiv.org/abs/2404.01291), from the log-probabilities of a single token, or a number that the model writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from calibri_lightning.errors import UserError
from calibri_lightning.remote.errors import sanitised
from calibri_lightning.remote.wire import Batch, BatchScores, HttpRequest, Wire, WireError
from calibri_lightning.remote.wires.answers import NumberRule, chosen, probability_of_yes, written
from calibri_lightning.remote.wires.bodies import pngs
from calibri_lightning.remote.wires.options import check_choice, check_integer
from calibri_lightning.remote.wires.replies import entries, mapping, needed, read_json
from calibri_lightning.rewards.questions import VQASCORE_TEMPLATE
from calibri_lightning.serving.protocol import RewardInfo

Score = Literal["yes_ratio", "yes", "number"]

_FINAL_SCORE = r"Final Score:\s*([-+]?\d+(?:\.\d+)?)"
_RESERVED = ("model", "messages", "temperature", "seed", "max_tokens", "logprobs", "top_logprobs", "n", "stream")


class JudgeWire(Wire):
    """POST /v1/chat/completions for each picture."""

    name = "openai"
    max_items = 1

    def __init__(
        self,
        reward: str,
        model: str | None = None,
        question: str = VQASCORE_TEMPLATE,
        score: Score = "yes_ratio",
        pattern: str = _FINAL_SCORE,
        low: float = 1.0,
        high: float = 5.0,
        max_tokens: int | None = None,
        seed: int = 0,
        health: str = "/health",
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        """Sets it up.

        Args:
            reward: Name of the reward.
            model: The model's name on the server; may be left out where the server has a single one.
            question: What is asked about the picture; {text} stands for its prompt.
            score: `yes_ratio` for P(yes) / (P(yes) + P(no)), `yes` for P(yes) alone, `number` for a number in the text.
            pattern: With `number`, a regular expression whose first group is it; its last match counts.
            low: With `number`, the smallest one that is an answer.
            high: With `number`, the largest one.
            max_tokens: Length of the answer; 1 if left out, or 1024 with `number`.
            seed: Seed of the server's sampling, which temperature 0 should make unnecessary.
            health: Path that answers 200 when the server is ready; `/v1/models` for servers without `/health`.
            extra_body: Further fields of the request, such as {chat_template_kwargs: {enable_thinking: false}}.

        Raises:
            UserError: If an option has a value that it cannot have.
        """
        check_choice(self.name, "score", score, Score)
        length = max_tokens if max_tokens is not None else (1024 if score == "number" else 1)
        check_integer(self.name, "max_tokens", length, 1, 1 << 16)
        check_integer(self.name, "seed", seed, 0, 2**31 - 1)
        self._rule = NumberRule.checked(pattern, low, high)
        self._question = _checked_question(question)
        self._extra = _checked_extra(extra_body or {})
        if not isinstance(health, str) or not health.startswith("/"):
            raise UserError(
                f"The option health of the wire {self.name!r} is {health!r}; it must be a path, as /health."
            )
        self._reward, self._model, self._score, self._health = reward, model, score, health
        self._length, self._seed = length, seed

    def describe(self) -> RewardInfo | None:
        """Says what judges, once it is known; servers do not tell the revision of its weights."""
        if self._model is None:
            return None
        asked = f"{self._score}: {self._question}"
        return RewardInfo(name=self._reward, model=self._model, revision="unknown", preprocessing=asked, pixels="uint8")

    def probe(self) -> HttpRequest:
        """Asks whether the server is ready; the status is the answer.

        Returns:
            The request.
        """
        return HttpRequest("GET", self._health)

    def roster(self) -> HttpRequest:
        """Asks which models the server has.

        Returns:
            The request.
        """
        return HttpRequest("GET", "/v1/models")

    def accept_roster(self, body: bytes) -> None:
        """Reads which models the server has; without a name of its own, the wire takes the only one.

        Args:
            body: The answer.

        Raises:
            UserError: If the model is not among them, or none was named and they are several.
            WireError: If the answer cannot be read.
        """
        listed = needed(mapping(read_json(body), "the answer of /v1/models"), "data")
        found = [mapping(entry, "a model").get("id") for entry in listed] if isinstance(listed, list) else []
        names = [name for name in found if isinstance(name, str)]
        if not names or len(names) != len(found):
            raise WireError("the server does not say which models it has: data must be a list of objects with an id")
        if self._model is None and len(names) > 1:
            raise UserError(f"The server has the models {sanitised(', '.join(names))}. Say which one judges: model.")
        if self._model is not None and self._model not in names:
            raise UserError(
                f"The server has no model {self._model!r}; it has {sanitised(', '.join(names))}. Correct the option "
                "model, or start the server with it; all servers of a reward must have the same one."
            )
        self._model = names[0] if self._model is None else self._model

    def request(self, batch: Batch) -> HttpRequest:
        """Asks about one picture.

        Args:
            batch: One picture.

        Returns:
            The request.

        Raises:
            UserError: If it is not known which model to ask.
        """
        assert len(batch.prompts) == 1, "max_items is 1"
        if self._model is None:
            raise UserError(f"The wire {self.name!r} does not know which model to ask. Name it: model.")
        [picture] = pngs(batch)
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
            # Not `format`: braces in prompts are no fields.
            {"type": "text", "text": self._question.replace("{text}", batch.prompts[0].text)},
        ]
        asked: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0.0,
            "seed": self._seed,
            "max_tokens": self._length,
        }
        if self._score != "number":
            # 20 is the most that servers give unless told otherwise (vLLM: --max-logprobs).
            asked |= {"logprobs": True, "top_logprobs": 20}
        return HttpRequest("POST", "/v1/chat/completions", json.dumps({**asked, **self._extra}).encode())

    def parse(self, batch: Batch, body: bytes) -> BatchScores:
        """Reads what the model thinks of the picture.

        Args:
            batch: The picture that was sent.
            body: The answer.

        Returns:
            Its score; NaN, with the reason, if the model answered neither yes nor no, or no number of the range.

        Raises:
            WireError: If the answer is no chat completion, or has no log-probabilities.
        """
        reply = mapping(read_json(body), "the reply")
        choice = mapping(entries(needed(reply, "choices"), 1, "choices")[0], "choices[0]")
        if self._score == "number":
            score, reason = written(choice, self._rule)
        else:
            score, reason = probability_of_yes(chosen(choice), alone=self._score == "yes")
        return BatchScores({self._reward: np.array([score])}, {0: reason} if reason else {})


def _checked_question(question: str) -> str:
    fields = re.findall(r"\{\w+\}", question) if isinstance(question, str) else []
    unknown = [field for field in fields if field != "{text}"]
    if not isinstance(question, str) or not question.strip() or unknown:
        what = unknown[0] if unknown else question
        raise UserError(
            f"The option question of the wire 'openai' has {what!r}; it must be a text, in which {{text}} alone is "
            "replaced. Correct the question."
        )
    return question


def _checked_extra(extra: Mapping[str, Any]) -> dict[str, Any]:
    reserved = [key for key in extra if key in _RESERVED]
    if reserved:
        raise UserError(
            f"The option extra_body of the wire 'openai' sets {reserved[0]!r}, which the wire sets itself. Leave it "
            "out, and use the wire's option of that name if there is one."
        )
    try:
        json.dumps(dict(extra), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"The option extra_body of the wire 'openai' is no JSON: {error}. Correct it.") from error
    return dict(extra)
