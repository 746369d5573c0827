"""The servers of Flow-Factory, written after its template.

They are spoken to in JSON and PNG files (https://github.com/X-GenGroup/Flow-Factory, reward_server/example_server.py
and rewards/my_reward_remote.py). The client there sends `prompt` and `image`, but the template reads `prompts` and
`images`: a server that works with that client has changed its template.
"""

from __future__ import annotations

import json
from typing import Literal

from calibri_lightning.remote.wire import Batch, BatchScores, HttpRequest, NotReadyError, Wire, WireError
from calibri_lightning.remote.wires.bodies import pngs, texts
from calibri_lightning.remote.wires.options import check_choice
from calibri_lightning.remote.wires.replies import mapping, needed, numbers, read_json, told

Fields = Literal["client", "template"]

_UNUSED = ("video", "condition_images", "condition_videos", "kwargs")


class FlowFactoryWire(Wire):
    """POST /compute with JSON; the reply is a list of rewards. GET /health says whether the server runs."""

    name = "flow-factory"

    def __init__(self, reward: str, fields: Fields = "client") -> None:
        """Sets it up.

        Args:
            reward: Name of the reward.
            fields: How the server names what it reads: `client` for prompt and image, as Flow-Factory's client sends
                them, `template` for prompts and images, as its example of a server reads them.

        Raises:
            UserError: If there are no such fields.
        """
        check_choice(self.name, "fields", fields, Fields)
        self._reward, self._fields = reward, fields

    def probe(self) -> HttpRequest:
        """Asks whether the server runs.

        Returns:
            The request.
        """
        return HttpRequest("GET", "/health")

    def accept_probe(self, body: bytes) -> None:
        """Reads the answer to the probe.

        Args:
            body: The answer.

        Raises:
            NotReadyError: If it is not ok.
            WireError: If it cannot be read.
        """
        status = mapping(read_json(body), "the answer of /health").get("status")
        if status != "ok":
            raise NotReadyError(f"the server says of its health {told(status)!r}, not 'ok'")

    def request(self, batch: Batch) -> HttpRequest:
        """Asks for the scores of a batch.

        Args:
            batch: The pictures.

        Returns:
            The request.
        """
        files, prompts = pngs(batch), texts(batch.prompts)
        if self._fields == "client":
            asked = {"prompt": prompts, "image": files, **dict.fromkeys(_UNUSED)}
        else:
            asked = {"prompts": prompts, "images": files}
        return HttpRequest("POST", "/compute", json.dumps(asked).encode())

    def parse(self, batch: Batch, body: bytes) -> BatchScores:
        """Reads the scores.

        Args:
            batch: The pictures that were sent.
            body: The answer.

        Returns:
            The scores.

        Raises:
            WireError: If the answer names an error, or is not one finite score for each picture.
        """
        reply = mapping(read_json(body), "the reply")
        if reply.get("error"):
            raise WireError(f"the server says: {told(reply['error'])}")
        return BatchScores({self._reward: numbers(needed(reply, "rewards"), len(batch.prompts), "rewards")})
