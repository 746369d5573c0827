"""The servers of Flow-GRPO: GenEval (port 18085) and DeQA (port 18086).

They are spoken to in pickles and JPEG files (https://github.com/yifan123/reward-server, app_geneval.py, app_deqa.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.remote import plain_pickle
from calibri_lightning.remote.wire import Batch, BatchScores, HttpRequest, Wire
from calibri_lightning.remote.wires.bodies import jpegs, plain_metadata
from calibri_lightning.remote.wires.options import check_choice
from calibri_lightning.remote.wires.replies import mapping, needed, numbers

Key = Literal["scores", "rewards", "strict_rewards", "outputs"]

# Pillow's own default, which the clients of these servers leave as it is.
_QUALITY = 75
_EXTRAS: Mapping[str, str] = {"scores": "partial", "rewards": "correct", "strict_rewards": "strict"}


class FlowGrpoWire(Wire):
    """POST / with a pickle of JPEG files and what GenEval knows of prompts; the reply is a pickle of lists."""

    name = "flow-grpo"
    # That of the official client.
    max_items = 64

    def __init__(self, reward: str, key: Key = "scores") -> None:
        """Sets it up.

        Args:
            reward: Name of the reward.
            key: What is optimised. GenEval's `scores` are partial credit, which can be negative where there are too
                many objects; its `strict_rewards` are 1 where every count, colour and position is right; its
                `rewards` are GenEval's own rule, by which more objects than asked for are right, too. DeQA has
                `outputs`, its score from 1 to 5 divided by 5.

        Raises:
            UserError: If there is no such key.
        """
        check_choice(self.name, "key", key, Key)
        self._reward, self._key = reward, key
        # The server evaluates its `rewards` only when asked for more than strict ones, and says 0 for all otherwise.
        self._only_strict = key != "rewards"
        others = [name for name in _EXTRAS if name != key and not (name == "rewards" and self._only_strict)]
        self._extras = {} if key == "outputs" else {f"{reward}_{_EXTRAS[name]}": name for name in others}
        self.extra_names = tuple(self._extras)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuses prompts that GenEval would raise on, or score 0 whatever the picture.

        Args:
            prompts: The prompts.

        Raises:
            UserError: If one has no objects to look for, or they are not what GenEval reads.
        """
        if self._key != "outputs":
            for prompt in prompts:
                _check_geneval(prompt)

    def request(self, batch: Batch) -> HttpRequest:
        """Asks for the scores of a batch.

        Args:
            batch: The pictures.

        Returns:
            The request.
        """
        asked: dict[str, object] = {"images": jpegs(batch, _QUALITY)}
        if self._key != "outputs":
            # The prompt itself is no metadata here, but GenEval reads it there.
            asked["meta_datas"] = [{**plain_metadata(prompt), "prompt": prompt.text} for prompt in batch.prompts]
            asked["only_strict"] = self._only_strict
        return HttpRequest("POST", "/", plain_pickle.dumps(asked), "application/octet-stream")

    def parse(self, batch: Batch, body: bytes) -> BatchScores:
        """Reads the scores.

        Args:
            batch: The pictures that were sent.
            body: The answer.

        Returns:
            The scores; GenEval's are not within 0..1.

        Raises:
            WireError: If the answer is no pickle of one finite score for each picture.
        """
        reply = mapping(plain_pickle.loads(body), "the reply")
        keys = {self._reward: self._key, **self._extras}
        return BatchScores({name: numbers(needed(reply, key), len(batch.prompts), key) for name, key in keys.items()})


def _check_geneval(prompt: Prompt) -> None:
    objects = prompt.metadata.get("include")
    excluded = prompt.metadata.get("exclude", [])
    if not _are_objects(objects) or not objects or not _are_objects(excluded) or "tag" not in prompt.metadata:
        raise UserError(
            f"GenEval cannot score pictures of the prompt {prompt.text!r}: its metadata are {sorted(prompt.metadata)}. "
            "It needs `tag` (such as counting) and `include`, a list of objects with `class` and `count` of 1 or more, "
            "and perhaps `color` and `position`; `exclude` likewise. Take prompts from GenEval's own .jsonl files."
        )
    plain_metadata(prompt)


def _are_objects(found: object) -> bool:
    return isinstance(found, list | tuple) and all(_is_object(each) for each in found)


def _is_object(found: Any) -> bool:
    if not isinstance(found, Mapping) or not isinstance(found.get("class"), str):
        return False
    count = found.get("count")
    return isinstance(count, int) and not isinstance(count, bool) and count >= 1
