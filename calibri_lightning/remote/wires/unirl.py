"""The reward service of UniRL, which serves several rewards and isolates their failures.

It is spoken to in JSON and PNG files (https://github.com/Tencent-Hunyuan/UniRL, unirl-reward-service/reward_service:
schemas.py, server.py, direct_server.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.remote.errors import sanitised
from calibri_lightning.remote.wire import Batch, BatchScores, HttpRequest, NotReadyError, Wire, WireError
from calibri_lightning.remote.wires.bodies import plain_metadata, pngs
from calibri_lightning.remote.wires.replies import entries, kind, mapping, needed, number, read_json, told

_NOT_SCORING = {"draining", "offloaded", "stopping"}
"""States of the service of a single scorer in which it answers /health, but no /score."""


class UniRLWire(Wire):
    """POST /score with JSON; the reply has sub-scores and errors of each picture. GET /health and /rewards."""

    name = "unirl"

    def __init__(self, reward: str, metric: str | None = None, extra_metrics: Sequence[str] = ()) -> None:
        """Sets it up.

        Args:
            reward: Name of the reward on the server.
            metric: The sub-score that is optimised; if left out, the only one or the one named as the reward.
            extra_metrics: Further sub-scores to report.

        Raises:
            UserError: If the further sub-scores are no list of names.
        """
        listed = isinstance(extra_metrics, list | tuple)
        if not listed or not all(isinstance(extra, str) for extra in extra_metrics):
            raise UserError(
                f"The option extra_metrics of the wire {self.name!r} is {extra_metrics!r}; it must be a list of names."
            )
        self._reward, self._metric = reward, metric
        self._extras = {f"{reward}_{extra}".lower().replace(" ", "_"): extra for extra in extra_metrics}
        self.extra_names = tuple(self._extras)

    def probe(self) -> HttpRequest:
        """Asks whether the server is ready.

        Returns:
            The request.
        """
        return HttpRequest("GET", "/health")

    def accept_probe(self, body: bytes) -> None:
        """Reads the answer to the probe.

        Args:
            body: The answer.

        Raises:
            NotReadyError: If it is not ok, or the scorer is not loaded.
            WireError: If it cannot be read.
        """
        health = mapping(read_json(body), "the answer of /health")
        if health.get("status") != "ok":
            raise NotReadyError(f"the server says of its health {told(health.get('status'))!r}, not 'ok'")
        if told(health.get("state")) in _NOT_SCORING:
            raise NotReadyError(f"the server's scorer is {health['state']}")

    def roster(self) -> HttpRequest:
        """Asks which rewards the server has.

        Returns:
            The request.
        """
        return HttpRequest("GET", "/rewards")

    def accept_roster(self, body: bytes) -> None:
        """Reads which rewards the server has.

        Args:
            body: The answer.

        Raises:
            UserError: If this reward is not among them.
            WireError: If the answer cannot be read.
        """
        names = needed(mapping(read_json(body), "the answer of /rewards"), "rewards")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise WireError(f"the rewards of the server are {kind(names)}; the rule is a list of names")
        if self._reward not in names:
            raise UserError(
                f"The server has no reward {self._reward!r}; it has {sanitised(', '.join(names)) or 'none'}. Enable it "
                "there, or say by which of these names it goes: reward."
            )

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuses prompts whose metadata cannot be sent.

        Args:
            prompts: The prompts.

        Raises:
            UserError: If there is one.
        """
        for prompt in prompts:
            plain_metadata(prompt)

    def request(self, batch: Batch) -> HttpRequest:
        """Asks for the scores of a batch.

        Args:
            batch: The pictures.

        Returns:
            The request.
        """
        asked = [
            {
                "history": [{"text": prompt.text, "image_b64": picture}],
                "required_rewards": [self._reward],
                "metadata": plain_metadata(prompt) or None,
                # Comes back, from servers that are new enough.
                "request_id": str(index),
            }
            for index, (prompt, picture) in enumerate(zip(batch.prompts, pngs(batch), strict=True))
        ]
        return HttpRequest("POST", "/score", json.dumps({"requests": asked}).encode())

    def parse(self, batch: Batch, body: bytes) -> BatchScores:
        """Reads the scores.

        Args:
            batch: The pictures that were sent.
            body: The answer.

        Returns:
            The scores; NaN for pictures whose scorer failed.

        Raises:
            UserError: If there are several sub-scores, and none was chosen.
            WireError: If the answer has no entry for each picture, in their order, with a score or an error.
        """
        reply, count = mapping(read_json(body), "the reply"), len(batch.prompts)
        _check_order(reply.get("identities"), count)
        results = entries(needed(reply, "results"), count, "results")
        failures = entries(reply.get("errors") or [{}] * count, count, "errors")
        names = (self._reward, *self.extra_names)
        scores = {name: np.full(count, np.nan) for name in names}
        errors = {}
        for index, (result, failed) in enumerate(zip(results, failures, strict=True)):
            where = f"results[{index}]"
            found = mapping(result, where).get(self._reward)
            reason = mapping(failed, f"errors[{index}]").get(self._reward)
            if reason is None and found is None:
                raise WireError(f"{where} has neither a score nor an error of {self._reward!r}")
            values = {} if reason is not None else self._values(mapping(found, where), where)
            unknown = [name for name, value in values.items() if math.isnan(value)]
            if reason is not None or unknown:
                errors[index] = (
                    f"no number for {', '.join(unknown)}" if reason is None else told(reason) or "no reason given"
                )
            for name, value in values.items():
                scores[name][index] = value
        return BatchScores(scores, errors)

    def _values(self, found: Mapping[str, Any], where: str) -> dict[str, float]:
        """The sub-scores that were asked for; null, which pydantic makes of a NaN, is NaN again."""
        keys = {self._reward: self._choose(found, where), **self._extras}
        values = {name: needed(found, key) for name, key in keys.items()}
        return {
            name: math.nan if value is None else number(value, f"{where} {keys[name]!r}")
            for name, value in values.items()
        }

    def _choose(self, found: Mapping[str, Any], where: str) -> str:
        if self._metric is not None:
            return self._metric
        if not found:
            raise WireError(f"{where} has no sub-score of {self._reward!r}")
        if self._reward not in found and len(found) > 1:
            raise UserError(
                f"The reward {self._reward!r} of the server has several sub-scores: {sanitised(', '.join(found))}. Say "
                "which is optimised: metric."
            )
        return self._reward if self._reward in found else next(iter(found))


def _check_order(identities: object, count: int) -> None:
    """Sees by the numbers that come back that nothing was mixed up; older servers send none."""
    if not identities:
        return
    for index, identity in enumerate(entries(identities, count, "identities")):
        back = mapping(identity, f"identities[{index}]").get("request_id")
        if back is not None and back != str(index):
            raise WireError(f"the reply is mixed up: place {index} answers request {told(back)!r}")
