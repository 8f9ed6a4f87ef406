"""What every page needs: the workspace, the installed families, the jobs, the doctor, and how a page is written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from slider_hooks import Family, Option
from slider_plugin.errors import UserError
from slider_plugin.registry import Plugins
from slider_plugin.ui import runs
from slider_plugin.ui.checks import Checker
from slider_plugin.ui.jobs import Jobs
from slider_plugin.ui.workspace import Workspace

HERE = Path(__file__).parent


class NotThereError(UserError):
    """There is no such run or file."""


@dataclass
class Desk:
    """The parts that the routes work with."""

    workspace: Workspace
    plugins: Plugins
    jobs: Jobs = field(init=False)
    checker: Checker = field(init=False)

    def __post_init__(self) -> None:
        self.jobs = Jobs(self.workspace.state)
        self.checker = Checker(self.workspace.root)

    @cached_property
    def environment(self) -> Environment:
        """Everything that is not markup is escaped; a name that is missing is an error."""
        made = Environment(
            loader=PackageLoader("slider_plugin.ui"), autoescape=select_autoescape(default=True),
            undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        made.filters["shown"] = self.workspace.shown
        made.filters["strength"] = strength_text
        return made

    def page(self, template: str, code: int = 200, headers: Mapping[str, str] | None = None, **values: Any) -> HTMLResponse:
        """An answer made from a template."""
        text = self.environment.get_template(template).render(values)
        return HTMLResponse(text, code, dict(headers or {}) | {"Cache-Control": "no-store"})

    def changed(self, request: Request, template: str, **values: Any) -> Response:
        """A part that is asked for again and again: 204, which leaves the page alone, unless it has changed."""
        text, seen = self._part(template, values)
        if request.query_params.get("seen") == seen:
            return Response(status_code=204)
        return HTMLResponse(text.replace("SEEN", seen), headers={"Cache-Control": "no-store"})

    def parts(self, templates: Iterable[str], values: Mapping[str, Any]) -> dict[str, Markup]:
        """Such parts as they stand on a page from the beginning, by template."""
        return {name: Markup(text.replace("SEEN", seen)) for name in templates for text, seen in [self._part(name, values)]}

    def _part(self, template: str, values: Mapping[str, Any]) -> tuple[str, str]:
        """A part, with SEEN where its digest goes, and the digest."""
        text = self.environment.get_template(template).render({**values, "seen": "SEEN"})
        return text, hashlib.sha256(text.encode()).hexdigest()[:16]

    def run(self, name: str) -> runs.Run:
        """The run of that name. Raises NotThereError."""
        found = runs.open_run(self.workspace, name)
        if found is None:
            raise NotThereError(f"there is no run {name[:60]!r}")
        return found

    @cached_property
    def families(self) -> list[Family]:
        """The families that can be used, by their titles; broken ones are left to `slider plugins list --check`."""
        found = []
        for name in self.plugins.families():
            try:
                found.append(self.plugins.facts(name))
            except UserError:
                continue
        return sorted(found, key=lambda family: family.title.lower())

    def family(self, name: object) -> Family | None:
        """One family by name; None if there is none."""
        try:
            return self.plugins.facts(name) if isinstance(name, str) and name else None
        except UserError:
            return None

    def options(self, name: object) -> tuple[Option, ...]:
        """A family's own keys."""
        found = self.family(name)
        return found.options if found else ()


def strength_text(value: float) -> str:
    """A strength as strips have it: +0.5, 0, -1; with the minus sign of typography."""
    return "0" if value == 0 else f"{value:+.4g}".replace("-", "\N{MINUS SIGN}")
