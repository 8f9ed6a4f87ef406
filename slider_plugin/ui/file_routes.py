"""Files of the workspace: the picker's folders, small pictures of training images, pictures that were drawn, and uploads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Form, Request
from fastapi.responses import FileResponse, HTMLResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from slider_plugin.errors import UserError
from slider_plugin.files import replacing
from slider_plugin.ui import pictures
from slider_plugin.ui.desk import Desk, NotThereError

SHOWN_TYPES = {
    ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp", ".gif": "image/gif",
    ".mp4": "video/mp4", ".wav": "audio/wav",
}  # fmt: skip
KEPT_TYPES = {
    ".safetensors": "application/octet-stream",
    ".json": "application/json",
    ".jsonl": "text/plain",
    ".zip": "application/zip",
}
"""Files that are handed over to be saved, and never opened as a page."""

MOST_UPLOADS = 500


def routes(desk: Desk) -> APIRouter:
    """The routes of this room."""
    router = APIRouter()

    @router.get("/browse")
    def browse(path: str = ".", want: str = "folder", target: str = "") -> HTMLResponse:
        folder = desk.workspace.inside(path.strip() or ".")
        folder = folder if folder.is_dir() else folder.parent
        while not folder.is_dir() and folder != desk.workspace.root:
            folder = folder.parent
        entries = desk.workspace.listing(desk.workspace.inside(str(folder)))
        from slider_plugin.data.images import SUFFIXES

        images = sum(not entry.is_folder and Path(entry.name).suffix.lower() in SUFFIXES for entry in entries)
        return desk.page(
            "_browse.html", folder=desk.workspace.shown(folder), entries=entries, images=images,
            parents=list(desk.workspace.parents(folder)), want=want, target=target, others=desk.workspace.readable,
        )  # fmt: skip

    @router.get("/preview")
    def preview(request: Request) -> HTMLResponse:
        path = next((value for key, value in request.query_params.items() if key.endswith("instance_data_dir")), "")
        if not path.strip():
            return desk.page("_preview.html", found=None, line="")
        folder = desk.workspace.inside(path.strip())
        if not folder.is_dir():
            return desk.page("_preview.html", found=None, line="There is no such folder.")
        return desk.page("_preview.html", found=pictures.preview(folder), line="")

    @router.get("/thumb")
    def thumb(path: str) -> Response:
        from slider_plugin.data.images import SUFFIXES

        file = _file(desk, path)
        if file.suffix.lower() not in SUFFIXES:
            raise UserError("this is no image")
        return Response(pictures.thumbnail(file), media_type="image/jpeg", headers={"Cache-Control": "private, max-age=60"})

    @router.get("/file")
    def file(path: str) -> Response:
        found = _file(desk, path)
        kind = found.suffix.lower()
        if kind in SHOWN_TYPES:
            return FileResponse(found, media_type=SHOWN_TYPES[kind], headers={"Cache-Control": "no-cache"})
        if kind in KEPT_TYPES:
            return FileResponse(found, media_type=KEPT_TYPES[kind], filename=found.name)
        raise NotThereError("files of this kind are not shown")

    @router.post("/upload")
    async def upload(request: Request) -> HTMLResponse:
        form = await request.form(max_files=MOST_UPLOADS, max_fields=10)
        target = form.get("folder", "")
        folder = desk.workspace.inside(target if isinstance(target, str) and target.strip() else "", writing=True)
        if folder == desk.workspace.root:
            raise UserError("choose or name a folder for the images first")
        given = [one for one in form.getlist("images") if not isinstance(one, str)]
        refused = [line for one in given if (line := await run_in_threadpool(_keep, one, folder))]
        return desk.page(
            "_uploaded.html", count=len(given) - len(refused), refused=refused, folder=desk.workspace.shown(folder)
        )

    @router.post("/folders")
    def make(parent: Annotated[str, Form()] = ".", name: Annotated[str, Form()] = "") -> HTMLResponse:
        if not name.strip() or name.strip().startswith(".") or "/" in name or "\\" in name:
            raise UserError("a folder's name has no slash, and does not begin with a dot")
        folder = desk.workspace.inside(f"{parent}/{name.strip()}", writing=True)
        folder.mkdir(parents=True, exist_ok=True)
        return browse(desk.workspace.shown(folder))

    return router


def _file(desk: Desk, path: str) -> Path:
    """A file of the workspace. Raises NotThereError; hidden files are as if they were not there."""
    found = desk.workspace.inside(path)
    hidden = any(part.startswith(".") for part in Path(desk.workspace.shown(found)).parts)
    if hidden or not found.is_file():
        raise NotThereError("there is no such file")
    return found


def _keep(one: UploadFile, folder: Path) -> str:
    """Keep one uploaded image or caption; returns why not, if it is not kept."""
    from slider_plugin.data.images import SUFFIXES, check_image

    name = Path((one.filename or "").replace("\\", "/")).name
    if not name or name.startswith(".") or Path(name).suffix.lower() not in {*SUFFIXES, ".txt"} or not name.isprintable():
        return f"{name[:80] or 'a file without a name'}: no image or caption by its name"
    path = folder / name
    if path.exists() or path.is_symlink():
        return f"{name}: there is one already"
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(one.file.read())
            if path.suffix.lower() in SUFFIXES:
                check_image(temporary, pictures.MOST_PIXELS)
    except UserError as error:
        return f"{name}: {str(error).partition(': ')[2].partition('; ')[0]}"
    return ""
