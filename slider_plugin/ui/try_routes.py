"""Trying a slider: moving it over the pictures there are, asking for others, and exporting it."""

from __future__ import annotations

import math
import secrets
import time
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Form, Request
from fastapi.responses import HTMLResponse, Response

from slider_plugin.config import RunConfig
from slider_plugin.configfile import to_json
from slider_plugin.errors import UserError
from slider_plugin.files import write_json
from slider_plugin.ui import pictures, runs
from slider_plugin.ui.desk import Desk, strength_text
from slider_plugin.ui.jobs import EXPORT, RENDER, Job

MOST_STRENGTHS = 21
LARGEST_STRENGTH = 20.0
LAYOUTS = ("diffusers", "comfyui", "kohya", "lycoris")
"""Of `slider export --to`."""


def routes(desk: Desk) -> APIRouter:
    """The routes of this room."""
    router = APIRouter()

    @router.get("/runs/{name}/try")
    def try_page(name: str) -> HTMLResponse:
        values = stage(desk, desk.run(name))
        return desk.page("try.html", **values, parts=desk.parts(("_stage.html", "_jobs.html"), values))

    @router.get("/runs/{name}/stage")
    def stage_part(name: str, request: Request) -> Response:
        return desk.changed(request, "_stage.html", **stage(desk, desk.run(name)))

    @router.get("/runs/{name}/jobs")
    def jobs_part(name: str, request: Request) -> Response:
        return desk.changed(request, "_jobs.html", **stage(desk, desk.run(name)))

    @router.post("/runs/{name}/render")
    async def render(name: str, request: Request) -> HTMLResponse:
        form = {key: value for key, value in (await request.form(max_files=0)).items() if isinstance(value, str)}
        run = desk.run(name)
        _render(desk, run, form)
        return desk.page("_jobs.html", **stage(desk, run), seen="")

    @router.post("/runs/{name}/export")
    def export(name: str, to: Annotated[str, Form()] = "", flip: Annotated[bool, Form()] = False) -> HTMLResponse:
        run = desk.run(name)
        if not can_export() or to not in LAYOUTS:
            raise UserError(f"there is no layout {to[:40]!r}")
        if run.slider is None:
            raise UserError("there is no finished slider yet")
        file = run.output / f"{run.name}_{to}{'_flipped' if flip else ''}.safetensors"
        if file.exists():
            raise UserError(f"{desk.workspace.shown(file)} is there already")
        words = ["export", str(run.slider), "--to", to, "--output", str(file), *(["--flip"] if flip else [])]
        desk.jobs.add(run.name, EXPORT, words)
        return desk.page("_jobs.html", **stage(desk, run), seen="")

    return router


def can_export() -> bool:
    """Whether this version has `slider export`."""
    from slider_plugin.cli import app

    return any((command.name or getattr(command.callback, "__name__", "")) == "export" for command in app.registered_commands)


def stage(desk: Desk, run: runs.Run) -> dict[str, Any]:
    """What can be moved, what is being drawn, and what can be exported."""
    found = pictures.rows(run.output)
    finished = run.slider is not None
    latest = {kind: max(desk.jobs.of(run.name, kind), key=lambda job: job.number, default=None) for kind in (RENDER, EXPORT)}
    return {
        "run": run,
        "status": run.status(desk.jobs),
        "rows": found,
        "data": [row_data(desk, row) for row in found],
        "render": latest[RENDER],
        "export": latest[EXPORT],
        "busy": any(job is not None and job.is_active for job in latest.values()),
        "layouts": LAYOUTS if finished and can_export() else (),
        "exported": sorted(run.output.glob("*.safetensors")),
        "others": others(desk, run) if finished else [],
        "log_end": log_end,
    }


def row_data(desk: Desk, row: pictures.Row) -> dict[str, Any]:
    """One prompt and seed for the script."""
    places = [f"/file?path={_quoted(desk.workspace.shown(p.path))}&v={p.path.stat().st_mtime_ns}" for p in row.pictures]
    return {"prompt": row.prompt, "seed": row.seed, "beside": row.beside, "strengths": row.strengths, "images": places}


def others(desk: Desk, run: runs.Run) -> list[runs.Run]:
    """Finished sliders of the same family, which can be drawn together with this one."""
    family = run.written().get("model_family")
    found = [desk.run(name) for name in runs.all_runs(desk.workspace) if name != run.name]
    return [one for one in found if one.slider is not None and one.written().get("model_family") == family]


def log_end(job: Job) -> str:
    """The last line that a job said."""
    lines = [line for line in job.log.splitlines() if line.strip()]
    return lines[-1] if lines else ""


# --- Drawing on request -----------------------------------------------------------------------------------------------


def _render(desk: Desk, run: runs.Run, form: dict[str, str]) -> Job:
    """Queue the drawing of one prompt at some strengths. Raises UserError for what cannot be drawn."""
    if run.slider is None:
        raise UserError("there is no finished slider yet: train it first")
    config, problems = run.read(desk.plugins.facts)
    if config is None:
        raise UserError("; ".join(problems))
    prompt = form.get("prompt", "").replace("\r\n", "\n")
    if len(prompt) > 4000:
        raise UserError("a prompt has at most 4000 letters")
    strengths = _strengths(form.get("strengths", ""))
    seed = _seed(form.get("seed", ""), config)
    beside = _beside(desk, run, form)
    changed = {
        "prompts": [{"name": "try", "prompt": prompt, "adapter_strength": strengths[-1]}],
        "validation_strengths": strengths,
        "validation_seed": seed,
        "num_validation_images": 1,
        "validation_disable": False,
        "base_loras": [*to_json(config)["base_loras"], *beside],
    }
    arguments = ["validate", "{job}/config.json", "--adapter", str(run.slider)]
    output = run.output / pictures.TRIES / f"{time.time_ns():020d}-{secrets.token_hex(4)}"
    job = desk.jobs.add(run.name, RENDER, [*arguments, "--output", str(output)], {"config.json": to_json(config) | changed})
    if beside:
        names = [f"{Path(one['path']).parents[1].name} {strength_text(one['weight'])}" for one in beside]
        write_json(output / pictures.BESIDE, names)
    return job


def _strengths(text: str) -> list[float]:
    try:
        found = sorted({float(part) + 0.0 for part in text.replace("\N{MINUS SIGN}", "-").split(",") if part.strip()})
    except ValueError as error:
        raise UserError(f"strengths are numbers with commas between them, such as -1, 0, 1.5; not {text[:60]!r}") from error
    if not found or len(found) > MOST_STRENGTHS or not all(abs(s) <= LARGEST_STRENGTH and math.isfinite(s) for s in found):
        raise UserError(f"give 1 to {MOST_STRENGTHS} strengths between -{LARGEST_STRENGTH:g} and {LARGEST_STRENGTH:g}")
    return found


def _seed(text: str, config: RunConfig) -> int:
    if not text.strip():
        return config.seed if config.validation_seed is None else config.validation_seed
    if not text.strip().isdecimal() or int(text) >= 2**63:
        raise UserError(f"a seed is a whole number from 0 on, not {text[:40]!r}")
    return int(text)


def _beside(desk: Desk, run: runs.Run, form: dict[str, str]) -> list[dict[str, Any]]:
    """Other sliders that are drawn along, each at its own strength: LoRAs of the base, which is what they are then."""
    found = []
    for other in others(desk, run):
        text = form.get(f"with.{other.name}", "").strip()
        if text and other.slider is not None and (weight := _strengths(text)[0]):
            found.append({"path": str(other.slider), "weight": weight})
    return found


def _quoted(path: str) -> str:
    from urllib.parse import quote

    return quote(Path(path).as_posix())
