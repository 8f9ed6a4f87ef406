"""Plugins are found without being imported, and one plugin cannot harm or answer for another.

Every distribution here is real metadata in a temporary folder, read by importlib.metadata; what is installed is never seen.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from site_packages import Site, error_of

import slider_hooks
from slider_hooks import Components, Flavour, LoadRequest, PromptEntry, ResolvedTargets, TargetRequest
from slider_plugin import defaults, plugins_cmd
from slider_plugin.discovery import PluginRow
from slider_plugin.errors import PluginError, UserError
from slider_plugin.family import LoadedFamily
from slider_plugin.lint import lint
from slider_plugin.objectives.bucket import Bucket
from slider_plugin.registry import Plugins

ROOT = Path(__file__).parents[1]

# --- Discovery -------------------------------------------------------------------------------------------------------


def test_rows_are_sorted_and_their_json_is_an_interface(site: Site) -> None:
    site.family("zebra")
    site.family("apple", "dist-two")
    site.install("dist-watcher", {"watch": "module_zebra:watcher"}, kind="extensions")
    rows = site.plugins().rows()
    order = [("architecture", "apple"), ("architecture", "zebra"), ("extension", "watch")]
    assert [(row.kind, row.name) for row in rows] == order
    assert plugins_cmd.as_json(rows[:1]) == inspect.cleandoc("""
        [
          {
            "family": "apple",
            "distribution": "dist-two",
            "version": "1.0",
            "target": "module_apple",
            "status": "available",
            "error": null,
            "kind": "architecture",
            "name": "apple"
          }
        ]""")
    assert json.loads(plugins_cmd.as_json(rows))[2]["family"] is None
    assert plugins_cmd.as_json([]) == "[]"
    assert not [name for name in sys.modules if name.startswith("module_")]


def test_table_shows_every_row_and_every_error(site: Site) -> None:
    from rich.console import Console

    site.family("good", code="# [/red] is no markup")
    site.install("dist-gone", {"gone": "no_such_module"})
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(plugins_cmd.render_table(site.plugins().rows()))
    table = console.export_text()
    assert "good" in table
    assert "dist-gone 1.0 says that it is in no_such_module, which does not exist" in table
    console.print(plugins_cmd.render_table([]))
    assert "pip install -e ." in console.export_text()


@pytest.mark.parametrize("egg_first", [True, False])
def test_metadata_that_is_on_the_path_twice_counts_once(site: Site, monkeypatch: pytest.MonkeyPatch, egg_first: bool) -> None:
    site.family("pocket", "dist-pocket")
    checkout = site.folder / "checkout"
    site.install("Dist_Pocket", {"pocket": "module_pocket", "old": "gone"}, version="0.1", egg=True, folder=checkout)
    path = [str(checkout), str(site.folder)] if egg_first else [str(site.folder), str(checkout)]
    with monkeypatch.context() as patch:  # this path alone: nothing that is installed
        patch.setattr(sys, "path", path)
        importlib.invalidate_caches()
        rows = Plugins.discover(environ={}).rows()
    assert [(row.name, row.version, row.status) for row in rows] == [("pocket", "1.0", "available")]


def test_two_distributions_with_one_name_clash(site: Site) -> None:
    site.family("pocket", "dist-a")
    site.family("pocket", "dist-b", module="other")
    site.family("fine")
    assert site.statuses() == {"dist-a:pocket": "clash", "dist-b:pocket": "clash", "dist-fine:fine": "available"}
    message = error_of(lambda: site.plugins().load("pocket"))
    assert "claimed by dist-a 1.0 and dist-b 1.0" in message
    assert "SLIDER_PLUGIN_BLOCK=dist-b:pocket" in message
    assert site.statuses(BLOCK="dist-b:pocket")["dist-a:pocket"] == "available"
    assert site.plugins().families() == ["fine"]


def test_a_built_in_wins_until_it_is_blocked(site: Site) -> None:
    site.family("sd1", "slider-plugin", more="aliases=('sd-legacy',)")
    site.family("sd1", "dist-mine", module="mine")
    assert site.statuses() == {"dist-mine:sd1": "shadowed", "slider-plugin:sd1": "available"}
    row = site.plugins().rows()[0]
    assert "SLIDER_PLUGIN_BLOCK=slider-plugin:sd1" in str(row.error)
    assert site.plugins().load("sd1").distribution == "slider-plugin"
    assert site.plugins(BLOCK="slider-plugin:sd1").load("sd1").distribution == "dist-mine"


def test_a_plugin_that_is_gone_neither_shadows_nor_clashes(site: Site) -> None:
    site.family("sd1", "dist-mine")
    site.install("slider-plugin", {"sd1": "not_there_any_more"})
    assert site.statuses() == {"dist-mine:sd1": "available", "slider-plugin:sd1": "missing"}


@pytest.mark.parametrize(
    ("environ", "available"),
    [
        ({}, {"sd1", "one", "two_x"}),
        ({"BLOCK": "one"}, {"sd1", "two_x"}),
        ({"BLOCK": " dist-one , two-x,"}, {"sd1"}),
        ({"BLOCK": "Dist_Two:two_x"}, {"sd1", "one"}),
        ({"BLOCK": "slider-plugin"}, {"one", "two_x"}),
        ({"BLOCK": ""}, {"sd1", "one", "two_x"}),
        ({"ALLOW": ""}, {"sd1"}),
        ({"ALLOW": "slider-plugin"}, {"sd1"}),
        ({"ALLOW": "one"}, {"sd1", "one"}),
        ({"ALLOW": "one,dist-two", "BLOCK": "one"}, {"sd1", "two_x"}),
    ],
)
def test_block_and_allow(site: Site, environ: dict[str, str], available: set[str]) -> None:
    site.family("sd1", "slider-plugin")
    site.family("one")
    site.family("two_x", "dist-two")
    plugins = site.plugins(**environ)
    assert set(plugins.families()) == available
    assert {row.status for row in plugins.rows() if row.name not in available} <= {"blocked"}


@pytest.mark.parametrize("variable", ["BLOCK", "ALLOW"])
def test_a_variable_that_names_what_is_not_there_is_an_error(site: Site, variable: str) -> None:
    site.family("pocket")
    message = error_of(lambda: site.plugins(**{variable: "pocket,pockte,dist-pocket:other"}))
    assert f"SLIDER_PLUGIN_{variable}" in message
    assert "pockte (did you mean 'pocket'?)" in message
    assert "dist-pocket:other" in message
    assert "Installed: dist-pocket:pocket" in message


def test_a_blocked_family_says_so(site: Site) -> None:
    site.family("pocket")
    message = error_of(lambda: site.plugins(BLOCK="pocket").load("pocket"))
    assert "dist-pocket:pocket is blocked: named in SLIDER_PLUGIN_BLOCK" in message


def test_modules_are_looked_for_without_running_their_packages(site: Site) -> None:
    bomb = "raise AssertionError('imported')"
    site.module("package/__init__.py", bomb)
    site.module("package/inner/__init__.py", bomb)
    site.module("package/inner/family.py", bomb)
    site.module("space/part/family.py", bomb)
    site.module("leftover/__pycache__/old.pyc", "")
    targets = {
        "deep": "package.inner.family",
        "inner": "package.inner:thing",
        "space": "space.part.family [extra]",
        "lost": "package.inner.lost",
        "under_file": "package.inner.family.more",
        "leftover": "leftover",
        "nowhere": "nowhere_at_all.family",
        "odd": "not a module!",
        "main": "__main__.x",
    }
    site.install("dist", targets)
    rows = site.plugins().rows()
    assert {row.name for row in rows if row.status == "available"} == {"deep", "inner", "space"}
    assert {row.name for row in rows if row.status == "missing"} == targets.keys() - {"deep", "inner", "space"}
    assert "package" not in sys.modules


# --- Loading ---------------------------------------------------------------------------------------------------------


def test_only_the_family_that_was_asked_for_is_imported(site: Site) -> None:
    site.family("pocket")
    site.family("other")
    plugins = site.plugins()
    assert plugins.facts("pocket").title == "A title"
    assert plugins.facts("pocket") is plugins.load("pocket").facts
    assert "module_pocket" in sys.modules
    assert "module_other" not in sys.modules


@pytest.mark.parametrize("spelling", ["two_words", "two-words", "Two-Words", "TWO_WORDS", "tw-legacy", "TW_LEGACY"])
def test_spellings_of_a_name(site: Site, spelling: str) -> None:
    site.family("two_words", "slider-plugin", more="aliases=('tw-legacy',)")
    site.family("third")
    assert site.plugins().facts(spelling).name == "two_words"
    assert "module_third" not in sys.modules


def test_aliases_of_others_are_read_only_when_ours_have_none(site: Site) -> None:
    site.family("ours", "slider-plugin")
    site.family("bad", code="raise OSError('broken on purpose')")
    site.family("third", more="aliases=('three',)")
    plugins = site.plugins()
    assert plugins.facts("Three").name == "third"
    assert "dist-bad:bad" in error_of(lambda: plugins.facts("nothing"))


def test_an_unknown_family_names_the_nearest(site: Site) -> None:
    site.family("pocket")
    message = error_of(lambda: site.plugins().load("pocekt"))
    assert "no family 'pocekt' (did you mean 'pocket'?); there are pocket" in message


def test_without_an_installation_the_message_says_so(site: Site) -> None:
    assert site.plugins().rows() == []
    assert "pip install -e ." in error_of(lambda: site.plugins(ALLOW="slider-plugin").load("sd1"))


@pytest.mark.parametrize(
    ("code", "cause", "words"),
    [
        ("import not_installed_dependency", ModuleNotFoundError, "No module named 'not_installed_dependency'"),
        ("def broken(:", SyntaxError, "SyntaxError: invalid syntax"),
        ("raise ValueError('at import')", ValueError, "ValueError: at import"),
        ("import sys; sys.exit('no GPU')", SystemExit, "SystemExit: no GPU"),
        ("Family(new_field=1)", TypeError, "(contract 1.0 here)"),
    ],
)
def test_a_broken_import_names_everyone_and_harms_nobody(site: Site, code: str, cause: type, words: str) -> None:
    site.family("bad", code=code)
    site.family("good")
    with pytest.raises(PluginError) as caught:
        site.plugins().load("bad")
    who = f"family bad (dist-bad 1.0, module_bad, {site.folder / 'module_bad.py'})"
    for part in (who, words, "pip uninstall dist-bad", "SLIDER_PLUGIN_BLOCK=dist-bad:bad"):
        assert part in str(caught.value)
    assert isinstance(caught.value.__cause__, cause)
    assert {row.name: row.status for row in site.plugins().rows(check=True)} == {"bad": "broken", "good": "available"}
    assert site.plugins().load("good").facts.name == "good"


def test_a_broken_built_in_is_to_be_reinstalled(site: Site) -> None:
    site.family("sd1", "slider-plugin", code="import not_there")
    assert "pip install --force-reinstall" in error_of(lambda: site.plugins().load("sd1"))


def test_a_missing_attribute_is_an_import_error(site: Site) -> None:
    site.family("pocket")
    site.install("dist-pocket", {"pocket": "module_pocket:not_there"})
    assert "AttributeError" in error_of(lambda: site.plugins().load("pocket"))


def test_a_plugin_may_be_an_object(site: Site) -> None:
    code = """
        class Plugin:
            FAMILY = FAMILY

            @hookimpl
            def validation_prompt_scale(self, entry):
                return 0.25

        plugin = Plugin()
    """
    site.family("pocket", code=code)
    site.install("dist-pocket", {"pocket": "module_pocket:plugin"})
    assert site.plugins().load("pocket").validation_prompt_scale(PromptEntry(name="a", prompt="b"), 1.0) == 0.25


def test_extensions_are_linted_but_need_no_family(site: Site) -> None:
    start = "from slider_hooks import hookimpl\n\n"
    site.module("watch.py", start + "@hookimpl\ndef observe(event):\n    pass\n")
    site.module("wrong.py", start + "@hookimpl\ndef predikt():\n    pass\n")
    site.install("dist", {"watch": "watch", "wrong": "wrong"}, kind="extensions")
    rows = {row.name: row for row in site.plugins().rows(check=True)}
    assert rows["watch"].status == "available"
    assert "predikt: no hook has this name (did you mean 'predict'?)" in str(rows["wrong"].error)
    assert site.plugins().families() == []


@pytest.mark.parametrize(
    ("contract", "outcome"), [((1, 0), "same"), ((1, 7), "newer minor"), ((2, 0), "other major"), ((0, 9), "other major")]
)
def test_contract_versions(site: Site, contract: tuple[int, int], outcome: str, recwarn: pytest.WarningsRecorder) -> None:
    site.family("pocket", more=f"contract={contract}")
    wrote = ".".join(map(str, contract))
    if outcome == "other major":
        assert f"written for contract {wrote}, and this host has 1.0" in error_of(lambda: site.plugins().load("pocket"))
    else:
        assert site.plugins().load("pocket").describe()["contract"] == wrote
    warned = [f"written for contract {wrote}, and this host has 1.0" in str(warning.message) for warning in recwarn]
    assert warned == ([True] if outcome == "newer minor" else [])


# --- Lint ------------------------------------------------------------------------------------------------------------

MISTAKES = """
    @hookimpl
    def predikt(components): ...

    def encode_prompts(components, prompts): ...

    @hookspec
    def encode_images(components, images): ...

    @hookimpl
    def build_sampler(bukets, seed=0, *, weighting, **kwargs): ...

    @hookimpl(trylast=True)
    def validation_prompt_scale(*args): ...

    @hookimpl
    async def build_pipeline(components): ...

    @hookimpl
    def predict(components):
        yield 1

    @hookimpl(wrapper=True)
    def load_components(request): ...

    @hookimpl(specname="resolve_lora_targets")
    def under_another_name(denoiser, request): ...
"""
FINDINGS = """
    build_pipeline: is async
    build_sampler: argument 'bukets' is not in the hook (did you mean 'buckets'?)
    build_sampler: argument 'seed' has a default
    build_sampler: argument 'weighting' is keyword-only
    build_sampler: *kwargs is never filled
    encode_images: has the name of a hook but is marked with hookspec
    encode_prompts: has the name of a hook but has no marker
    load_components: a wrapper must yield once
    predict: yields; return the result
    predikt: no hook has this name (did you mean 'predict'?)
    validation_prompt_scale: *args is never filled
    validation_prompt_scale: trylast
"""


def test_every_mistake_is_found_at_once(site: Site) -> None:
    site.family("pocket", code=MISTAKES)
    message = error_of(lambda: site.plugins().load("pocket"))
    found = [line.strip("- ") for line in message.splitlines() if line.startswith("  - ")]
    expected = inspect.cleandoc(FINDINGS).splitlines()
    assert len(found) == len(expected), found
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True)), found


def family_of(name: str = "pocket", **facts: Any) -> ModuleType:
    """A plugin that is nothing but facts."""
    plain: dict[str, Any] = {"title": "T", "denoiser": "unet", "denoiser_class": "Net", "noise": slider_hooks.Flow()}
    module = ModuleType("facts")
    module.FAMILY = slider_hooks.Family(name=name, **plain | facts)  # type: ignore[attr-defined]
    return module


def option(**words: Any) -> slider_hooks.Option:
    plain: dict[str, Any] = {"name": "some", "type": float, "default": 1.0, "help": "some"}
    return slider_hooks.Option(**plain | words)


@pytest.mark.parametrize(
    ("facts", "finding"),
    [
        ({"name": "Po-cket"}, "FAMILY.name is 'Po-cket'; it needs lower-case letters"),
        ({"name": "socket"}, "its entry point is named 'pocket'"),
        ({"title": " "}, "FAMILY.title is empty"),
        ({"denoiser": ""}, "FAMILY.denoiser is ''"),
        ({"denoiser_class": "my.Net"}, "FAMILY.denoiser_class is 'my.Net'"),
        ({"noise": "flow"}, "FAMILY.noise is a str"),
        ({"noise": slider_hooks.Flow(sign=0)}, "FAMILY.noise.sign is 0"),  # type: ignore[arg-type]
        ({"noise": slider_hooks.Diffusion(prediction="sample")}, "'sample'; it is 'epsilon'"),  # type: ignore[arg-type]
        ({"targets": "attn"}, "FAMILY.targets is a str"),
        ({"targets": slider_hooks.Targets(io="(")}, "FAMILY.targets.io is not a regular expression"),
        ({"targets": slider_hooks.Targets(time=3)}, "FAMILY.targets.time is not"),  # type: ignore[arg-type]
        ({"targets": slider_hooks.Targets(documented="to_q")}, "documented is one string"),  # type: ignore[arg-type]
        (
            {"default_flavour": "trubo", "flavours": {"turbo": Flavour(model="a/b")}},
            "not one of flavours (did you mean 'turbo'?)",
        ),
        ({"options": (option(name="bad-name"),)}, "'bad-name' needs"),
        ({"options": (option(), option())}, "'some' is there 2 times"),
        ({"options": (option(default="1"),)}, "is '1', which is no float"),
        ({"options": (option(type=int, default=True),)}, "is True, which is no int"),
        ({"options": (option(type=str, default="c", choices=("a", "b")),)}, "is 'c', which is not one of ('a', 'b')"),
    ],
)
def test_wrong_facts(facts: dict[str, Any], finding: str) -> None:
    findings = lint(family_of(**facts), "pocket")
    assert any(finding in line for line in findings), findings


def test_right_facts_have_no_findings() -> None:
    options = (option(default=1), option(name="none", default=None, choices=(1.0,)), option(name="on", type=bool, default=True))
    assert lint(family_of(options=options, flavours={"a": Flavour(model="b/c")}, default_flavour="a"), "pocket") == []


def test_a_family_that_is_none() -> None:
    module = ModuleType("empty")
    assert "there is no FAMILY" in lint(module)[0]
    module.FAMILY = {"name": "pocket"}  # type: ignore[attr-defined]
    assert lint(module) == ["FAMILY is a builtins.dict, not a slider_hooks.Family"]


# --- Dispatch --------------------------------------------------------------------------------------------------------

ENTRY = PromptEntry(name="night", prompt="a street at night")
REQUEST = TargetRequest(slider=True)
ROW = PluginRow("pocket", "dist-pocket", "1.0", "pocket", "available", None, "architecture", "pocket")


def answering(hook: str, answer: Any, host: Any = defaults) -> LoadedFamily:
    """A family that answers one hook with a given value, or raises it."""
    module = family_of()

    def implementation() -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    setattr(module, hook, slider_hooks.hookimpl(implementation))
    return LoadedFamily(ROW, module, host)


def components(**parts: Any) -> Components:
    return Components(denoiser=None, pipeline=None, scheduler=None, prediction="flow", **parts)  # type: ignore[arg-type]


def shaped(*shape: int) -> Any:
    return SimpleNamespace(shape=shape)


CALLS: dict[str, Callable[[LoadedFamily], Any]] = {
    "resolve_lora_targets": lambda family: family.resolve_lora_targets(shaped(), None, REQUEST),
    "build_objective": lambda family: family.build_objective("bucket", {}),
    "build_sampler": lambda family: family.build_sampler([], 0, "uniform", 1.0),
    "validation_prompt_scale": lambda family: family.validation_prompt_scale(ENTRY, 1.0),
    "load_components": lambda family: family.load_components(LoadRequest(model="folder", dtype=None)),
    "encode_prompts": lambda family: family.encode_prompts(components(), ["one", "two"]),
    "encode_images": lambda family: family.encode_images(components(), shaped(2, 3, 8, 8)),
    "condition_on_images": lambda family: family.condition_on_images(components(), shaped(2, 3, 8, 8)),
    "load_controlnet": lambda family: family.load_controlnet(components(), None),
    "encode_control": lambda family: family.encode_control(components(), shaped(2, 3, 8, 8), shaped(2, 4, 4, 4)),
    "control": lambda family: family.control(components(), shaped(2, 4, 4, 4), 1.0, {}),
    "predict": lambda family: family.predict(components(), shaped(2, 4, 8, 8), shaped(2), [{}, {}]),
    "build_pipeline": lambda family: family.build_pipeline(components()),
}


def test_every_hook_has_a_method_and_a_test() -> None:
    assert tuple(CALLS) == slider_hooks.specs.HOOKS
    for hook in CALLS:
        spec = inspect.signature(getattr(slider_hooks.specs, hook))
        assert list(inspect.signature(getattr(LoadedFamily, hook)).parameters)[1:] == list(spec.parameters)[1:]


@pytest.mark.parametrize("hook", CALLS)
def test_the_family_answers_before_the_default(hook: str) -> None:
    answer = {
        "resolve_lora_targets": ResolvedTargets(expression="a", source="slider"),
        "build_objective": Bucket(),
        "build_sampler": SimpleSampler(),
        "validation_prompt_scale": 0.5,
        "load_components": components(),
        "encode_prompts": [{}, {}],
        "encode_images": shaped(2, 4, 4, 4),
        "condition_on_images": [{}, {}],
        "load_controlnet": SimpleNamespace(forward=print),
        "encode_control": shaped(2, 4, 4, 4),
        "control": {"residuals": 1},
        "predict": shaped(2, 4, 8, 8),
        "build_pipeline": print,
    }[hook]
    family = answering(hook, answer)
    assert CALLS[hook](family) is answer
    assert family.describe()["hooks"] == {name: "family" if name == hook else "default" for name in CALLS}


class SimpleSampler:
    def __iter__(self) -> SimpleSampler:
        return self

    def __next__(self) -> Any:
        raise StopIteration

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("hook", "answer", "complaint"),
    [
        ("resolve_lora_targets", ["attn"], "gave a list, not a ResolvedTargets"),
        ("resolve_lora_targets", ResolvedTargets(expression="(", source="slider"), "not a regular expression"),
        ("build_sampler", [1, 2], "gave a list, not a Sampler"),
        ("validation_prompt_scale", float("nan"), "gave nan for prompt 'night'"),
        ("validation_prompt_scale", float("inf"), "gave inf"),
        ("validation_prompt_scale", True, "gave True"),
        ("validation_prompt_scale", "1", "gave '1'"),
        ("load_components", {}, "gave a dict, not a Components"),
        ("encode_prompts", [{}], "gave 1 results for 2 prompts"),
        ("encode_prompts", "ab", "gave a str, not a Sequence"),
        ("encode_prompts", [{}, 1], "gave a int, not a Mapping"),
        ("encode_images", shaped(1, 4, 4, 4), "of shape (1, 4, 4, 4) for 2 images"),
        ("encode_images", [1], "gave a list for 2 images"),
        ("condition_on_images", [{}], "gave 1 results for 2 images"),
        ("condition_on_images", shaped(2, 4), "not a Sequence"),
        ("load_controlnet", "folder", "gave a str, which is no module"),
        ("encode_control", shaped(1, 4), "of shape (1, 4) for 2 images"),
        ("encode_control", 3, "gave a int for 2 images"),
        ("control", shaped(2, 4), "not a Mapping"),
        ("predict", shaped(2, 4, 8), "of shape (2, 4, 8) for noisy latents of shape (2, 4, 8, 8)"),
        ("predict", 3, "gave a int for noisy latents"),
        ("build_pipeline", 3, "gave a int, which cannot be called"),
    ],
)
def test_wrong_answers_are_refused_by_name(hook: str, answer: Any, complaint: str) -> None:
    message = error_of(lambda: CALLS[hook](answering(hook, answer)))
    assert f"in hook {hook} of family pocket (dist-pocket 1.0, pocket, " in message
    assert "answered by the family" in message
    assert complaint in message


@pytest.mark.parametrize("hook", [hook for hook in CALLS if hook != "build_objective"])
def test_nobody_answering_is_an_error(hook: str) -> None:
    message = error_of(lambda: CALLS[hook](answering(hook, None, ModuleType("no_defaults"))))
    assert "gave None, and nobody else answers" in message


def test_an_objective_that_nobody_knows_is_the_user_s_error() -> None:
    with pytest.raises(UserError, match="'mine' is not among bucket, pair, text, and no installed extension answers to it"):
        answering("build_objective", None).build_objective("mine", {})


def test_none_hands_on_to_the_default() -> None:
    assert answering("validation_prompt_scale", None).validation_prompt_scale(ENTRY, 0.7) == 0.7


@pytest.mark.parametrize("hook", CALLS)
def test_what_a_hook_raises_passes_with_a_note(hook: str) -> None:
    raised = ZeroDivisionError("inside")
    with pytest.raises(ZeroDivisionError) as caught:
        CALLS[hook](answering(hook, raised))
    assert caught.value is raised
    assert f"in hook {hook} of family pocket (dist-pocket 1.0" in caught.value.__notes__[0]


def test_a_users_mistake_passes_unchanged() -> None:
    with pytest.raises(UserError, match=r"^no such folder$") as caught:
        CALLS["load_components"](answering("load_components", UserError("no such folder")))
    assert not hasattr(caught.value, "__notes__")


def test_a_greedy_plugin_cannot_answer_for_another_family(site: Site) -> None:
    greedy = """
        @hookimpl(tryfirst=True)
        def validation_prompt_scale(entry):
            return -99.0
    """
    site.family("greedy", code=greedy)
    site.family("modest")
    plugins = site.plugins()
    assert plugins.load("greedy").validation_prompt_scale(ENTRY, 0.5) == -99.0
    assert plugins.load("modest").validation_prompt_scale(ENTRY, 0.5) == 0.5


def test_a_wrapper_goes_around_the_default(site: Site) -> None:
    wrapper = """
        @hookimpl(wrapper=True)
        def validation_prompt_scale(family, entry):
            scale = yield
            return 2 * scale
    """
    site.family("pocket", code=wrapper)
    family = site.plugins().load("pocket")
    assert family.validation_prompt_scale(ENTRY, 0.5) == 1.0
    assert family.describe()["hooks"]["validation_prompt_scale"] == "wrapped default"
    assert json.dumps(family.describe())


def test_what_pluggy_refuses_is_a_plugin_error(site: Site) -> None:
    site.family("pocket", code="@hookimpl(wrapper=True, hookwrapper=True)\ndef predict():\n    yield\n")
    assert "family pocket (dist-pocket 1.0" in error_of(lambda: site.plugins().load("pocket"))


# --- Without torch ---------------------------------------------------------------------------------------------------

WITHOUT = """
import sys
for name in ("torch", "diffusers", "transformers", "peft", "lycoris", "accelerate"):
    sys.modules[name] = None
import slider_hooks
from slider_plugin import plugins_cmd
from slider_plugin.registry import Plugins
from importlib.metadata import distributions
plugins = Plugins.discover([point for dist in distributions(path=[site]) for point in dist.entry_points], {})
print(plugins_cmd.as_json(plugins.rows()))
assert "slider_family_pocket" not in sys.modules
assert plugins.load("pocket").facts.options[0].default == 1000.0
assert [row.status for row in plugins.rows(check=True)] == ["available"]
"""


def test_listing_and_reading_facts_needs_no_torch(site: Site) -> None:
    install_pocket(site)
    path = [str(POCKET), str(ROOT), str(ROOT / "hooks")]
    code = f"import sys; sys.path[:0] = {path!r}; site = {str(site.folder)!r}\n{WITHOUT}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert (row["distribution"], row["status"]) == ("slider-family-pocket", "available")


# --- A third party's family, used -------------------------------------------------------------------------------------

POCKET = ROOT / "fixtures" / "third-party-family"


def install_pocket(site: Site) -> None:
    import tomllib

    project = tomllib.loads((POCKET / "pyproject.toml").read_text())["project"]
    site.install(project["name"], project["entry-points"]["slider_plugin.architectures"], version=project["version"])


def test_a_family_of_a_third_party_loads_encodes_predicts_and_draws(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    install_pocket(site)
    monkeypatch.syspath_prepend(str(POCKET))
    family = site.plugins().load("pocket")
    write = family.facts.tiny
    assert write is not None
    write(site.folder / "model")

    def load(**options: float) -> Components:
        return family.load_components(LoadRequest(model=str(site.folder / "model"), dtype=torch.float32, options=options))

    loaded, other = load(), load(pocket_time_scale=10.0)
    assert not any(p.requires_grad for p in loaded.denoiser.parameters())
    texts = family.encode_prompts(loaded, ["", "a red circle"])
    assert [tuple(text["bytes"].shape) for text in texts] == [(1, 24), (13, 24)]
    latents_BChw = family.encode_images(loaded, torch.zeros(2, 3, 32, 32))
    time_B = torch.tensor([0.2, 0.7])
    together = family.predict(loaded, latents_BChw, time_B, texts)
    alone = family.predict(loaded, latents_BChw[:1], time_B[:1], texts[:1])
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-4)  # padding is masked
    assert not torch.allclose(together, family.predict(other, latents_BChw, time_B, texts))  # the option is used
    resolved = family.resolve_lora_targets(loaded.denoiser, None, REQUEST)
    assert resolved.source == "slider"

    def draw(prompt: str) -> bytes:
        generator = [torch.Generator().manual_seed(1)]
        pipeline = family.build_pipeline(loaded)
        drawn = pipeline(
            prompt=[prompt], negative_prompt=None, height=32, width=40, num_inference_steps=2, guidance_scale=2.0,
            generator=generator,
        )  # fmt: skip
        assert drawn.images[0].size == (40, 32)
        pixels: bytes = drawn.images[0].tobytes()
        return pixels

    assert draw("a") == draw("a")


def test_the_targets_of_the_third_party_are_what_they_say(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    import re

    install_pocket(site)
    monkeypatch.syspath_prepend(str(POCKET))
    facts = site.plugins().facts("pocket")
    assert facts.tiny is not None
    facts.tiny(site.folder / "model")
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel.from_pretrained(site.folder / "model" / "transformer")
    names = [name for name, _ in model.named_modules()]
    counts = {kind: sum(bool(re.fullmatch(e, name)) for name in names) for kind, e in facts.targets.by_kind().items()}
    assert counts == {"self": 8, "io": 2, "time": 2}
    assert not [n for n in names if re.fullmatch(facts.targets.slider(), n) and re.fullmatch(facts.targets.forbidden, n)]
    assert sum(bool(re.fullmatch(facts.targets.standard, name)) for name in names) == 16
