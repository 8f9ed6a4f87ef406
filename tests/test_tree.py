"""Rules about the source tree itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOST = [p for p in (ROOT / "slider_plugin").rglob("*.py") if "architectures" not in p.parts]
FAMILIES = [p for p in (ROOT / "slider_plugin" / "architectures").glob("*.py") if p.name != "__init__.py"]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(p for d in ("docs", "hooks") for p in sorted((ROOT / d).glob("*.md")))]
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "lycoris", "safetensors"}


def imports(path: Path, top_level: bool = False) -> set[str]:
    """Names of imported modules; with `top_level` only those that importing the file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_no_family_is_named_outside_its_file() -> None:
    """The demo names the families that it has fixtures for, and nothing else does."""
    names = "|".join(p.stem for p in FAMILIES)
    offenders = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in HOST
        if "demo" not in path.parts and path.name != "cli.py"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(rf"[\"']({names})[\"']", line) or re.search(r"family\s*(==|!=|in)\s*[\[(\"']", line)
    ]
    assert not offenders


@pytest.mark.parametrize("path", FAMILIES, ids=lambda p: p.stem)
def test_families_import_lightly_and_only_what_third_parties_may(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path, top_level=True)} & HEAVY
    own = {name for name in imports(path) if name.startswith("slider_plugin")}
    assert all(name.startswith(("slider_plugin.testing", "slider_plugin.common", "slider_plugin.loading")) for name in own)


def test_the_contract_imports_pluggy_and_the_standard_library_alone() -> None:
    allowed = set(sys.stdlib_module_names) | {"pluggy", "slider_hooks"}
    for path in (ROOT / "hooks" / "slider_hooks").glob("*.py"):
        assert {name.split(".")[0] for name in imports(path, top_level=True)} <= allowed, path


def test_importing_a_family_needs_no_torch() -> None:
    script = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'diffusers', 'peft', 'transformers')))\n"
        "from slider_plugin.registry import Plugins\n"
        "plugins = Plugins.discover()\n"
        "print([plugins.facts(name).title for name in plugins.families()])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Z-Image" in result.stdout


def test_no_pickle_anywhere() -> None:
    for path in (ROOT / "slider_plugin").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\bpickle\.\w|(?<!safetensors\.)torch\.(save|load)\(|weights_only=False", text), path


def test_readme_names_the_two_commands_that_ci_runs() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    command = re.search(r"^pip install .*& pytest -n auto .*$", readme, re.MULTILINE)
    assert command
    assert command[0].removeprefix("pip install ") in ci


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> list[str]:
    """Where its links and pictures lead, but for other sites."""
    found = re.findall(r"\]\(([^)\s]*)\)", re.sub(r"`[^`]*`", "", prose(page)))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(page: Path) -> set[str]:
    """The anchors of its headings, by GitHub's rule; one that comes again is numbered."""
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.*?)[ #]*$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        found.append(re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-"))
    return {f"{slug}-{n}" if (n := found[:i].count(slug)) else slug for i, slug in enumerate(found)}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT.resolve()) and target.exists(), f"{link}: there is no such file"
        assert not anchor or (target.suffix == ".md" and anchor in anchors(target)), f"{link}: there is no such heading"


def test_anchors_are_made_by_github_s_rule(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# On torch.compile\n## The demo's `a_b`, [one](x.md) - two\n```bash\n# none\n```\n## Twice\n## Twice\n")
    assert anchors(page) == {"on-torchcompile", "the-demos-a_b-one---two", "twice", "twice-1"}


def test_readme_leads_to_every_page_of_docs() -> None:
    readme = ROOT / "README.md"
    linked = {readme.parent / link.partition("#")[0] for link in links(readme)}
    assert {page for page in PAGES if page.parent.name == "docs"} <= linked
