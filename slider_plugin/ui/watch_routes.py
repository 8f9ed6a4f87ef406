"""Watching a run: progress, losses, strips, the report card's curves and the log; and the page of it to keep."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from slider_plugin.ui import pictures, runs, share
from slider_plugin.ui.charts import Line, chart
from slider_plugin.ui.desk import Desk
from slider_plugin.ui.jobs import TRAIN

LOG_LINES = 200
CURVES = (("monotonicity", "good"), ("balance", "neutral"), ("preservation", "negative"))


def routes(desk: Desk) -> APIRouter:
    """The routes of this room."""
    router = APIRouter()

    @router.get("/runs/{name}/watch")
    def watch(name: str) -> HTMLResponse:
        run = desk.run(name)
        values = live(desk, run) | seen_strips(run)
        return desk.page("watch.html", **values, parts=desk.parts(("_live.html", "_strips.html"), values))

    @router.get("/runs/{name}/live")
    def live_part(name: str, request: Request) -> Response:
        return desk.changed(request, "_live.html", **live(desk, desk.run(name)))

    @router.get("/runs/{name}/strips")
    def strips_part(name: str, request: Request) -> Response:
        run = desk.run(name)
        return desk.changed(request, "_strips.html", run=run, status=run.status(desk.jobs), **seen_strips(run))

    @router.post("/runs/{name}/stop")
    def stop(name: str) -> Response:
        for job in desk.jobs.of(desk.run(name).name, TRAIN):
            if job.is_active:
                desk.jobs.stop(job)
        return RedirectResponse(f"/runs/{name}/watch", 303)

    @router.get("/runs/{name}/page.html")
    def keep(name: str) -> Response:
        run = desk.run(name)
        text = share.page(desk, run, live(desk, run), seen_strips(run))
        headers = {"Content-Disposition": f'attachment; filename="{run.name}.html"', "Cache-Control": "no-store"}
        return HTMLResponse(text, headers=headers)

    return router


def live(desk: Desk, run: runs.Run) -> dict[str, Any]:
    """What changes while a run is trained."""
    status = run.status(desk.jobs)
    progress = status.progress
    losses = progress.losses()
    return {
        "run": run,
        "status": status,
        "progress": progress,
        "losses": losses_chart(losses),
        "smoothed": progress.smoothed(),
        "log": "\n".join(status.log.splitlines()[-LOG_LINES:]),
        "waiting": [job for job in desk.jobs.active() if job.run != run.name],
    }


def seen_strips(run: runs.Run) -> dict[str, Any]:
    """What has been drawn so far, the latest first, and the report card."""
    found = [(sidecar.parent.name, pictures.strips(sidecar)) for sidecar in reversed(pictures.validations(run.output))]
    reports = runs.read_lines(run.output / "reports.jsonl")
    return {
        "drawn": [(int(folder.removeprefix("step_")), files) for folder, files in found if files],
        "curves": report_chart(reports),
        "card": pictures.report_of(run.output),
        "response": response_chart(pictures.report_of(run.output)),
    }


def losses_chart(losses: dict[str, list[tuple[float, float]]]) -> Any:
    """Loss per sign, smoothed, over steps."""
    order: list[str] = [sign for sign in ("positive", "negative", "neutral") if sign in losses]
    order += [sign for sign in losses if sign not in order]
    styles = {"positive": "positive", "negative": "negative", "neutral": "neutral"}
    names = {"positive": "more (+)", "negative": "less (−)", "neutral": "neutral"}
    lines = [
        Line(names.get(sign, sign), styles.get(sign, "good"), runs.smooth(losses[sign]), faint=losses[sign]) for sign in order
    ]
    return chart("Loss", lines, "step", logarithmic=True)


def report_chart(reports: list[dict[str, Any]]) -> Any:
    """The report card's scores over steps."""
    lines = [Line(name, style, [(r["step"], value) for r in reports if (value := number(r.get(name))) is not None])
             for name, style in CURVES]  # fmt: skip
    return chart("Report card over steps", lines, "step", half=True)


def response_chart(card: dict[str, Any] | None) -> Any:
    """The response over strengths, with its band."""
    if not card:
        return ""
    strengths, response = numbers(card.get("strengths")), numbers(card.get("response"))
    low, high = numbers(card.get("response_low")), numbers(card.get("response_high"))
    if not strengths or len(strengths) != len(response):
        return ""
    whole = len(low) == len(high) == len(strengths)
    band = list(zip(strengths, low, high, strict=True)) if whole else []
    lines = [Line("response", "positive", list(zip(strengths, response, strict=True)), band=band)]
    kept = numbers(card.get("preservation"))
    if len(kept) == len(strengths):
        lines.append(Line("preservation", "negative", list(zip(strengths, kept, strict=True))))
    return chart("Response to the strength", lines, "strength", half=True)


def numbers(values: Any) -> list[float]:
    """A list's numbers; nothing if it holds anything else."""
    found = [number(value) for value in values] if isinstance(values, list) else []
    return [value for value in found if value is not None] if None not in found else []


def number(value: Any) -> float | None:
    """A finite number; of a list of them, one for each strength, the smallest. None for anything else."""
    if isinstance(value, list):
        return min((part for part in map(number, value) if part is not None), default=None)
    finite = isinstance(value, (int, float)) and not isinstance(value, bool) and value - value == 0
    return float(value) if finite else None
