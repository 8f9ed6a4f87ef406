"""A run's page as one file that needs nothing else: style, script and pictures are in it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from slider_plugin.ui import pictures, runs
from slider_plugin.ui.desk import HERE, Desk

MOST_BYTES = 200 * 2**20
"""Of the pictures in one file; what comes after that is left out and counted."""


def page(desk: Desk, run: runs.Run, live: dict[str, Any], strips: dict[str, Any]) -> str:
    """The page as text: the slider to move, the curves, the strips, and the configuration."""
    room = _Room()
    rows = [
        {
            "prompt": row.prompt,
            "seed": row.seed,
            "beside": row.beside,
            "strengths": [p.scale for p, _ in kept],
            "images": [uri for _, uri in kept],
        }
        for row in pictures.rows(run.output)
        if (kept := [(picture, uri) for picture in row.pictures if (uri := room.uri(picture.path))])
    ]
    drawn = [(step, [uri for file in files if (uri := room.uri(file))]) for step, files in strips["drawn"]]
    static = HERE / "static"
    return desk.environment.get_template("share.html").render(
        **{**live, **strips, "drawn": drawn},
        data=rows,
        left_out=room.left_out,
        style=Markup((static / "slider.css").read_text(encoding="utf-8")),
        script=Markup((static / "try.js").read_text(encoding="utf-8")),
        config=json.dumps(_without_places(desk, run), indent=2, ensure_ascii=False),
    )


class _Room:
    """Takes pictures in as long as there is room."""

    def __init__(self) -> None:
        self._left, self.left_out = MOST_BYTES, 0

    def uri(self, path: Path) -> str:
        """The picture as a data URI; "" if there is no room for it."""
        size = path.stat().st_size
        if size > self._left:
            self.left_out += 1
            return ""
        self._left -= size
        return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _without_places(desk: Desk, run: runs.Run) -> dict[str, Any]:
    """The configuration with paths relative to the workspace: whoever gets the file need not know where it was."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items()}
        if isinstance(value, list):
            return [plain(part) for part in value]
        return desk.workspace.shown(value) if isinstance(value, str) and value.startswith(str(desk.workspace.root)) else value

    found: dict[str, Any] = plain(run.written())
    return found
