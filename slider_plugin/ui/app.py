"""The page as an ASGI application; each group of routes has a room of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse, Response
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from slider_plugin.errors import UserError
from slider_plugin.registry import Plugins
from slider_plugin.ui import file_routes, setup_routes, try_routes, watch_routes
from slider_plugin.ui.desk import HERE, Desk, NotThereError
from slider_plugin.ui.jobs import BusyError
from slider_plugin.ui.security import Gate, Guard
from slider_plugin.ui.workspace import OutsideError, Workspace

TIDY = 60.0  # seconds between looks whether the doctor is idle


def create_app(workspace: Workspace, guard: Guard, plugins: Plugins | None = None) -> FastAPI:
    """The page of a workspace.

    Args:
        workspace: the only folder that it reads and writes.
        guard: who may talk to it.
        plugins: those of this environment by default.
    """
    desk = Desk(workspace, plugins or Plugins.discover())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if desk.jobs.active():  # the queue goes on where a machine was switched off
            desk.jobs.work()
        tidying = asyncio.create_task(_tidy(desk))
        try:
            yield
        finally:
            tidying.cancel()
            desk.checker.close()

    app = FastAPI(title="slider", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    for room in (setup_routes, watch_routes, try_routes, file_routes):
        app.include_router(room.routes(desk))
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")
    _errors(app, desk)
    app.add_middleware(Gate, guard=guard)
    return app


def _errors(app: FastAPI, desk: Desk) -> None:
    """Errors of the user's are told on a page, or in the place that asked."""

    def told(request: Request, line: str, status: int) -> Response:
        if "hx-request" in request.headers:
            return desk.page("_error.html", status, {"HX-Retarget": "#toast", "HX-Reswap": "innerHTML"}, line=line)
        return desk.page("error.html", status, line=line, status_code=status)

    @app.exception_handler(UserError)
    def wrong(request: Request, error: UserError) -> Response:
        codes = {NotThereError: 404, OutsideError: 403, BusyError: 409}
        return told(request, str(error), next((code for kind, code in codes.items() if isinstance(error, kind)), 400))

    @app.exception_handler(HTTPException)
    def refused(request: Request, error: HTTPException) -> Response:
        lines = {404: "there is no such page", 405: "that cannot be done here"}
        return told(request, lines.get(error.status_code, str(error.detail)), error.status_code)

    @app.get("/favicon.ico", include_in_schema=False)
    def icon() -> Response:
        return RedirectResponse("/static/icon.svg", 308)


async def _tidy(desk: Desk) -> None:
    while True:
        await asyncio.sleep(TIDY)
        await asyncio.to_thread(desk.checker.tidy)
