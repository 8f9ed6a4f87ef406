"""Every module can be imported first: which one is depends on the command, and a circle shows in one order alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "PIL", "pydantic", "rich", "typer", "safetensors.torch", "accelerate", "peft", "diffusers")
EACH = """
import importlib, os, sys, traceback
for name in {heavy!r}:
    importlib.import_module(name)
assert not [name for name in sys.modules if name.startswith("slider_")]
for name in {modules!r}:
    child = os.fork()
    if not child:
        try:
            importlib.import_module(name)
        except BaseException:
            print(name, file=sys.stderr)
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="imports libraries once and forks for each module")
def test_every_module_can_be_the_first() -> None:
    files = [path for path in (ROOT / "slider_plugin").rglob("*.py") if not {"architectures", "template"} & set(path.parts)]
    names = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in files}
    modules = sorted(name.removesuffix(".__init__") for name in names if not name.endswith("__main__"))
    assert len(modules) > 100
    code = EACH.format(heavy=HEAVY, modules=modules)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
