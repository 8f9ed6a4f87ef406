"""The contract says everything about itself: annotated, documented, with examples that hold, and importable without torch."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import slider_hooks
from slider_hooks import specs
from slider_plugin.lint import SPEC, lint_hooks

ROOT = Path(__file__).parents[1]
OURS = ("slider_plugin", "hooks", "tests", "fixtures")


def spec_of(hook: str) -> tuple[inspect.Signature, str]:
    function = getattr(specs, hook)
    return inspect.signature(function), inspect.cleandoc(function.__doc__)


def section(doc: str, title: str) -> str:
    """The indented text under a heading of a docstring."""
    found = re.search(rf"^{title}:+\n+((?:[ ]+.*\n?|\n)+)", doc, re.MULTILINE)
    assert found, f"no section {title}"
    return textwrap.dedent(found[1])


def test_hooks_are_the_specs() -> None:
    marked = {name for name, value in vars(specs).items() if hasattr(value, SPEC)}
    assert marked == set(specs.EVERY)
    assert len(specs.EVERY) == len(marked)
    assert set(specs.FOR_EVERY_FAMILY) < set(specs.HOOKS)
    assert all(getattr(getattr(specs, hook), SPEC)["firstresult"] for hook in specs.HOOKS)


@pytest.mark.parametrize("hook", specs.EVERY)
def test_a_spec_is_annotated(hook: str) -> None:
    signature, _ = spec_of(hook)
    assert next(iter(signature.parameters)) == "family"
    for parameter in signature.parameters.values():
        assert parameter.annotation is not parameter.empty, parameter.name
        assert parameter.default is parameter.empty, parameter.name
        assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD, parameter.name
    assert "None" in str(signature.return_annotation), "every hook may hand on to the default"


@pytest.mark.parametrize("hook", specs.EVERY)
def test_a_spec_documents_when_it_is_called_each_argument_and_what_to_return(hook: str) -> None:
    signature, doc = spec_of(hook)
    assert "Called" in doc.split("\n\n")[0]
    documented = re.findall(r"^(\w+): \S", section(doc, "Args"), re.MULTILINE)
    assert documented == list(signature.parameters)
    assert "default" in section(doc, "Returns")


@pytest.mark.parametrize("hook", specs.EVERY)
def test_the_example_of_a_spec_is_a_valid_implementation(hook: str) -> None:
    _, doc = spec_of(hook)
    module = ModuleType("example")
    exec(section(doc, "Example"), {"hookimpl": slider_hooks.hookimpl}, vars(module))
    assert callable(getattr(module, hook))
    assert lint_hooks(module) == []


def test_every_public_field_of_the_contract_is_documented() -> None:
    tree = ast.parse(Path(slider_hooks.types.__file__).read_text())
    missing = [
        f"{node.name}.{first.target.id}"
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        for first, then in zip(node.body, [*node.body[1:], None], strict=True)
        if isinstance(first, ast.AnnAssign) and isinstance(first.target, ast.Name) and not is_text(then)
    ]
    assert missing == []


def is_text(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def test_everything_exported_exists() -> None:
    assert len(set(slider_hooks.__all__)) == len(slider_hooks.__all__)
    assert all(hasattr(slider_hooks, name) for name in slider_hooks.__all__)


def test_the_contract_imports_pluggy_and_the_standard_library_alone() -> None:
    code = """
        import sys
        sys.path.insert(0, sys.argv[1])
        before = set(sys.modules)
        import slider_hooks, slider_hooks.specs
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        print(*sorted(new - set(sys.stdlib_module_names)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(ROOT / "hooks")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {name for name in done.stdout.split() if not name.startswith("_")} == {"pluggy", "slider_hooks"}


def test_the_contract_is_never_imported_under_a_second_name() -> None:
    guilty = [
        str(path.relative_to(ROOT))
        for folder in OURS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if "hooks" in {name.partition(".")[0] for name in imported(node)}
    ]
    assert guilty == []


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
