"""Reading configurations: real files, real flags, and every problem told at once in plain words."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slider_hooks import Family, Flow, Option
from slider_plugin.config import BucketConfig, RunConfig
from slider_plugin.configfile import read_config, to_json
from slider_plugin.errors import ConfigError, UserError
from slider_plugin.known_keys import CONFIG_KEYS, ENTRY_KEYS, PROMPT_KEYS, VALUES
from slider_plugin.wording import NOT_FLAGS, key_help

FACTS = Family(
    name="z_image",
    title="Z-Image",
    denoiser="transformer",
    denoiser_class="ZImageTransformer2DModel",
    noise=Flow(),
    aliases=("zimage",),
    options=(
        Option(name="text_length", type=int, default=512, help="tokens"),
        Option(name="guidance_embedding", type=float, default=None, help="guidance"),
        Option(name="fast", type=bool, default=False, help="speed"),
        Option(name="layout", type=str, default="a", help="layout", choices=("a", "b")),
    ),
)


def families(name: str) -> Family:
    """What the registry does."""
    if name.replace("-", "_") not in (FACTS.name, *FACTS.aliases):
        raise UserError(f"there is no family {name!r}; there is z_image")
    return FACTS


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a sound configuration with changed keys (None takes one out), and answers its path."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("more", "less"):
        (tmp_path / name).mkdir()
    write(tmp_path / "buckets.json", [entry("more", 0.5), entry("less", -0.5)])

    def make(**changes: Any) -> Path:
        config = {"model_family": "z_image", "data_backend_config": "buckets.json", "max_train_steps": 100} | changes
        return write(tmp_path / "config.json", {key: value for key, value in config.items() if value is not ...})

    return make


def write(path: Path, value: object) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def entry(name: str, strength: Any = None, **keys: Any) -> dict[str, Any]:
    return {"id": name, "instance_data_dir": name, "slider_strength": strength} | keys


def problems(path: Path | None, *flags: str, family: Any = None) -> str:
    """The message of the refusal; each of its problems is one line."""
    with pytest.raises(ConfigError) as caught:
        read_config(path, flags, family)
    text = str(caught.value)
    assert not re.search(r"pydantic|Traceback|<class|https://", text)
    assert len(set(caught.value.problems)) == len(caught.value.problems)
    return text


def buckets(path: Path, *entries: object) -> Path:
    """The configuration, with these entries in its dataloader file."""
    write(path.parent / "buckets.json", list(entries))
    return path


# --- What is read -----------------------------------------------------------------------------------------------------


def test_a_file_as_the_users_have_it(project: Callable[..., Path]) -> None:
    path = project(**{
        "--lora_rank": "8", "learning-rate": "1e-4", "slider_lora_target": "true", "push_to_hub": False, "num_train_epochs": 0,
        "validation_steps": 50, "checkpointing_steps": 10, "cache_dir_vae": "cache/vae", "seed": None,
        "optimizer": "adamw_bf16",
        "minimum_image_size": 0, "use_ema": "false", "validation_resolution": 1024, "noise_offset": 0, "loss_type": "l2",
        "resolution": "512", "user_prompt_library": "",
    })  # fmt: skip
    config, notes = read_config(path)
    assert (config.lora_rank, config.learning_rate, config.slider_lora_target) == (8, 1e-4, True)
    assert (config.validation_step_interval, config.checkpoint_step_interval) == (50, 10)
    assert (config.optimizer, config.validation_resolution, config.seed) == ("adamw", "1024", 42)
    assert [(b.id, b.slider_strength, b.resolution) for b in config.buckets] == [("more", 0.5, 512), ("less", -0.5, 512)]
    assert all(b.minimum_image_size == 0 for b in config.buckets)
    text = "\n".join(notes)
    assert "cache_dir_vae" in text and "optimizer" in text
    assert not any(key in text for key in ("loss_type", "noise_offset", "use_ema", "push_to_hub", "num_train_epochs"))


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"flow_schedule_shift": 3}, {"timestep_shift": 3.0}),
        ({"flow_schedule_auto_shift": "true"}, {"timestep_shift": "auto"}),
        ({"flow_schedule_auto_shift": False, "flow_schedule_shift": 3}, {"timestep_shift": 3.0}),
        ({"flow_sigmoid_scale": 1.0}, {"timestep_logit_scale": 1.0, "timestep_sampling": "uniform"}),
        ({"flow_sigmoid_scale": 0.5, "timestep_sampling": "logit_normal"}, {"timestep_logit_scale": 0.5}),
        ({"flow_use_uniform_schedule": True}, {"timestep_sampling": "uniform"}),
        ({"optimizer_beta1": 0.8, "optimizer_beta2": 0.95}, {"adam_beta1": 0.8, "adam_beta2": 0.95}),
        ({"optimizer": "prodigy"}, {"learning_rate": 1.0}),
        ({"optimizer": "prodigy", "learning_rate": 0.5}, {"learning_rate": 0.5}),
        ({"optimizer": "bnb-adamw8bit"}, {"optimizer": "adamw8bit"}),
        ({"optimizer": "optimi-adamw"}, {"optimizer": "adamw"}),
        ({"optimizer": "adamw_schedulefree+no_kahan"}, {"optimizer": "adamw_schedulefree"}),
        ({"optimizer_config": "d_coef=2, decouple=false"}, {"optimizer_config": {"d_coef": "2", "decouple": "false"}}),
        ({"optimizer_config": None}, {"optimizer_config": {}}),
        ({"snr_gamma": 0}, {"snr_gamma": 0.0}),
    ],
)
def test_times_and_optimizers_in_other_spellings(
    project: Callable[..., Path], written: dict[str, Any], meant: dict[str, Any]
) -> None:
    config, _ = read_config(project(**written))
    assert {key: getattr(config, key) for key in meant} == meant


def test_one_thing_under_two_spellings(project: Callable[..., Path]) -> None:
    assert "timestep_shift is given twice" in problems(project(flow_schedule_shift=3, flow_schedule_auto_shift=True))
    polynomial = project(lr_scheduler="polynomial", learning_rate=1e-5, lr_end=1e-4)
    assert "lr_end: 0.0001 is no less than learning_rate" in problems(polynomial)


def test_the_snippets_of_the_specification(project: Callable[..., Path], tmp_path: Path) -> None:
    flags = ["--model_family", "sdxl", "--data_backend_config", str(tmp_path / "buckets.json")]
    quick = {"model_type": "lora", "lora_type": "standard", "slider_lora_target": True, "lora_rank": 16, "learning_rate": 5e-5}
    library = {
        "plain": "regular prompt",
        "slider_plus": {"prompt": "same prompt", "adapter_strength": 1.2},
        "slider_minus": {"prompt": "same prompt", "adapter_strength": 0.5},
    }
    project()
    config, notes = read_config(write(tmp_path / "quick.json", quick), flags)
    assert config.slider_lora_target and config.learning_rate == 5e-5 and config.lora_rank == 16 and notes == ()
    write(tmp_path / "library.json", library)
    found = read_config(tmp_path / "quick.json", [*flags, "--user_prompt_library", str(tmp_path / "library.json")])[0].prompts
    assert [(p.name, p.prompt, p.adapter_strength) for p in found] == [
        ("plain", "regular prompt", None), ("slider_plus", "same prompt", 1.2), ("slider_minus", "same prompt", 0.5),
    ]  # fmt: skip


def test_yaml_with_the_same_keys(project: Callable[..., Path], tmp_path: Path) -> None:
    project()
    text = "model_family: z-image\ndata_backend_config: buckets.json\nlearning_rate: 1e-4\nmixed_precision: no\n# comment\n"
    config, _ = read_config(write(tmp_path / "config.yaml", text))
    assert (config.model_family, config.learning_rate, config.mixed_precision) == ("z_image", 1e-4, "no")
    assert "line 2" in problems(write(tmp_path / "bad.yaml", "lora_rank: 4\n  seed: [1\n"))
    assert "seed" in problems(write(tmp_path / "twice.yaml", "seed: 1\nseed: 2\n"))


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, slider_plugin.configfile; assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_paths_beside_the_file_first(project: Callable[..., Path], tmp_path: Path) -> None:
    nested = tmp_path / "configs"
    nested.mkdir()
    (nested / "more").mkdir()
    (tmp_path / "elsewhere" / "less").mkdir()
    write(nested / "buckets.json", [entry("more", 1), entry("less", -1)])
    config = write(nested / "config.json", {"model_family": "sdxl", "data_backend_config": "buckets.json", "output_dir": "out"})
    found, _ = read_config(config)
    assert [b.instance_data_dir for b in found.buckets] == [nested / "more", tmp_path / "elsewhere" / "less"]
    assert found.output_dir == Path("out")  # in the current directory, wherever the file lies
    write(tmp_path / "elsewhere" / "flags.json", [entry("less", 2)])
    assert read_config(config, ["--data_backend_config", "flags.json"])[0].buckets[0].slider_strength == 2


# --- Flags ------------------------------------------------------------------------------------------------------------


def test_flags_win_over_the_file(project: Callable[..., Path]) -> None:
    flags = ["--learning-rate", "2e-5", "--slider_lora_target", "--lora_rank=4", "--strict=false"]
    flags += ["--validation_strengths", "-1,0,1", "--validation_guidance", "None"]
    config, _ = read_config(project(learning_rate=1.0, lora_rank=8, strict=True, validation_guidance=3), flags)
    assert (config.learning_rate, config.slider_lora_target, config.lora_rank, config.strict) == (2e-5, True, 4, False)
    assert config.validation_strengths == (-1.0, 0.0, 1.0) and config.validation_guidance is None
    assert read_config(project(slider_lora_target=True), ["--slider_lora_target", "false"])[0].slider_lora_target is False


def test_flags_alone(tmp_path: Path, project: Callable[..., Path]) -> None:
    project()
    flags = ["--model_family", "z-image", "--data_backend_config", str(tmp_path / "buckets.json")]
    assert read_config(None, flags)[0].model_family == "z_image"


def test_lists_of_targets(project: Callable[..., Path]) -> None:
    for written, meant in (
        ('["to_q", "to_k"]', ("to_q", "to_k")),
        (r"layers\..*\.to_q", r"layers\..*\.to_q"),
        ("[a-z]+", "[a-z]+"),
    ):
        config, _ = read_config(project(), ["--peft_lora_target_modules", written])
        assert config.peft_lora_target_modules == meant


def test_what_is_wrong_with_flags(project: Callable[..., Path]) -> None:
    text = problems(project(), "--slider_lora_targets", "true", "--lora_rank", "--seed=abc", "--buckets", "[]")
    assert "slider_lora_targets: no such key; did you mean slider_lora_target?" in text
    assert "--lora_rank" in text and "'abc' is not a whole number" in text and "--buckets" in text
    assert "config.json" in problems(project(), "--strict", "true", "config.json").split("- ")[1]


def test_a_flag_for_data_wins_over_buckets_in_the_file(project: Callable[..., Path], tmp_path: Path) -> None:
    path = project(data_backend_config=..., buckets=[entry("more", 3)])
    assert read_config(path)[0].buckets[0].slider_strength == 3
    found, _ = read_config(path, ["--data_backend_config", str(tmp_path / "buckets.json")])
    assert [b.slider_strength for b in found.buckets] == [0.5, -0.5]


def test_a_flag_for_the_prompt_wins_over_the_file(project: Callable[..., Path]) -> None:
    path = project(prompts=[{"name": "validation", "prompt": "old"}, {"name": "other", "prompt": "kept"}])
    found, _ = read_config(path, ["--validation_prompt", "new"])
    assert {p.name: p.prompt for p in found.prompts} == {"validation": "new", "other": "kept"}


# --- Problems ---------------------------------------------------------------------------------------------------------


def test_every_problem_at_once(project: Callable[..., Path], tmp_path: Path) -> None:
    library = {"a": {"prompt": "x", "adapter_strenght": 1}, "b": {"prompt": "x", "adapter_strength": "much"}}
    write(tmp_path / "prompts.json", library)
    path = project(
        slider_lora_targets=True, lora_rank="many", use_dora=True, noise_offset=0.1, user_prompt_library="prompts.json"
    )
    buckets(path, entry("more", "strong"), entry("less", -1, slider_strenght=2), {"instance_data_dir": "more"})
    text = problems(path, "--model_family", "sdl", "--sede", "1", family=families)
    for expected in (
        "config.json: slider_lora_targets: no such key; did you mean slider_lora_target?",
        "config.json: lora_rank: 'many' is not a whole number",
        "use_dora",
        "must mirror",
        "noise_offset: 0.1",
        "there is no family 'sdl'",
        "sede: no such key; did you mean seed?",
        "buckets.json: bucket 'more': slider_strength: 'strong' is not a number; use e.g. 0.5 or -0.5",
        "buckets.json: bucket 'less': slider_strenght: no such key; did you mean slider_strength?",
        "buckets.json: entry 3: id: it is missing",
        "prompts.json: prompt 'a': adapter_strenght: no such key; did you mean adapter_strength?",
        "prompts.json: prompt 'b': adapter_strength: 'much' is not a number; use e.g. 0.5 or -0.5",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("lora_rank", 0, "at least 1"),
        ("lora_rank", True, "not a number"),
        ("lora_rank", 1.5, "whole number"),
        ("lora_dropout", 1, "below 1"),
        ("learning_rate", "fast", "'fast' is not a number"),
        ("learning_rate", -1, "above 0"),
        ("learning_rate", "nan", "finite"),
        ("learning_rate", [1], "not a number"),
        ("slider_lora_target", "maybe", "neither true nor false"),
        ("validation_resolution", "1024x", "1024x768"),
        ("validation_resolution", "1024x1024,512x512", "1024x768"),
        ("validation_strengths", "-1,up", "'up' is not a number"),
        ("validation_negative_prompt", 5, "not text"),
        ("peft_lora_target_modules", 5, "not a list"),
        ("lr_scheduler", "sine", "cosine"),
        ("mixed_precision", "fp16", "bf16"),
        ("report_to", "wandb", "tensorboard"),
        ("data_backend_sampling", {"a": 1}, "uniform"),
        ("model_type", "full", "adapter"),
        ("optimizer", "optimi-lion", "prodigy"),
        ("optimizer_config", "d_coef", "d_coef=2"),
        ("optimizer_config", "d_coef=1,d_coef=2", "twice"),
        ("timestep_sampling", "sigmoid", "logit_normal"),
        ("timestep_logit_mean", 1.0, "logit_normal"),
        ("timestep_shift", 0, "above 0 nor auto"),
        ("timestep_shift", "big", "above 0 nor auto"),
        ("timestep_range", "0.8,0.2", "two rising numbers"),
        ("timestep_range", [0.0, 1.5], "two rising numbers"),
        ("timestep_range", 0.5, "two rising numbers"),
        ("flow_custom_timesteps", "1000,500", "timestep_range"),
        ("flow_use_beta_schedule", True, "timestep_sampling"),
        ("timestep_bias_strategy", "later", "timestep_range"),
        ("snr_gamma", -1, "at least 0"),
        ("ema_decay", 1, "below 1"),
        ("ema_update_interval", 10, "every step"),
        ("ema_validation", "comparison_only", "ema_only"),
        ("lr_scale", True, "learning_rate"),
        ("resume_from_checkpoint", "nowhere", "latest"),
        ("output_dir", "", "output_dir"),
        ("lr_warmup_steps", 101, "max_train_steps"),
        ("family_options", {"a": 1}, "family_options"),
        ("output_dir", "~nobody-of-this-name/out", "cannot be a path"),
        ("pretrained_model_name_or_path", "x" * 5000, "cannot be a path"),
        ("data_backend_config", 5, "no file 5"),
        ("prompts", "x", "prompts"),
        ("data_backend_config", "none.json", "none.json"),
        ("user_prompt_library", "none.json", "none.json"),
        ("buckets", [{"id": "x"}], "buckets"),
    ],
)
def test_wrong_values(project: Callable[..., Path], key: str, value: Any, said: str) -> None:
    text = problems(project(**{key: value}))
    assert key in text and said in text
    assert len(text.splitlines()) == 2, text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"lora_rank": 4,}', "comma"),
        ("{'lora_rank': 4}", "double quotes"),
        ('{\n// rank\n"lora_rank": 4}', "comments"),
        ('{"lora_rank": 4} x', "line 1, column 18"),
        ('{"lora_rank": 4, "lora_rank": 8}', "'lora_rank'"),
        ('{"learning_rate": NaN}', "NaN"),
        ('{"learning_rate": -Infinity}', "Infinity"),
        ("[1, 2]", "object"),
        ('"text"', "object"),
        ("", "line 1"),
        ("[" * 200_000, "nested"),
        ('{"seed": ' + "9" * 5000 + "}", "config.json"),
        ('{"a": "' + "x" * 5_000_000 + '"}', "bytes"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, said: str) -> None:
    message = problems(write(tmp_path / "config.json", text))
    assert said in message and "config.json" in message


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "does not exist" in problems(tmp_path / "config.json")
    assert "folder" in problems(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe{\x00}\x00")
    assert "UTF-8" in problems(tmp_path / "binary.json")
    nested = write(tmp_path / "deep.yaml", "[" * 20_000)
    assert "deep.yaml" in problems(nested)


def test_two_spellings_of_one_key(project: Callable[..., Path]) -> None:
    assert "twice" in problems(project(**{"--seed": 1, "seed": 2}))
    assert "twice" in problems(project(validation_steps=1, validation_step_interval=2))


def test_nothing_to_train_on(project: Callable[..., Path]) -> None:
    text = problems(project(data_backend_config=...))
    assert "data_backend_config" in text and "slider_strength" in text
    assert "model_family" in problems(project(model_family=...))


# --- Keys of SimpleTuner ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", sorted(CONFIG_KEYS))
def test_known_keys_at_their_default(project: Callable[..., Path], key: str) -> None:
    known = CONFIG_KEYS[key]
    path = project(**{key: known.default})
    if known.strict:
        assert key in problems(path)
    else:
        notes = read_config(path)[1]
        assert sum(key in note for note in notes) == (known.verdict(known.default) == "ignored")
    for same in known.same:
        read_config(project(**{key: same}))


@pytest.mark.parametrize("key", sorted(CONFIG_KEYS))
def test_known_keys_that_would_change_the_result(project: Callable[..., Path], key: str) -> None:
    path = project(**{key: "something-else"})
    if CONFIG_KEYS[key].matters:
        text = problems(path)
        assert key in text and "'something-else'" in text and CONFIG_KEYS[key].why in text
    else:
        assert any(key in note for note in read_config(path)[1])


def test_no_key_is_both_ours_and_foreign() -> None:
    assert not set(CONFIG_KEYS) & set(RunConfig.model_fields)
    assert not set(ENTRY_KEYS) & set(BucketConfig.model_fields)
    assert set(VALUES) <= set(RunConfig.model_fields) | set(BucketConfig.model_fields)
    for table in (CONFIG_KEYS, ENTRY_KEYS, PROMPT_KEYS):
        assert all(known.why for known in table.values())


def test_methods_without_a_mirror(project: Callable[..., Path], tmp_path: Path) -> None:
    write(tmp_path / "lycoris_config.json", {"algo": "boft", "linear_dim": 4})
    text = problems(project(lora_type="lycoris", lycoris_config="lycoris_config.json"))
    assert "lycoris_config.json: algo: 'boft' cannot be used" in text and "not linear" in text
    write(tmp_path / "lycoris_config.json", {"algo": "lokr", "weight_decompose": True})
    assert "mirror" in problems(project(lora_type="lycoris", lycoris_config="lycoris_config.json"))


# --- Families ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["z_image", "z-image", "zimage"])
def test_spellings_of_a_family(project: Callable[..., Path], name: str) -> None:
    assert read_config(project(model_family=name), (), families)[0].model_family == "z_image"


def test_options_of_the_family(project: Callable[..., Path]) -> None:
    path = project(text_length="256", fast="true")
    config, _ = read_config(path, ["--layout", "b"], families)
    assert config.family_options == {"text_length": 256, "guidance_embedding": None, "fast": True, "layout": "b"}
    text = problems(project(text_length=1.5, layout="c", guidance_embedding="x"), family=families)
    for said in ("text_length: 1.5 is not a whole number", "layout: 'c' is not one of a, b", "'x' is not a number"):
        assert said in text
    assert "text_lenght: no such key; did you mean text_length?" in problems(project(text_lenght=1), family=families)
    assert read_config(project(), ["--fast"], families)[0].family_options["fast"] is True
    assert read_config(project(text_length=None), (), families)[0].family_options["text_length"] == 512
    assert "text_length: no such key" in problems(project(text_length=1))


# --- Buckets ----------------------------------------------------------------------------------------------------------


def test_what_buckets_inherit(project: Callable[..., Path]) -> None:
    path = project(resolution=512, caption_strategy="filename", minimum_image_size=100, instance_prompt="all")
    buckets(path, entry("more", "0.5", resolution=64, instance_prompt=None), entry("less", None, minimum_image_size=None))
    more, less = read_config(path)[0].buckets
    assert (more.resolution, more.caption_strategy, more.minimum_image_size, more.slider_strength) == (64, "filename", 100, 0.5)
    assert (less.resolution, less.minimum_image_size, less.slider_strength, less.instance_prompt) == (512, None, None, "all")
    assert more.instance_prompt is None


def test_entries_that_are_no_buckets(project: Callable[..., Path]) -> None:
    caches = {"id": "text", "type": "aws", "dataset_type": "text_embeds", "default": True, "cache_dir": "x"}
    video = {"id": "film", "dataset_type": "eval", "disabled": True}
    path = buckets(project(), entry("more", 1), entry("less", -1, disable="true"), caches, video)
    config, notes = read_config(path)
    assert [(b.id, b.disabled) for b in config.buckets] == [("more", False), ("less", True)]
    assert sum("text" in note for note in notes) == 1 and sum("film" in note for note in notes) == 1


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"type": "aws"}, "local"),
        ({"audio": {"max_duration_seconds": 3}}, "seconds"),
        ({"video": {"bucket_strategy": "x"}}, "num_frames"),
        ({"dataset_type": "eval"}, "image"),
        ({"metadata_backend": "parquet"}, "discovery"),
        ({"caption_strategy": "parquet"}, "textfile"),
        ({"caption_strategy": "instanceprompt"}, "instance_prompt"),
        ({"crop_aspect": "closest"}, "square"),
        ({"crop_style": "face"}, "center"),
        ({"slider_strength": "nan"}, "finite"),
        ({"slider_strength": True}, "not a number"),
        ({"slider_strength": [1]}, "not a number"),
        ({"probability": -1}, "at least 0"),
        ({"repeats": 0.5}, "whole number"),
        ({"instance_data_dir": ""}, "instance_data_dir"),
        ({"id": ""}, "id"),
        ({"id": 5}, "not text"),
        ({"is_regularisation_data": True}, "neutral"),
        ({"conditioning_data": "depth"}, "no entry of dataset_type conditioning"),
        ({"start_step": 100}, "beginning"),
        ({"caption_shuffle": {"enable": True}}, "captions"),
    ],
)
def test_wrong_entries(project: Callable[..., Path], keys: dict[str, Any], said: str) -> None:
    text = problems(buckets(project(), entry("more", 1) | keys, entry("less", -1)))
    assert "buckets.json" in text and said in text and next(iter(keys)) in text
    assert len(text.splitlines()) == 2, text


def test_entries_of_the_quickstart(project: Callable[..., Path]) -> None:
    """Keys that every SimpleTuner user has; `is_regularisation_data` is a neutral bucket."""
    keys = {
        "type": "local", "crop": True, "crop_aspect": "square", "crop_style": "center", "resolution": 512,
        "minimum_image_size": 512, "maximum_image_size": 512, "target_downsample_size": 512, "resolution_type": "pixel_area",
        "cache_dir_vae": "cache/vae", "disabled": False, "skip_file_discovery": "", "caption_strategy": "filename",
        "metadata_backend": "discovery", "repeats": 0, "caption_shuffle": {"enable": False}, "start_epoch": 1, "start_step": 0,
    }  # fmt: skip
    config, _ = read_config(buckets(project(), entry("more", 1, **keys), entry("less", is_regularisation_data=True)))
    assert config.buckets[0].target_downsample_size == 512 and config.buckets[1].slider_strength is None


def test_shapes_of_the_dataloader_file(project: Callable[..., Path], tmp_path: Path) -> None:
    path = project()
    write(tmp_path / "buckets.json", {"id": "more"})
    assert "buckets.json" in problems(path) and "list" in problems(path)
    assert "entry 1" in problems(buckets(path, "more"))
    assert "'more'" in problems(buckets(path, entry("more", 1), entry("more", -1)))
    assert "no images" in problems(buckets(path))


# --- Prompts ----------------------------------------------------------------------------------------------------------


def test_prompt_library(project: Callable[..., Path], tmp_path: Path) -> None:
    write(tmp_path / "p.json", {" plain ": "a face", "tags": {"tags": "b", "adapter_strength": "-1.5"}, "c": {"caption": "c"}})
    config, _ = read_config(project(user_prompt_library="p.json", validation_prompt="d"))
    assert [(p.name, p.prompt, p.adapter_strength) for p in config.prompts] == [
        ("plain", "a face", None), ("tags", "b", -1.5), ("c", "c", None), ("validation", "d", None),
    ]  # fmt: skip
    write(tmp_path / "p.json", {"validation": "x"})
    assert "'validation'" in problems(project(user_prompt_library="p.json", validation_prompt="d"))


@pytest.mark.parametrize(
    ("library", "said"),
    [
        ({}, "no prompt"),
        ([], "object"),
        ({"": "x"}, "empty name"),
        ({"a": 5}, "prompt 'a'"),
        ({"a": {}}, "prompt"),
        ({"a": {"prompt": 5}}, "not text"),
        ({"a": {"prompt": "x", "caption": "y"}}, "twice"),
        ({"a": {"prompt": "x", "adapter_strength": True}}, "not a number"),
        ({"a": {"prompt": "x", "adapter_strength": "inf"}}, "finite"),
        ({"a": {"prompt": "x", "bbox_entities": [1]}}, "boxes"),
        ({"a": {"prompt": "x", "name": "b"}}, "name"),
        ({"a": "x", " a ": "y"}, "'a'"),
        ('{"a": "x",}', "comma"),
    ],
)
def test_broken_prompt_libraries(tmp_path: Path, library: object, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_config(None, ["--model_family", "z_image", "--user_prompt_library", str(write(tmp_path / "p.json", library))])


# --- Writing and help -------------------------------------------------------------------------------------------------

CHANGED: dict[str, Any] = {
    "model_family": "z_image", "model_flavour": "turbo", "pretrained_model_name_or_path": "org/name", "revision": "r",
    "variant": "fp16", "lora_rank": 4, "lora_alpha": 2, "lora_dropout": 0.1, "lora_use_rslora": True,
    "lora_init_type": "gaussian", "slider_lora_target": True, "include_joint": False,
    "init_lora": "first.safetensors", "base_loras": [{"path": "style.safetensors", "weight": -0.5}],
    "assistant_lora_path": "adapters", "assistant_lora_weight_name": "a.safetensors", "assistant_lora_strength": 0.5,
    "assistant_lora_inference_strength": 0.25, "disable_assistant_lora": True,
    "controlnet": True, "controlnet_model_name_or_path": "org/control", "controlnet_conditioning_scale": 0.5,
    "slider_objective": "an_extension_s", "objective_config": {"rows": 3}, "pair_target": "addift", "pair_mask": 0.1,
    "slider_text": {"target": "", "positive": "old", "negative": "young", "attributes": ["male"], "anchors": ["a dog"]},
    "text_guidance": 2, "text_rollout_steps": 5, "text_rollout_guidance": 3, "random_strength": "0.5,2",
    "controlnet_zero_layers": "refuse", "validation_control_image": "outline.png",
    "peft_lora_target_modules": ["to_q"], "data_backend_sampling": "auto-weighting", "resolution": 64,
    "resolution_type": "pixel", "caption_strategy": "filename", "instance_prompt": "all", "minimum_image_size": 8,
    "maximum_image_size": 99.5, "target_downsample_size": 70, "aspect_bucket_alignment": 8, "skip_unreadable_images": True,
    "max_image_pixels": 1000, "neutral_strength": 0.25, "caption_dropout_probability": 0.1, "max_train_steps": 7,
    "train_batch_size": 2, "gradient_accumulation_steps": 3, "gradient_checkpointing": True, "enable_group_offload": True,
    "torch_compile": "eager",
    "base_model_precision": "int8-torchao", "learning_rate": 3e-7,
    "signs_in_one_forward": "yes",
    "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_weight_decay": 0, "adam_epsilon": 1e-6, "lr_scheduler": "cosine",
    "optimizer": "adamw8bit", "optimizer_config": "min_8bit_size=16", "lr_num_cycles": 3, "lr_power": 2, "lr_end": 0,
    "timestep_sampling": "logit_normal", "timestep_logit_mean": 0.5, "timestep_logit_scale": 2, "timestep_shift": "auto",
    "timestep_range": "0.1,0.9", "snr_gamma": 5, "use_ema": True, "ema_decay": 0.9,
    "lr_warmup_steps": 2, "max_grad_norm": 0, "mixed_precision": "no", "seed": 2**62, "output_dir": "out", "cache_dir": "kept",
    "checkpoint_step_interval": 5, "checkpoints_total_limit": 9, "resume_from_checkpoint": "latest", "report_to": "tensorboard",
    "slider_positive": "old", "slider_negative": "young",
    "tracker_project_name": "p", "validation_negative_prompt": None, "validation_adapter_strength": -1,
    "validation_strengths": [], "validation_step_interval": 4, "validation_num_inference_steps": 2, "validation_guidance": 0,
    "validation_resolution": "64x32", "validation_num_video_frames": 9, "validation_image": "first.png",
    "validation_seed": 3,
    "num_validation_images": 2, "validation_disable": True, "validation_report": True, "validation_report_interval": 7,
    "validation_report_stop": True,
    "strict": True, "text_length": 99, "guidance_embedding": 1.5, "fast": True, "layout": "b",
}  # fmt: skip
BUCKET: dict[str, Any] = {
    "slider_strength": -0.75, "probability": 0.5, "repeats": 2, "caption_strategy": "instanceprompt", "instance_prompt": "one",
    "prepend_instance_prompt": True, "only_instance_prompt": True, "disable_multiline_split": True, "resolution": 0.25,
    "resolution_type": "area", "crop": True, "crop_aspect": "preserve", "crop_style": "corner", "minimum_image_size": 0.1,
    "maximum_image_size": None, "target_downsample_size": None, "minimum_aspect_ratio": 0.5, "maximum_aspect_ratio": 2,
    "conditioning_data_dir": "outlines",
    "max_num_samples": 3, "disabled": True, "dataset_type": "video", "num_frames": 5, "fps": 12, "seconds": 3,
}  # fmt: skip


def test_round_trip(project: Callable[..., Path], tmp_path: Path) -> None:
    write(tmp_path / "p.json", {"a": "x", "b": {"prompt": "y", "adapter_strength": -2}})
    write(tmp_path / "l.json", {"algo": "loha", "linear_dim": 8, "apply_preset": {"target_module": ["a"], "use_fnmatch": True}})
    changed = CHANGED | {"lora_type": "lycoris", "lycoris_config": "l.json"}
    path = project(**changed, user_prompt_library="p.json", validation_prompt="z")
    buckets(path, entry("more") | BUCKET, entry("less", 1))
    config, _ = read_config(path, (), families)
    read_in = {"model_type", "data_backend_config", "user_prompt_library", "validation_prompt", "lycoris_config"}
    usual = RunConfig(model_family="sdxl")
    assert {name for name in RunConfig.model_fields if getattr(config, name) == getattr(usual, name)} <= read_in
    usual_bucket = BucketConfig(id="x", instance_data_dir=Path("x"))
    given = set(BUCKET) - {"maximum_image_size", "target_downsample_size"}
    assert all(getattr(config.buckets[0], name) != getattr(usual_bucket, name) for name in given)
    (tmp_path / "saved").mkdir()
    saved = write(tmp_path / "saved" / "config.json", to_json(config))
    again, notes = read_config(saved, (), families)
    assert again == config and notes == ()
    least = RunConfig(model_family="sdxl", buckets=(BucketConfig(id="more", instance_data_dir=tmp_path / "more"),))
    assert read_config(write(tmp_path / "saved" / "least.json", to_json(least)))[0] == least


def test_help_is_the_schema() -> None:
    rows = {key: (section, kind, default, text) for section, key, kind, default, text in key_help()}
    assert list(rows) == [name for name in RunConfig.model_fields if name not in NOT_FLAGS]
    assert all(section and kind and text for section, kind, _, text in rows.values())
    assert rows["learning_rate"][:3] == ("training", "number", "0.0001")
    assert rows["slider_lora_target"][:3] == ("adapter", "true | false", "false")
    assert rows["output_dir"][0] == "output" and rows["strict"][0] == "behaviour" and rows["mixed_precision"][1] == "no | bf16"
