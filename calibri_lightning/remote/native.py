"""Our own protocol: `calibri_lightning.serving.protocol`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.remote.errors import sanitised
from calibri_lightning.remote.messages import prompt_text, read_message
from calibri_lightning.remote.wire import Batch, BatchScores, HttpRequest, NotReadyError, Wire, WireError
from calibri_lightning.serving.pictures import pack, unpack
from calibri_lightning.serving.protocol import (
    CheckReply,
    CheckRequest,
    Codec,
    Health,
    Item,
    Limits,
    Result,
    RewardInfo,
    Roster,
    ScoreReply,
    ScoreRequest,
    content_hash,
)

CodecChoice = Literal["auto", "raw", "png", "webp-lossless", "jpeg"]
"""How pictures travel; auto is raw within a machine, and the smallest lossless codec across machines."""

_WEBP_SIDE = 16383
"""Most pixels of a side in the WebP format."""
# Field names, brackets and hashes around a picture, and what a lossless file may be larger than its pixels.
_ITEM_BYTES, _SLACK = 512, 1.02


class NativeWire(Wire):
    """Speaks to servers started with `calibri_lightning serve`."""

    name = "calibri-lightning"

    def __init__(self, reward: str, codec: CodecChoice = "auto", exact: bool = True) -> None:
        """Knows nothing of the servers yet.

        Args:
            reward: Name of the reward on the server.
            codec: How pictures travel: auto, raw, png, webp-lossless, or jpeg, which loses details.
            exact: Whether the server scores each request as a batch of its own, so that the last bits of a score do not
                depend on what else the server is asked; False lets it join requests.

        Raises:
            UserError: If codec or exact is none.
        """
        if codec not in get_args(CodecChoice):
            raise UserError(f"codec is {codec!r}; it is one of {', '.join(get_args(CodecChoice))}.")
        if not isinstance(exact, bool):
            raise UserError(f"exact is {exact!r}; it is true or false.")
        self._reward, self._codec, self._exact = reward, codec, exact
        self._info: RewardInfo | None = None
        self._limits: Limits | None = None
        self._has_sent = False

    def describe(self) -> RewardInfo | None:
        """Says what scores, once the roster has been read."""
        return self._info

    def probe(self) -> HttpRequest:
        """Asks for the health."""
        return HttpRequest("GET", "/health")

    def accept_probe(self, body: bytes) -> None:
        """Reads the health.

        Args:
            body: The answer, status 200.

        Raises:
            NotReadyError: If the server loads its models, or ends.
            UserError: If it speaks another version of the protocol.
            WireError: If the answer cannot be read.
        """
        health = read_message(Health, body)
        if health.status != "ready":
            raise NotReadyError(f"it is {health.status}")

    def roster(self) -> HttpRequest:
        """Asks what the server offers."""
        return HttpRequest("GET", "/v1/rewards")

    def accept_roster(self, body: bytes) -> None:
        """Reads what a server offers, and compares it with the servers before it.

        Args:
            body: The answer, status 200.

        Raises:
            UserError: If it does not offer this reward, offers another revision than the servers before it, or does not
                take what is to be sent.
            WireError: If the answer cannot be read.
        """
        roster = read_message(Roster, body)
        offered = {info.name: info for info in roster.rewards}
        if self._reward not in offered:
            raise UserError(
                f"it offers {', '.join(map(repr, offered)) or 'no rewards'} and no {self._reward!r}. Give its name on "
                "the server as the option `reward`, or start a server with it."
            )
        info = offered[self._reward]
        if self._info is not None and info != self._info:
            raise UserError(
                f"its reward {self._reward!r} differs from that of the servers before it, or of this one when the run "
                f"began: {_difference(self._info, info)}. All servers of a reward must score the same: start them with "
                "the same model, revision and version."
            )
        self._refuse_codec(info, roster.limits)
        limits = roster.limits if self._limits is None else _common(self._limits, roster.limits)
        if self._has_sent and limits != self._limits:
            raise UserError(
                "it takes less at once than the servers did when the run began, so that pictures would be put together "
                "otherwise. Start it with the limits that it had (--max-items, --max-body, --max-pixels, --allow-jpeg)."
            )
        self._limits = limits
        self.pixels, self.takes_frames = info.pixels, info.takes_frames
        self.extra_names, self._info = tuple(info.extra_names), info

    def check(self, prompts: Sequence[Prompt]) -> HttpRequest:
        """Asks whether the prompts can be scored.

        Args:
            prompts: The prompts.

        Returns:
            The request.

        Raises:
            UserError: If a prompt cannot be sent.
        """
        texts = [prompt_text(prompt) for prompt in prompts]
        return _post("/v1/check", CheckRequest(reward=self._reward, prompts=texts))

    def accept_check(self, body: bytes) -> None:
        """Reads whether they can.

        Args:
            body: The answer, status 200.

        Raises:
            UserError: If one cannot.
            WireError: If the answer cannot be read.
        """
        problem = read_message(CheckReply, body).problem
        if problem is not None:
            raise UserError(f"The server refuses the prompts for {self._reward!r}: {sanitised(problem)}")

    def most_items(self, batch: Batch) -> int:
        """Says how many of these pictures one request may hold, by the limits of the strictest server.

        Counted as if sent raw, so that batches are cut alike however they travel.

        Args:
            batch: The pictures.

        Returns:
            The number, from 1 up.

        Raises:
            UserError: If a picture is too large for a request of its own.
        """
        _, limits = self._known()
        picture = batch.pixels[0]
        text = max(len(prompt_text(prompt).model_dump_json().encode()) for prompt in batch.prompts)
        each = int(picture.nbytes * 4 / 3 * _SLACK) + text + _ITEM_BYTES
        if picture.size // 3 > limits.pixels or each > limits.body_bytes:
            raise UserError(
                f"A picture {list(picture.shape)} of {picture.size // 3} pixels makes a request of {each} bytes; a "
                f"server of {self._reward!r} takes {limits.pixels} pixels and {limits.body_bytes} bytes. Start it with "
                "higher limits, or make smaller pictures."
            )
        return min(limits.items, limits.body_bytes // each)

    def request(self, batch: Batch) -> HttpRequest:
        """Asks for scores.

        Args:
            batch: The pictures.

        Returns:
            The request.
        """
        self._has_sent = True
        codec = self._codec_for(batch)
        items = [
            Item(picture=pack(pixels, codec), prompt=prompt_text(prompt))
            for pixels, prompt in zip(batch.pixels, batch.prompts, strict=True)
        ]
        return _post("/v1/score", ScoreRequest(reward=self._reward, items=items, exact=self._exact))

    def parse(self, batch: Batch, body: bytes) -> BatchScores:
        """Reads scores, believing nothing.

        Args:
            batch: The pictures that were sent.
            body: The answer, status 200; anything at all.

        Returns:
            The scores; NaN where the server has none.

        Raises:
            UserError: If it speaks another version of the protocol.
            WireError: If the answer is damaged, of other pictures, or of another model.
        """
        info, _ = self._known()
        reply = read_message(ScoreReply, body)
        if reply.reward != info:
            raise WireError(f"the reply is of another model than the run began with: {_difference(info, reply.reward)}")
        if len(reply.results) != len(batch.prompts):
            raise WireError(f"{len(batch.prompts)} pictures were sent, but {len(reply.results)} were answered")
        self._refuse_mixed_up(info, batch, reply.results)
        names = [info.name, *info.extra_names]
        for result in reply.results:
            if set(result.scores) != set(names):
                given = sanitised(", ".join(result.scores))
                raise WireError(f"a result has the scores {given or 'none'}; the rule is {', '.join(names)}")
        scores = {name: np.array([_number(r.scores[name]) for r in reply.results]) for name in names}
        errors = {i: _reason(r, info.name) for i, r in enumerate(reply.results) if _failed(r, info.name)}
        return BatchScores(scores, errors)

    def _refuse_mixed_up(self, info: RewardInfo, batch: Batch, results: Sequence[Result]) -> None:
        sent = [
            content_hash(info.name, info.revision, self._seen(pixels, batch), prompt_text(prompt))
            for pixels, prompt in zip(batch.pixels, batch.prompts, strict=True)
        ]
        answered = [result.hash for result in results]
        if answered != sent:
            what = "in another order" if sorted(answered) == sorted(sent) else "of other pictures or prompts"
            raise WireError(f"the scores are {what} than those that were sent (their hashes differ)")

    def _seen(self, pixels: NDArray[Any], batch: Batch) -> NDArray[Any]:
        """The picture as the server unpacks it."""
        codec = self._codec_for(batch)
        return unpack(pack(pixels, codec), pixels.size, [codec]) if codec == "jpeg" else pixels

    def _codec_for(self, batch: Batch) -> Codec:
        if self._codec != "auto":
            return self._codec
        _, limits = self._known()
        within_bounds = batch.pixels.ndim == 4 and max(batch.pixels.shape[1:3]) <= _WEBP_SIDE
        packs = batch.crosses_hosts and batch.pixels.dtype == np.uint8 and within_bounds
        wanted: tuple[Codec, ...] = ("webp-lossless", "png", "raw") if packs else ("raw",)
        return next((codec for codec in wanted if codec in limits.codecs), "raw")

    def _refuse_codec(self, info: RewardInfo, limits: Limits) -> None:
        if self._codec not in ("auto", *limits.codecs):
            raise UserError(
                f"it does not take the codec {self._codec!r}, but {', '.join(limits.codecs)}. Leave codec out, or "
                "start the server so that it takes it."
            )
        if self._codec not in ("auto", "raw") and (info.pixels == "float32" or info.takes_frames):
            kind = "videos" if info.takes_frames else "float32 pictures"
            raise UserError(
                f"codec is {self._codec!r}, but {self._reward!r} scores {kind}, which go as raw. Leave it out."
            )

    def _known(self) -> tuple[RewardInfo, Limits]:
        if self._info is None or self._limits is None:
            raise WireError("the server's roster has not been read")
        return self._info, self._limits


def _post(path: str, message: BaseModel) -> HttpRequest:
    return HttpRequest("POST", path, message.model_dump_json().encode())


def _difference(known: RewardInfo, found: RewardInfo) -> str:
    told = known.model_dump()
    return sanitised(
        "; ".join(
            f"{key} {found.model_dump()[key]!r} instead of {value!r}"
            for key, value in told.items()
            if found.model_dump()[key] != value
        )
    )


def _common(known: Limits, found: Limits) -> Limits:
    return Limits(
        body_bytes=min(known.body_bytes, found.body_bytes),
        pixels=min(known.pixels, found.pixels),
        items=min(known.items, found.items),
        codecs=[codec for codec in known.codecs if codec in found.codecs],
    )


def _number(score: float | None) -> float:
    return float("nan") if score is None else score


def _failed(result: Result, name: str) -> bool:
    return result.error is not None or result.scores[name] is None


def _reason(result: Result, name: str) -> str:
    return sanitised(result.error) if result.error else f"the server gives no score under {name!r} and no reason"
