"""Messages between a client and a server of rewards: JSON over HTTP, version 1.

POST /v1/score takes a `ScoreRequest` and gives a `ScoreReply`, POST /v1/check a `CheckRequest` and a `CheckReply`, GET
/v1/rewards a `Roster`, GET /health a `Health`. Errors are an `ErrorReply` with an HTTP status: 401 without the right
token, 404 for an unknown reward or path, 405 for a wrong method, 408 for a body that comes too slowly, 413 for too
large a body or picture or too many of them, 422 for a request that breaks these rules, 429 when the queue is full, 500
when the reward raised, 503 while the server starts or ends (429 and 503 with Retry-After). Unknown keys are refused.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FailFast, Field, JsonValue

PROTOCOL = 1
"""Version of the messages, in the path and in every reply."""

Codec = Literal["raw", "png", "webp-lossless", "jpeg"]
"""How a picture is packed. All but jpeg are lossless, jpeg must be allowed on both sides."""
PixelType = Literal["uint8", "float32"]
"""What pixels are: 0..255 or 0..1."""


class Message(BaseModel):
    """What all messages share."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Picture(Message):
    """A picture [H, W, 3], or a video [F, H, W, 3] with codec raw.

    Attributes:
        codec: How `data` is packed; float32 needs raw (little endian, C order).
        dtype: Type of its pixels.
        shape: Its shape.
        data: The packed bytes in base64.
    """

    codec: Codec
    dtype: PixelType = "uint8"
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=3, max_length=4)]
    data: str


class PromptText(Message):
    """What a picture should show.

    Attributes:
        text: The prompt.
        metadata: What else the reward needs to know, such as the objects of a scene.
    """

    text: str = ""
    metadata: dict[str, JsonValue] = Field(default_factory=dict)


class Item(Message):
    """One picture to score.

    Attributes:
        picture: The picture.
        prompt: Its prompt.
    """

    picture: Picture
    prompt: PromptText = Field(default_factory=PromptText)


class ScoreRequest(Message):
    """Pictures to score.

    Attributes:
        reward: Name of the reward on this server.
        items: The pictures.
        exact: Scored as one batch of its own, so that the last bits are those of scoring the same pictures in process;
            otherwise the server may put them together with those of other requests.
    """

    reward: str
    # Without FailFast, a body of a million wrong items would be answered after collecting a million errors.
    items: Annotated[list[Item], Field(min_length=1), FailFast()]
    exact: bool = False


class Result(Message):
    """What one picture scored.

    Attributes:
        scores: Under the reward's name and its extra names; null where it could not be scored.
        error: Why not.
        hash: `content_hash` of what was scored: a client sees by it that nothing was mixed up.
    """

    scores: dict[str, float | None]
    error: str | None = None
    hash: str


class RewardInfo(Message):
    """A reward of a server.

    Attributes:
        name: Its name there.
        model: What scores: a Hub id, a folder's name, or an import path.
        revision: Commit of the weights, or version of the code.
        preprocessing: What is done to a picture first, named so that a change of it changes the name.
        pixels: uint8 if it rounds pictures to 8 bits first, so that sending 8 bits loses nothing.
        extra_names: Further scores that come with it.
        takes_frames: Whether it scores videos.
    """

    name: str
    model: str
    revision: str
    preprocessing: str
    pixels: PixelType = "float32"
    extra_names: list[str] = Field(default_factory=list)
    takes_frames: bool = False


class ScoreReply(Message):
    """The scores, in the order of the request's items.

    Attributes:
        protocol: Version of these messages.
        reward: What scored them.
        results: One for each item.
    """

    protocol: Literal[1] = 1
    reward: RewardInfo
    results: list[Result]


class CheckRequest(Message):
    """Prompts of a run, to be refused before any work.

    Attributes:
        reward: Name of the reward on this server.
        prompts: The prompts.
    """

    reward: str
    prompts: Annotated[list[PromptText], FailFast()]


class CheckReply(Message):
    """Whether the reward can score pictures of these prompts.

    Attributes:
        protocol: Version of these messages.
        problem: What is wrong with them; null if nothing is.
    """

    protocol: Literal[1] = 1
    problem: str | None = None


class Limits(Message):
    """What a server takes.

    Attributes:
        body_bytes: Most bytes of a request, and of all its pictures together when they are unpacked.
        pixels: Most pixels of a picture (F x H x W).
        items: Most pictures of a request.
        codecs: How pictures may be packed.
    """

    body_bytes: int
    pixels: int
    items: int
    codecs: list[Codec]


class Roster(Message):
    """What a server offers.

    Attributes:
        protocol: Version of these messages.
        rewards: Its rewards.
        limits: What it takes.
    """

    protocol: Literal[1] = 1
    rewards: list[RewardInfo]
    limits: Limits


class Health(Message):
    """Whether a server can score; needs no token and tells nothing else.

    Attributes:
        protocol: Version of these messages.
        status: ready, or why not: models are being loaded, or the server is ending.
    """

    protocol: Literal[1] = 1
    status: Literal["loading", "ready", "ending"]


class ErrorReply(Message):
    """Why a request was refused.

    Attributes:
        protocol: Version of these messages.
        error: One sentence; never a traceback.
    """

    protocol: Literal[1] = 1
    error: str


def content_hash(reward: str, revision: str, pixels: NDArray[Any], prompt: PromptText) -> str:
    """Names what is scored, whatever way it travelled.

    Args:
        reward: Name of the reward on its server.
        revision: Its revision.
        pixels: The picture [H, W, 3] or video [F, H, W, 3], uint8 or float32.
        prompt: Its prompt.

    Returns:
        SHA-256 in hexadecimal.
    """
    told = [reward, revision, str(pixels.dtype), list(pixels.shape), prompt.text, prompt.metadata]
    mixer = hashlib.sha256(json.dumps(told, sort_keys=True, ensure_ascii=True).encode() + b"\n")
    mixer.update(np.ascontiguousarray(pixels).data)
    return mixer.hexdigest()
