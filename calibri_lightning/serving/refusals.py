"""Answers other than 200: what they say, and how they are sent."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import Send

from calibri_lightning.serving.protocol import ErrorReply

_MOST_CHARACTERS = 500


class Refusal(Exception):
    """A request that is not answered with 200.

    Attributes:
        status: The HTTP status.
        message: One sentence for the client.
        headers: Further headers.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        """Makes one.

        Args:
            status: The HTTP status.
            message: One sentence for the client.
            headers: Further headers.
        """
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})

    @property
    def body(self) -> bytes:
        """The `ErrorReply` as JSON; what a reward has to say may be long, and is cut."""
        return ErrorReply(error=shorten(self.message)).model_dump_json().encode()


def busy(message: str, seconds: int, status: int = 429) -> Refusal:
    """A refusal of a request that may be repeated later.

    Args:
        message: Why.
        seconds: When.
        status: The HTTP status.

    Returns:
        The refusal, with Retry-After.
    """
    return Refusal(status, message, {"Retry-After": str(seconds)})


def shorten(text: str) -> str:
    """Cuts a message.

    Args:
        text: Any text; may hold what JSON in UTF-8 cannot.

    Returns:
        At most 500 characters, on one line.
    """
    line = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    return line if len(line) <= _MOST_CHARACTERS else line[: _MOST_CHARACTERS - 3] + "..."


async def start_refusal(send: Send, refusal: Refusal) -> None:
    """Sends a refusal, but leaves its end open; the connection is closed after it.

    Args:
        send: The channel to the client.
        refusal: The refusal.
    """
    body = refusal.body
    headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in refusal.headers.items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send(
        {"type": "http.response.start", "status": refusal.status, "headers": [*headers, (b"connection", b"close")]}
    )
    await send({"type": "http.response.body", "body": body, "more_body": True})
