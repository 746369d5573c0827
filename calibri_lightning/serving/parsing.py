"""JSON to messages, within limits."""

from __future__ import annotations

import re
from typing import TypeVar

from pydantic import ValidationError

from calibri_lightning.serving.protocol import Message
from calibri_lightning.serving.refusals import Refusal

_M = TypeVar("_M", bound=Message)
_MOST_VALUES = 2**20
"""A value takes up to a hundred times more memory than its two characters, and an error about it even more."""
_SHORT_NAME = re.compile(r"[A-Za-z_]\w{0,30}", re.ASCII)


def parse(kind: type[_M], body: bytes) -> _M:
    """Reads a message.

    Args:
        kind: Which.
        body: What came.

    Returns:
        The message.

    Raises:
        Refusal: 422 if it is not JSON or not such a message, naming field and rule; 413 if it has too many values.
    """
    # Base64 has none of these characters, so this counts values and the commas of prompts.
    if sum(body.count(sign) for sign in (b",", b"{", b"[")) > _MOST_VALUES:
        raise Refusal(413, f"The body has more than {_MOST_VALUES} values. Send fewer pictures or prompts at once.")
    try:
        # Pydantic's own parser ends at a depth of 200 and at numbers of 4300 digits.
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise Refusal(422, _explain(error)) from None
    # Whatever else a parser might raise on what a stranger sent is his mistake, too.
    except (ValueError, RecursionError) as error:
        raise Refusal(422, f"The body cannot be read ({type(error).__name__}).") from None


def _explain(error: ValidationError) -> str:
    """Names the first wrong field and its rule, without what was sent."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = ".".join(map(_name, first["loc"]))
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{path or 'body'}: {first['msg']}{more}"


def _name(part: int | str) -> str:
    """A step of a path; long or odd names of fields are a stranger's text."""
    return str(part) if isinstance(part, int) or _SHORT_NAME.fullmatch(part) else "?"
