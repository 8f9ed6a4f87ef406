"""`slider ui`: where the page listens, its token, and the server."""

from __future__ import annotations

import secrets
import socket
import webbrowser
from pathlib import Path

from slider_plugin import console
from slider_plugin.errors import UserError

MISSING = "the page needs more libraries: pip install 'slider-plugin[ui]'"


def serve(workspace: Path, host: str, port: int, readable: tuple[Path, ...] = (), browser: bool = False) -> None:
    """Serve the page until Ctrl-C; runs go on.

    Args:
        workspace: the folder that it may read and write.
        host: address to listen at; one that others can reach needs a token, which is printed.
        port: 0 takes any that is free.
        readable: other folders that may be read.
        browser: whether to open the address here.

    Raises:
        UserError: libraries are missing, the folder is none, or the port is taken.
    """
    try:
        import uvicorn

        from slider_plugin.ui.app import create_app
        from slider_plugin.ui.security import Guard, is_loopback
        from slider_plugin.ui.workspace import Workspace
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("slider_"):
            raise
        raise UserError(f"{MISSING} ({error.name} is not there)") from error
    opened = Workspace.open(workspace, readable)
    token = None if is_loopback(host) else secrets.token_urlsafe(24)
    listening = listen(host, port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/"
    app = create_app(opened, Guard(host, token))
    console.out.print(address + (f"?token={token}" if token else ""), markup=False)
    if token:
        console.warn(f"{host} can be reached from other machines: whoever has the token can train, read and write here")
    console.say(f"workspace {opened.root}; Ctrl-C ends the page, and runs go on")
    if browser:
        webbrowser.open(address + (f"?token={token}" if token else ""))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False))
    server.run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises UserError if the address is not ours or the port is taken."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(128)  # whoever opens the printed address at once is kept waiting, and not refused
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen at {host}:{port}: {error}; give another --port or --host") from error
    return made
