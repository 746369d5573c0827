"""Our own protocol's messages: read with suspicion, written so that both sides hash the same."""

from __future__ import annotations

import json
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.remote.errors import sanitised
from calibri_lightning.remote.wire import WireError
from calibri_lightning.serving.protocol import PROTOCOL, PromptText

_Message = TypeVar("_Message", bound=BaseModel)


def read_message(kind: type[_Message], body: bytes) -> _Message:
    """Reads a reply.

    Args:
        kind: What it should be.
        body: What came; anything at all.

    Returns:
        The message.

    Raises:
        UserError: If it is of another version of the protocol.
        WireError: If it is no such message.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        _refuse_protocol(body)
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise WireError(
            f"the reply is no {kind.__name__} of the protocol ({sanitised(f'{place}: ' * bool(place) + first['msg'])})"
        ) from None


def _refuse_protocol(body: bytes) -> None:
    """Tells a server of another version from a broken one."""
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        return
    spoken = message.get("protocol", PROTOCOL) if isinstance(message, dict) else PROTOCOL
    if spoken != PROTOCOL:
        raise UserError(
            f"it speaks version {sanitised(repr(spoken))} of the protocol, this client version {PROTOCOL}. Install the "
            "same version of calibri-lightning on both sides."
        )


def prompt_text(prompt: Prompt) -> PromptText:
    """Makes a prompt ready to be sent.

    Args:
        prompt: The prompt.

    Returns:
        The message.

    Raises:
        UserError: If JSON cannot hold its text or its metadata.
    """
    try:
        prompt.text.encode()
        # There and back, so that tuples become lists on this side, too, and both sides hash the same.
        metadata = json.loads(json.dumps(dict(prompt.metadata), allow_nan=False, ensure_ascii=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"The prompt {sanitised(repr(prompt.text))} (row {prompt.index}) cannot be sent: text and metadata must be "
            f"what JSON can hold ({sanitised(str(error))}). Correct that row, or leave the column out."
        ) from None
    return PromptText(text=prompt.text, metadata=metadata)
