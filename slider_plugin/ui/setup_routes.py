"""The list of runs, and setting one up: the form, its file, and the doctor's plan."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

from fastapi import APIRouter, Form, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from slider_plugin.config import RunConfig
from slider_plugin.errors import UserError
from slider_plugin.ui import forms, runs, schema
from slider_plugin.ui.checks import Finding
from slider_plugin.ui.desk import Desk
from slider_plugin.ui.jobs import TRAIN

MOST_FIELDS = 20_000
SUMMARY = ("targets", "trainable", "memory", "peak", "weights", "one step", "steps", "step size")
"""Rows of the doctor's plan that are shown at once."""

SOURCES = ("data_backend_config", "user_prompt_library", "validation_prompt", "lycoris_config")
"""Keys whose files are read into the form."""


def routes(desk: Desk) -> APIRouter:
    """The routes of this room."""
    router = APIRouter()

    @router.get("/")
    def index() -> HTMLResponse:
        return _index(desk)

    @router.post("/runs")
    def create(
        name: Annotated[str, Form()] = "", family: Annotated[str, Form()] = "", source: Annotated[str, Form()] = ""
    ) -> Response:
        try:
            run = runs.new_run(desk.workspace, name, _beginning(desk, family, source))
        except UserError as error:
            return _index(desk, 400, str(error), name, family, source)
        return RedirectResponse(f"/runs/{run.name}/setup", 303)

    @router.get("/runs/{name}")
    def enter(name: str) -> Response:
        state = desk.run(name).status(desk.jobs).state
        return RedirectResponse(f"/runs/{name}/{'setup' if state == 'new' else 'watch'}", 303)

    @router.get("/runs/{name}/setup")
    def setup(name: str) -> HTMLResponse:
        return _setup(desk, desk.run(name))

    @router.post("/runs/{name}/setup")
    async def save(name: str, request: Request) -> HTMLResponse:
        given = await request.form(max_fields=MOST_FIELDS, max_files=0)
        form = {key: value for key, value in given.items() if isinstance(value, str)}
        return _save(desk, desk.run(name), form)

    @router.get("/runs/{name}/plan")
    def plan(name: str) -> HTMLResponse:
        return _plan(desk, desk.run(name))

    @router.post("/runs/{name}/text")
    def text(name: str, text: Annotated[str, Form()] = "") -> Response:
        run = desk.run(name)
        try:
            written = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"this is not JSON: {error}") from error
        if not isinstance(written, dict):
            raise UserError("it must hold an object of keys and values")
        run.save(written)
        return Response(status_code=204, headers={"HX-Redirect": f"/runs/{name}/setup"})

    @router.post("/runs/{name}/start")
    def start(name: str) -> Response:
        _start(desk, desk.run(name))
        return RedirectResponse(f"/runs/{name}/watch", 303)

    return router


# --- The list of runs -------------------------------------------------------------------------------------------------


def _index(desk: Desk, status: int = 200, error: str = "", name: str = "", family: str = "", source: str = "") -> HTMLResponse:
    shown = []
    for one in runs.all_runs(desk.workspace):
        run = desk.run(one)
        try:
            shown.append({"run": run, "status": run.status(desk.jobs), "family": run.written().get("model_family", "")})
        except UserError as problem:
            shown.append({"run": run, "status": None, "family": str(problem)})
    return desk.page(
        "index.html", status, runs=shown, families=desk.families, workspace=desk.workspace.root,
        error=error, name=name, family=family, source=source,
    )  # fmt: skip


def _beginning(desk: Desk, family: str, source: str) -> dict[str, Any]:
    """What a new run begins with: an existing configuration, or a family and the defaults."""
    if source.strip():
        file = desk.workspace.inside(source.strip())
        if not file.is_file():
            raise UserError(f"there is no file {source.strip()}")
        config, _ = runs.read_within(desk.workspace, file, desk.plugins.facts)
        return forms.compact(config)
    if desk.family(family) is None:
        raise UserError("choose a model family")
    return {
        "model_family": family,
        "slider_lora_target": True,
        "buckets": [
            {"id": "more", "instance_data_dir": "", "slider_strength": 0.5},
            {"id": "less", "instance_data_dir": "", "slider_strength": -0.5},
        ],
    }


# --- The form ---------------------------------------------------------------------------------------------------------


def _setup(desk: Desk, run: runs.Run, problems: list[str] | None = None) -> HTMLResponse:
    return desk.page("setup.html", **_form(desk, run), status=run.status(desk.jobs), problems=problems or [])


def _form(desk: Desk, run: runs.Run) -> dict[str, Any]:
    """What the form shows."""
    written, broken = _normal(desk, run)
    family = desk.family(written.get("model_family"))
    shown = forms.paths_shown(written, desk.workspace)
    return {
        "run": run,
        "written": shown,
        "broken": broken,
        "families": desk.families,
        "family": family,
        "options": [schema.option_widget(option, written) for option in (family.options if family else ())],
        "sections": schema.sections(shown),
        "titles": schema.TITLES,
        "rows": {key: forms.rows(shown, key) for key in schema.TABLES},
        "bucket_basic": schema.BUCKET_BASIC,
        "text": json.dumps(written, indent=2, ensure_ascii=False),
    }


def _normal(desk: Desk, run: runs.Run) -> tuple[dict[str, Any], str]:
    """What config.json holds, under our own names and with the files it names read in, as far as it can be read."""
    try:
        written = run.written()
    except UserError as error:
        return {}, str(error)
    known = {*RunConfig.model_fields, *(option.name for option in desk.options(written.get("model_family")))}
    if any(written.get(key) for key in SOURCES) or set(written) - known:
        config, _ = run.read(desk.plugins.facts)
        if config is not None:
            return forms.compact(config), ""
    return written, ""


def _save(desk: Desk, run: runs.Run, form: dict[str, str]) -> HTMLResponse:
    """Write what the form says; answer with what is wrong, or with a new form where its shape has changed."""
    if run.status(desk.jobs).is_active:
        return desk.page("_saved.html", problems=[("", "it is being trained; nothing was saved")], saved=False)
    before, _ = _normal(desk, run)
    try:
        written = forms.parse(form, desk.workspace, desk.options(form.get("k.model_family")), before)
    except forms.FormError as error:
        places = [("f-" + name.replace(".", "-"), line) for name, line in error.problems.items()]
        return desk.page("_saved.html", problems=places, saved=False)
    action = form.get("action", "")
    if action:
        written = _act(written, action)
        if action == "family":  # keys of the family before mean nothing to this one
            gone = {option.name for option in desk.options(before.get("model_family"))}
            written = {key: value for key, value in written.items() if key not in gone}
    run.save(written)
    config, problems = run.read(desk.plugins.facts)
    moved = config is not None and any(written.get(key) for key in SOURCES)
    if moved and config is not None:
        run.save(forms.compact(config))
    if action or moved:
        return desk.page("_form.html", headers={"HX-Retarget": "#form", "HX-Trigger-After-Settle": "saved"}, **_form(desk, run))
    placed = [(place(line, written), line.partition(": ")[2] or line) for line in problems]
    return desk.page("_saved.html", headers={"HX-Trigger": "saved"}, problems=placed, saved=True)


def _act(written: dict[str, Any], action: str) -> dict[str, Any]:
    """`add-buckets` adds a row, `remove-buckets-2` takes one out; other actions change nothing but the form's shape."""
    match = re.fullmatch(r"(add|remove)-(buckets|prompts|base_loras)(?:-(\d{1,6}))?", action)
    if match is None:
        return written
    listed = list(written.get(match[2], []))
    if match[1] == "add":
        new = dict(forms.NEW_ROWS[match[2]])
        name = {"buckets": "id", "prompts": "name"}.get(match[2])
        if name:
            taken, stem = {row.get(name) for row in listed}, {"id": "bucket", "name": "prompt"}[name]
            new[name] = next(f"{stem}-{n}" for n in range(1, 10_000) if f"{stem}-{n}" not in taken)
        listed.append(new)
    elif int(match[3] or -1) < len(listed):
        del listed[int(match[3] or -1)]
    return {**written, match[2]: listed}


def place(line: str, written: dict[str, Any]) -> str:
    """The element's id of the field that a problem is about; "" if that is not known."""
    _, _, rest = line.partition(": ")
    if match := re.match(r"(?:entry (\d+)|bucket '([^']*)'): (\w+): ", rest):
        names = [row.get("id") for row in written.get("buckets", []) if isinstance(row, dict)]
        number = int(match[1]) - 1 if match[1] else names.index(match[2]) if match[2] in names else -1
        return f"f-b-{number}-{match[3]}" if number >= 0 else ""
    if match := re.match(r"prompt (\d+): (\w+): ", rest):
        return f"f-p-{int(match[1]) - 1}-{match[2]}"
    if match := re.match(r"base_loras, entry (\d+): (\w+): ", rest):
        return f"f-l-{int(match[1]) - 1}-{match[2]}"
    if match := re.match(r"(\w+): ", rest):
        return f"f-k-{match[1]}" if match[1] in RunConfig.model_fields else f"f-o-{match[1]}"
    return ""


# --- The plan ---------------------------------------------------------------------------------------------------------


def _plan(desk: Desk, run: runs.Run) -> HTMLResponse:
    """What `slider doctor` says of the saved file, beside the form and at each bucket."""
    status = run.status(desk.jobs)
    config, problems = run.read(desk.plugins.facts)
    found = Finding(2, "", (), tuple(problems)) if config is None else desk.checker.ask(str(run.file), *going_on(run))
    written = run.written()
    names = [str(row.get("id", "")) for row in written.get("buckets", []) if isinstance(row, dict)]
    return desk.page(
        "_plan.html", run=run, status=status, found=found, ready=found.code == 0,
        rows=summary(found.plan), notes=[(number, found.about(name)) for number, name in enumerate(names)],
    )  # fmt: skip


def summary(plan: str) -> list[tuple[str, str]]:
    """The rows of the doctor's plan that are shown at once."""
    rows = []
    for line in plan.splitlines():
        name, _, value = line.partition("  ")
        if name in SUMMARY and value.strip():
            rows.append((name, value.strip()))
    return rows


def _start(desk: Desk, run: runs.Run) -> None:
    """Queue a run, or go on with it. Raises UserError for what can be seen without loading anything."""
    config, problems = run.read(desk.plugins.facts)
    if config is None:
        raise UserError("it cannot be trained yet: " + "; ".join(problems))
    desk.jobs.add(run.name, TRAIN, ["train", str(run.file), *going_on(run)])


def going_on(run: runs.Run) -> list[str]:
    """The flags by which a run goes on from its latest checkpoint, if it has one."""
    return ["--resume_from_checkpoint", "latest"] if run.has_checkpoint else []
