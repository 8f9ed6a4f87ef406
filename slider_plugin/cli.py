"""The `slider` command: one function per command. Torch is imported inside the commands, never at the top."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from slider_plugin import console
from slider_plugin.errors import UserError

app = typer.Typer(
    name="slider",
    help="Train a concept slider for any diffusion model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
plugins_app = typer.Typer(help="Model families and extensions.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(plugins_app, name="plugins")

# A file, then flags of every key: `slider train config.json --learning_rate 1e-4`. All of it is read by `configfile`: to the
# command line's own parser the value of an unknown flag would look like the file.
ANY_KEY = {"allow_extra_args": True, "ignore_unknown_options": True}

PluginFiles = Annotated[list[str] | None, typer.Option("--plugin", help="File of a family that is not installed")]


def main() -> None:
    """The console script."""
    sys.exit(execute(sys.argv[1:]))


def execute(arguments: list[str]) -> int:
    """Run a command and return its exit code: 0; 2 something the user gave is wrong; 1 our own failure; 130 interrupted."""
    try:
        result = app(arguments, standalone_mode=False)
    except UserError as error:
        console.fail(str(error))
        return 2
    except (typer.Abort, KeyboardInterrupt):
        console.fail("interrupted")
        return 130
    except Exception as error:  # the last resort of the whole program: nothing is hidden, and the exit code says whose fault
        if _is_usage_error(error):
            console.fail(error.format_message() if hasattr(error, "format_message") else str(error))
            return 2
        console.err.print(traceback.format_exc(), markup=False)
        console.fail("this is a fault of slider-plugin or of a plugin, see above")
        return 1
    return result if isinstance(result, int) else 0


def _is_usage_error(error: Exception) -> bool:
    """Wrong options: click's own errors, whichever click typer brings along."""
    return any(base.__name__ == "ClickException" for base in type(error).__mro__)


@app.command(context_settings=ANY_KEY)
def train(
    context: typer.Context,
    keys: Annotated[bool, typer.Option("--keys", help="List every key with its default and stop")] = False,
    plugin: PluginFiles = None,
) -> int:
    """Train a slider: `[CONFIG] [--key value ...]`, where CONFIG is JSON or YAML and every key is also a flag."""
    _use_files(plugin)
    if keys:
        _print_keys()
        return 0
    run_config = _read(context.args)
    from slider_plugin import run

    outcome = run.train(run_config)
    if not outcome.finished:
        console.say(f"interrupted after {outcome.steps} steps; go on with --resume_from_checkpoint latest")
        return 130
    if outcome.adapter:  # of several processes one writes it
        console.out.print(str(outcome.adapter), markup=False)
    return 0


@app.command(context_settings=ANY_KEY)
def doctor(context: typer.Context, plugin: PluginFiles = None) -> None:
    """Check `[CONFIG] [--key value ...]` and print what a run would do; trains nothing, writes nothing."""
    _use_files(plugin)
    run_config = _read(context.args)
    from slider_plugin.doctor import examine

    console.out.print(examine(run_config))


@app.command(context_settings=ANY_KEY)
def validate(
    context: typer.Context,
    adapter: Annotated[Path | None, typer.Option(help="Slider file; the run's own slider.safetensors by default")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the images; `validation` in output_dir by default")] = None,
    plugin: PluginFiles = None,
) -> None:
    """Draw a finished slider, `[CONFIG] [--key value ...]`: each prompt at its own strength and at 0, and a strip."""
    _use_files(plugin)
    run_config = _read(context.args)
    from slider_plugin import run

    adapter = adapter or run_config.output_dir / "slider.safetensors"
    folder = run.validate(run_config, adapter, output or run_config.output_dir / "validation")
    console.out.print(str(folder), markup=False)


@app.command(context_settings=ANY_KEY)
def report(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="Its configuration; config.json beside the slider by default")] = None,
    strengths: Annotated[str | None, typer.Option(help="Such as -1,0,1; by default -2 to 2 in steps of 0.5")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Instead of the configuration's; may be given often")] = None,
    seeds: Annotated[int, typer.Option(help="Pictures of each prompt at each strength")] = 4,
    scorer: Annotated[str | None, typer.Option(help="Folder of a CLIP, SigLIP or DINO, or `extension`")] = None,
    positive: Annotated[str, typer.Option(help="Words for more of the concept")] = "",
    negative: Annotated[str, typer.Option(help="Words for less of it")] = "",
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Write a file whose strength 1 has a fixed meaning")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder; `report` in the slider's by default")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report's JSON")] = False,
    plugin: PluginFiles = None,
) -> None:
    """Measure sliders, `ADAPTER... [--key value ...]`: what strength does, in numbers, a plot and a sentence."""
    _use_files(plugin)
    from slider_plugin import report_cmd

    adapters, flags = report_cmd.split(context.args)
    asked = report_cmd.asked(strengths, prompt or [], seeds, scorer, positive, negative, calibrate)
    run_config = _read([str(report_cmd.config_of(config, adapters[0])), *flags])
    printed = report_cmd.run(run_config, adapters, output, asked)
    if as_json:
        sys.stdout.write(printed.json + "\n")
    else:
        for line in printed.lines:
            console.out.print(line, markup=False)


@app.command()
def targets(
    family: Annotated[str | None, typer.Argument(help="Model family, see `slider plugins list`")] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of a pipeline, instead of the published model")] = None,
    flavour: Annotated[str | None, typer.Option(help="Published version, instead of the default one")] = None,
    include_joint: Annotated[bool, typer.Option(help="Modules that see text and image tokens together, too")] = True,
    probe: Annotated[Path | None, typer.Option(help="Folder of a pipeline that no family describes: measure it")] = None,
    lycoris: Annotated[str | None, typer.Option(help="Algorithm: print a lycoris_config.json for this family")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object")] = False,
    plugin: PluginFiles = None,
) -> None:
    """Show where a slider attaches on a published model; needs no weights and no download, but with --probe it does."""
    _use_files(plugin)
    _quiet_libraries()
    if probe is not None:
        _probe(probe, [family, model, flavour], as_json)
        return
    if family is None:
        raise UserError("slider targets: give a FAMILY (`slider plugins list`), or the folder of any pipeline with --probe")
    from slider_plugin import targets_cmd
    from slider_plugin.registry import Plugins

    loaded = Plugins.discover().load(family)
    if lycoris is not None:
        sys.stdout.write(targets_cmd.lycoris_json(loaded.facts, lycoris, include_joint) + "\n")
        return
    facts = targets_cmd.target_facts(loaded, model, flavour, include_joint)
    if as_json:
        sys.stdout.write(targets_cmd.as_json(facts) + "\n")
    else:
        console.out.print(targets_cmd.render(facts, loaded.facts.limits))


def _probe(folder: Path, others: list[object], as_json: bool) -> None:
    if any(value is not None for value in others):
        raise UserError("--probe measures a folder without any family: leave FAMILY, --model and --flavour out")
    from slider_plugin import probe_cmd
    from slider_plugin.probing import probe_folder

    found = probe_folder(folder)
    if as_json:
        sys.stdout.write(probe_cmd.as_json(found) + "\n")
    else:
        console.out.print(probe_cmd.render(found))


@app.command()
def demo(
    family: Annotated[str, typer.Option(help="sd1 or z_image")] = "sd1",
    concept: Annotated[str, typer.Option(help="size, brightness, hue, position or elevation")] = "size",
    adapter: Annotated[str, typer.Option(help="lora, lokr or full")] = "lora",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps", min=1)] = None,
    output: Annotated[Path, typer.Option(help="Folder for strip, slider and report")] = Path("slider-demo"),
) -> None:
    """Train a slider on the bundled tiny model, draw it and measure it: a few minutes on a processor."""
    _quiet_libraries()
    from slider_plugin.demo.run import demonstrate

    demonstrate(family, concept, adapter, steps, output)


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="A slider's file: slider.safetensors of a run")],
    to: Annotated[str, typer.Option(help="diffusers, kohya, comfyui or lycoris")],
    output: Annotated[Path | None, typer.Option(help="The new file; beside ADAPTER by default")] = None,
    family: Annotated[str | None, typer.Option(help="Model family, of a file that does not tell")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; that of the file by default")] = None,
    flip: Annotated[bool, typer.Option("--flip", help="Swap the two sides, for programs without negative strengths")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Say what was compared")] = False,
    model: Annotated[str | None, typer.Option(help="Pipeline to load the new file into, as a check")] = None,
    plugin: PluginFiles = None,
) -> None:
    """Write a slider's file in the key names of another program, and compare what is read back."""
    _use_files(plugin)
    _quiet_libraries()
    from slider_plugin.export.command import export_file

    exported = export_file(adapter, to, output=output, family=family, dtype=dtype, flip=flip, verify=verify, model=model)
    for line in exported.notes:
        console.say(line)
    report = exported.report
    console.say(f"{to}: {report.modules} modules, {report.dtype}, {report.size / 1e6:.1f} MB")
    console.out.print(str(report.path), markup=False)


@app.command()
def ui(
    workspace: Annotated[Path, typer.Option(help="Folder that the page may read and write")] = Path(),
    port: Annotated[int, typer.Option(help="Port; 0 takes any that is free", min=0, max=65535)] = 7860,
    host: Annotated[str, typer.Option(help="Address; one that others can reach needs the token that is printed")] = "127.0.0.1",
    read: Annotated[list[Path] | None, typer.Option(help="Folder elsewhere that may be read, for models")] = None,
    browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser")] = False,
) -> None:
    """Set up, watch and try sliders in the browser."""
    from slider_plugin.ui.serve import serve

    serve(workspace, host, port, tuple(read or ()), browser)


@plugins_app.command("list")
def plugins_list(
    as_json: Annotated[bool, typer.Option("--json", help="An array of objects")] = False,
    check: Annotated[bool, typer.Option("--check", help="Import and lint each plugin")] = False,
) -> None:
    """List families and extensions, without importing them."""
    from slider_plugin import plugins_cmd
    from slider_plugin.registry import Plugins

    rows = Plugins.discover().rows(check=check)
    if as_json:
        sys.stdout.write(plugins_cmd.as_json(rows) + "\n")
    else:
        console.out.print(plugins_cmd.render_table(rows))


@plugins_app.command("check")
def plugins_check(
    what: Annotated[str, typer.Argument(help="A family's name, `module:attribute`, or the path of a .py file")],
    as_json: Annotated[bool, typer.Option("--json", help="An array of objects, one for each rule")] = False,
) -> int:
    """Import and lint a plugin and run the conformance rules on its tiny pipeline; exit code 2 if one fails."""
    _quiet_libraries()
    from slider_plugin import check_cmd

    results = check_cmd.results_of(what)
    if as_json:
        found = list(results)
        sys.stdout.write(check_cmd.as_json(found) + "\n")
    else:
        found = check_cmd.printing(results)
    return 0 if all(result.passed for result in found) else 2


def _use_files(plugin: list[str] | None) -> None:
    """Let the families of these files take part, here and in the processes that this one starts."""
    if plugin:
        from slider_plugin import loose

        loose.add(plugin)


@plugins_app.command("new")
def plugins_new(
    name: Annotated[str, typer.Argument(help="The family's name: lower case, digits and underscores")],
    source: Annotated[
        Path | None, typer.Option("--from", help="Pipeline folder: measure its denoiser and targets, and start from these")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the package; slider-family-NAME by default")] = None,
) -> None:
    """Write an installable package for a new family, which trains as it stands; nothing is overwritten."""
    if source is not None:
        _quiet_libraries()
    from slider_plugin import plugins_new

    folder = plugins_new.create(name, output, source)
    for command in plugins_new.next_steps(name, folder, probed=source is not None):
        console.say(f"next: {command}")
    console.out.print(str(folder), markup=False)


def _read(arguments: list[str]) -> Any:
    """The configuration of `[CONFIG] [--key value ...]`, with its notes said."""
    from slider_plugin.configfile import read_config
    from slider_plugin.registry import Plugins

    plugins = Plugins.discover()
    has_file = bool(arguments) and not arguments[0].startswith("--")
    path = Path(arguments[0]) if has_file else None
    config, notes = read_config(path, arguments[1:] if has_file else arguments, plugins.facts)
    for line in notes:
        console.say(line)
    _quiet_libraries()
    return config


def _print_keys() -> None:
    from slider_plugin.wording import key_help

    section = ""
    for where, name, kind, default, text in key_help():
        if where != section:
            console.out.print(f"\n{where}", style="bold")
            section = where
        console.out.print(f"  --{name}  {kind}" + (f", default {default}" if default else ""), markup=False)
        console.out.print(f"      {text}", markup=False)


def _quiet_libraries() -> None:
    """Loading bars and notices of the libraries are no news to the user; their errors still are."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
