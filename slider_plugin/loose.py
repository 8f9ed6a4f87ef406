"""Families that are tried without being packaged: `--plugin ./my_family.py` (or `module:attribute`), or `SLIDER_PLUGIN_EXTRA`.

The variable is how they reach the processes that a run starts. What was named is imported at once, unlike an installed plugin:
only it knows its family's name.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from slider_plugin.errors import PluginError

EXTRA = "SLIDER_PLUGIN_EXTRA"
"""Environment variable: comma-separated family files or `module:attribute`."""

SUFFIX = ".py"


def targets(environ: Mapping[str, str]) -> list[str]:
    """What the variable names: absolute paths of files, and `module:attribute`, each once."""
    words = (word.strip() for word in environ.get(EXTRA, "").split(","))
    return list(dict.fromkeys(_absolute(word) for word in words if word))


def add(more: Sequence[str]) -> None:
    """Name more of them, for this process and those that it starts. Raises PluginError for a file that is not there."""
    for word in more:
        if ":" not in word and (Path(word).suffix != SUFFIX or not Path(word).is_file()):
            raise PluginError(f"--plugin {word}: there is no such Python file; give the module that holds FAMILY")
        if "," in word:
            raise PluginError(f"--plugin {word}: the path has a comma, which {EXTRA} cannot hold; copy the file elsewhere")
    os.environ[EXTRA] = ",".join(dict.fromkeys([*targets(os.environ), *map(_absolute, more)]))


def is_file(target: str) -> bool:
    """Whether a target is a file's path; else it is `module:attribute`."""
    return target.endswith(SUFFIX)


def _absolute(word: str) -> str:
    return str(Path(word).resolve()) if is_file(word) else word


def version(target: str) -> str:
    """The beginning of the hash of a file's content, which stands for a version in metadata; a module has none."""
    return hashlib.sha256(Path(target).read_bytes()).hexdigest()[:12] if is_file(target) else ""


def import_file(path: Path) -> ModuleType:
    """Import a file under its own name, once, so that `package.module:Class` in it leads back to it.

    Raises:
        PluginError: its name is that of another module.
        Exception: whatever the file raises.
    """
    loaded = sys.modules.get(path.stem)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    if not path.stem.isidentifier():
        raise PluginError(
            f"{path} cannot be imported: {path.stem!r} is no name of a module; use letters, digits and underscores"
        )
    found = None if loaded is not None else find_spec(path.stem)
    if loaded is not None or (found is not None and found.origin != str(path)):  # in its own folder it finds itself
        raise PluginError(f"{path} has the name of another module, {path.stem}; rename the file")
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # a path that ends with .py has both
    module = module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module
