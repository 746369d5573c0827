"""Starts a server, and ends it well.

A script that serves a model of its own needs a `Scorer` and three lines:

    from calibri_lightning.serving.run import script_main

    if __name__ == "__main__":
        script_main(MyScorer)

`script_main` calls what it is given with the parsed command line (an `argparse.Namespace`) if it takes an argument, and
with nothing otherwise. Options of one's own are added by a second function:

    def options(parser):
        parser.add_argument("--device", default="cuda:0", help="where to score")

    script_main(lambda given: MyScorer(given.device), options)

Whoever has scorers and no command line calls `serve`.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import signal
import ssl
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn

import uvicorn

from calibri_lightning.commandline import OneLineParser
from calibri_lightning.errors import UserError
from calibri_lightning.serving.app import create_app
from calibri_lightning.serving.listening import hurried, open_socket, url_of
from calibri_lightning.serving.options import ServerOptions, add_arguments, read_options
from calibri_lightning.serving.refusals import shorten
from calibri_lightning.serving.scorer import Scorer
from calibri_lightning.serving.service import RewardService

_LAST_SECONDS = 2
"""For answers to leave, once all rewards are done."""
_IDLE_SECONDS = 75
"""Longer than most steps of a run: its next request finds the connection open. Uvicorn's own 5 s are not."""


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class RewardServer(uvicorn.Server):
    """Ends when no request is running any more, and says on the way that it is ending.

    Uvicorn alone stops listening at once: /health could not say why, and a signal would decide the exit code.
    """

    def __init__(self, config: uvicorn.Config, service: RewardService, ready: Callable[[], None]) -> None:
        """Makes a server.

        Args:
            config: Made by `configure`.
            service: The rewards.
            ready: Called once all rewards are loaded.
        """
        super().__init__(config)
        self._service, self._ready, self._deadline, self._told = service, ready, 0.0, False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to end; a second signal does not wait for requests.

        Args:
            sig: The signal.
            frame: Where it came.
        """
        if self._service.status == "ending":
            self.should_exit = self.force_exit = True
            return
        self._service.end()
        self._deadline = time.monotonic() + self._service.options.grace_seconds

    async def on_tick(self, counter: int) -> bool:
        """Looks ten times a second whether it is time to go.

        Args:
            counter: Number of the look.

        Returns:
            Whether it is.
        """
        status = self._service.status
        if status == "ready" and not self._told:
            self._told = True
            self._ready()
        done = status == "ending" and (self._service.num_running == 0 or time.monotonic() > self._deadline)
        return await super().on_tick(counter) or done or self._service.failure is not None


def serve(scorers: Sequence[Scorer], options: ServerOptions | None = None) -> None:
    """Serves rewards until SIGTERM or SIGINT; call it in the main thread.

    Prints one line when it listens and one when all models are loaded.

    Args:
        scorers: The rewards.
        options: Settings.

    Raises:
        UserError: If the server would be open to others without a token, its address is taken, or a reward cannot be
            loaded.
    """
    options = options or ServerOptions()
    options.check_exposure()
    service = RewardService(scorers, options)
    with open_socket(options.host, options.port) as listener:
        url = url_of(listener, options.host, options.certificate is not None)
        config = configure(service)
        _say(f"loading {len(scorers)} reward(s) for {url}")
        # Before uvicorn has its own handlers, a signal would end the process with another code.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: sys.exit(0))
        RewardServer(config, service, lambda: _say(_summarize(service, url))).run(sockets=[listener])
    service.close()
    if service.failure is not None:
        error = service.failure
        if isinstance(error, UserError):
            raise error
        raise UserError(
            f"A reward could not be loaded: {type(error).__name__}: {shorten(str(error))}. The log above says where; "
            "correct its options or its environment."
        ) from error


def configure(service: RewardService) -> uvicorn.Config:
    """Sets uvicorn up.

    Args:
        service: The rewards.

    Returns:
        The configuration.

    Raises:
        UserError: If the TLS files cannot be used.
    """
    options = service.options
    config = uvicorn.Config(
        create_app(service),
        http=hurried(options.read_seconds),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=_LAST_SECONDS,
        ssl_certfile=options.certificate,
        ssl_keyfile=options.key,
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise UserError(
            f"The TLS files {options.certificate} and {options.key} cannot be used ({error}). They must be a "
            "certificate chain and its unencrypted key, both PEM."
        ) from error
    return config


def _summarize(service: RewardService, url: str) -> str:
    options = service.options
    rewards = "; ".join(f"{info.name} ({info.model} @ {info.revision}, {info.pixels})" for info in service.infos)
    return (
        f"ready on {url}: {rewards}. {'Token required' if options.token else 'No token'}; at most "
        f"{options.max_body_bytes / 2**20:g} MiB and {options.max_items} pictures of {options.max_pixels} pixels a "
        f"request, {options.max_batch} a batch of several requests, {options.max_queue} waiting; "
        f"{', '.join(options.codecs)}"
    )


def script_main(
    make: Callable[..., Scorer | Sequence[Scorer]],
    add_options: Callable[[argparse.ArgumentParser], Any] | None = None,
    arguments: Sequence[str] | None = None,
) -> NoReturn:
    """Serves what a script makes, with the options of every server and its own; see the top of this file.

    Args:
        make: A `Scorer` class, or a function that makes one or several; takes the parsed command line or nothing.
        add_options: Adds the script's options.
        arguments: The command line after the script's name; that of the process by default.

    Raises:
        SystemExit: Always: 0 after a signal to end or --help, 2 for a user's mistake or a model that cannot be loaded.
    """
    parser = OneLineParser(
        description=inspect.getdoc(make) if isinstance(make, type) else None,
        formatter_class=Defaults,
        # Or --token would be read as --token-file, with the secret in the message.
        allow_abbrev=False,
    )
    if add_options is not None:
        add_options(parser)
    add_arguments(parser)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        given = parser.parse_args(arguments)
        options = read_options(given)
        made = make(given) if _takes_arguments(make) else make()
        serve([made] if isinstance(made, Scorer) else made, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    sys.exit(0)


def _takes_arguments(make: Callable[..., Any]) -> bool:
    needed = [p for p in inspect.signature(make).parameters.values() if p.kind is not p.VAR_KEYWORD]
    return any(p.default is p.empty for p in needed)


def _say(line: str) -> None:
    print(line, flush=True)
