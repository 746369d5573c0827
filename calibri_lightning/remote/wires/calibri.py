"""The servers of the official Calibri code: HPSv3 (port 18087) and Q-Align (port 18088).

They are spoken to in pickles and JPEG files (https://github.com/v-gen-ai/Calibri, src/metrics/*_server.py).
"""

from __future__ import annotations

from typing import Literal

from calibri_lightning.remote import plain_pickle
from calibri_lightning.remote.wire import Batch, BatchScores, HttpRequest, Wire
from calibri_lightning.remote.wires.bodies import jpegs, texts
from calibri_lightning.remote.wires.options import check_choice
from calibri_lightning.remote.wires.replies import mapping, needed, numbers

Task = Literal["quality", "aesthetics"]

_QUALITY = 95


class CalibriWire(Wire):
    """POST / with a pickle of JPEG files and prompts; the reply is a pickle of scores."""

    name = "calibri"
    # That of the official clients, which split for the sake of HPSv3's memory.
    max_items = 8

    def __init__(self, reward: str, task: Task | None = None) -> None:
        """Sets it up.

        Args:
            reward: Name of the reward.
            task: What Q-Align is asked; leave it out for HPSv3. Q-Align sees no prompts.

        Raises:
            UserError: If there is no such task.
        """
        if task is not None:
            check_choice(self.name, "task", task, Task)
        self._reward, self._task = reward, task

    def request(self, batch: Batch) -> HttpRequest:
        """Asks for the scores of a batch.

        Args:
            batch: The pictures.

        Returns:
            The request.
        """
        files = jpegs(batch, _QUALITY)
        asked = {"prompts": texts(batch.prompts)} if self._task is None else {"task": self._task, "input": "image"}
        return HttpRequest("POST", "/", plain_pickle.dumps({"images": files, **asked}), "application/octet-stream")

    def parse(self, batch: Batch, body: bytes) -> BatchScores:
        """Reads the scores.

        Args:
            batch: The pictures that were sent.
            body: The answer.

        Returns:
            The scores.

        Raises:
            WireError: If the answer is no pickle of one finite score for each picture.
        """
        reply = mapping(plain_pickle.loads(body), "the reply")
        return BatchScores({self._reward: numbers(needed(reply, "scores"), len(batch.prompts), "scores")})
