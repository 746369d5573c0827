"""What the plain commands share: errors in one line, and exit codes."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from calibri_lightning.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Refuses an argument.

        Args:
            message: What is wrong.

        Raises:
            UserError: Always.
        """
        raise UserError(f"{message[:1].upper()}{message[1:]}. All options: {self.prog} --help")


def exit_code(work: Callable[[], int | None]) -> int:
    """Runs a command.

    Args:
        work: The command; returns its exit code, or nothing for 0.

    Returns:
        That code; 2 for a user's mistake, whose message is printed, 130 when interrupted, and what a `SystemExit`
        carries.
    """
    try:
        return work() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # --help, the errors of a configuration's parser, and a signal
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


@contextmanager
def cleaning_up_when_terminated() -> Iterator[None]:
    """Lets SIGTERM end the work as an error does, so that what is half-written is removed.

    Yields:
        Nothing. SIGTERM raises `SystemExit` inside, with the exit code that shells know for it; in another thread than
        the main one, which gets no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _exit_for)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _exit_for(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)
