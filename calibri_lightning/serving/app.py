"""The server's HTTP interface."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from calibri_lightning.serving.batching import ScoringError
from calibri_lightning.serving.limits import LEASE, Gate
from calibri_lightning.serving.protocol import (
    PROTOCOL,
    CheckReply,
    CheckRequest,
    ErrorReply,
    Health,
    Roster,
    ScoreReply,
    ScoreRequest,
)
from calibri_lightning.serving.refusals import Refusal
from calibri_lightning.serving.service import RewardService

_T = TypeVar("_T")
_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": text}
    for status, text in {
        401: "Token missing or wrong",
        404: "No such reward",
        408: "Body too slow",
        413: "Body or picture too large, or too many",
        422: "Not what the rules say",
        429: "Queue or memory full",
        500: "The reward raised",
        503: "Loading or ending",
    }.items()
}


class _Gone(Exception):
    """The client went away."""


def create_app(service: RewardService, docs: bool = False) -> FastAPI:
    """Makes the app; its lifespan loads the rewards, and ends their threads.

    Args:
        service: The rewards.
        docs: Whether /docs shows a page to try requests, which loads scripts from the network.

    Returns:
        An ASGI app.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.close()

    app = FastAPI(
        title="Rewards for calibri_lightning",
        version=str(PROTOCOL),
        lifespan=lifespan,
        docs_url="/docs" if docs else None,
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_routes(app, service)
    app.add_exception_handler(Refusal, _refuse)
    app.add_exception_handler(HTTPException, _refuse_http)
    paths = [str(getattr(route, "path", "")) for route in app.routes]
    app.add_middleware(Gate, service=service, paths=paths)
    app.openapi = lambda: _describe(app)  # type: ignore[method-assign]
    return app


def _add_routes(app: FastAPI, service: RewardService) -> None:
    @app.post("/v1/score", response_model=ScoreReply, responses=_REFUSALS, openapi_extra=_takes(ScoreRequest))
    async def score(request: Request) -> Response:
        """Scores pictures."""
        body = await _body(request)
        try:
            prepared = await asyncio.wrap_future(service.read_score(body, request.scope[LEASE]))
            del body
            service.submit(prepared)
            await _finish(request, [job.future for job in prepared.jobs])
            return _json(prepared.reply())
        except ScoringError as error:
            raise Refusal(500, str(error)) from None
        except _Gone:
            return Response(status_code=499)

    @app.post("/v1/check", response_model=CheckReply, responses=_REFUSALS, openapi_extra=_takes(CheckRequest))
    async def check(request: Request) -> Response:
        """Says whether a reward can score pictures of these prompts."""
        wanted = await asyncio.wrap_future(service.read_check(await _body(request)))
        future = service.check(wanted)
        try:
            await _finish(request, [future])
            return _json(CheckReply(problem=future.result()))
        except (Refusal, asyncio.CancelledError):
            raise
        except _Gone:
            return Response(status_code=499)
        except Exception as error:
            raise Refusal(500, f"The reward {wanted.reward!r} raised {type(error).__name__}: {error}") from error

    @app.get("/v1/rewards", response_model=Roster, responses={s: _REFUSALS[s] for s in (401, 503)})
    async def rewards() -> Response:
        """Says what is served and what is taken."""
        return _json(service.roster())

    @app.get("/health", response_model=Health)
    async def health() -> Response:
        """Says whether the server is ready; needs no token."""
        return _json(Health(status=service.status))

    @app.get("/metrics", responses={401: _REFUSALS[401]}, response_class=Response)
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _takes(kind: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI words for a body that the route reads itself, in a thread that does not hold up the others."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def _body(request: Request) -> bytes:
    """The body, which the gate hands on in one piece.

    A page in a browser can send any other type to a server on loopback without asking first (CORS).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(422, "The body must be JSON: send 'Content-Type: application/json'.")
    body: bytes = (await request.receive()).get("body", b"")
    return body


async def _finish(request: Request, futures: Sequence[Future[Any]]) -> None:
    """Waits for results; if the client goes away or a result is an error, the others are not begun."""
    gone: asyncio.Future[Any] = asyncio.ensure_future(request.receive())
    waiting: asyncio.Future[Any] = asyncio.gather(*map(asyncio.wrap_future, futures))
    try:
        await asyncio.wait({gone, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise _Gone
        await waiting
    finally:
        gone.cancel()
        waiting.cancel()
        for future in futures:
            future.cancel()


def _json(message: BaseModel) -> Response:
    return Response(message.model_dump_json(), media_type="application/json")


def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return Response(error.body, error.status, error.headers, "application/json")


def _refuse_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = {
        404: "There is nothing at this path; see protocol.py or /openapi.json for what there is.",
        405: "This path does not take this method.",
    }
    refusal = Refusal(error.status_code, known.get(error.status_code, error.detail), error.headers)
    return Response(refusal.body, refusal.status, refusal.headers, "application/json")


def _describe(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, read = models_json_schema(
            [(kind, "validation") for kind in (ScoreRequest, CheckRequest)],
            ref_template="#/components/schemas/{model}",
        )
        made["components"]["schemas"].update(read["$defs"])
        made["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, methods in made["paths"].items():
            for operation in methods.values():
                operation["security"] = [] if path == "/health" else [{"token": []}, {}]
        app.openapi_schema = made
    return app.openapi_schema
