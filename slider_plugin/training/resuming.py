"""What a run must have in common with the checkpoint that it goes on from, and what it may do otherwise.

A checkpoint's facts hold the configuration and what was found when it was read: digests of the model, the adapter and the data.
Places may change, what is in them may not. A key that is in none of the lists below shapes the result and may not change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slider_hooks import Components
from slider_plugin.adapters.base import Adapter
from slider_plugin.adapters.frozen import frozen_files
from slider_plugin.config import RunConfig
from slider_plugin.configfile import to_json
from slider_plugin.data.encode import Encoded
from slider_plugin.errors import UserError
from slider_plugin.training.processes import launched

SAMPLED = 256
"""Values of one weight that are looked at: hashing all of a large model would take minutes."""

SAID = (
    "max_train_steps",
    "learning_rate",
    "lr_scheduler",
    "lr_warmup_steps",
    "lr_num_cycles",
    "lr_power",
    "lr_end",
    "max_grad_norm",
    "optimizer_config",
    "adam_weight_decay",
    "adam_epsilon",
    "signs_in_one_forward",
    "gradient_checkpointing",
    "enable_group_offload",
    "torch_compile",
)
"""Keys that may change on the way, which is said: the run goes on from here with the new value."""

LOOKED_AT = (
    "model_flavour",
    "pretrained_model_name_or_path",
    "revision",
    "variant",
    "lycoris_config",
    "init_lora",
    "lora_init_type",
    "base_loras",
    "assistant_lora_path",
    "assistant_lora_weight_name",
    "assistant_lora_strength",
    "assistant_lora_inference_strength",
    "disable_assistant_lora",
    "controlnet_model_name_or_path",
    "controlnet_zero_layers",
    "slider_lora_target",
    "include_joint",
    "peft_lora_target_modules",
    "data_backend_config",
    "buckets",
    "resolution",
    "resolution_type",
    "caption_strategy",
    "instance_prompt",
    "minimum_image_size",
    "maximum_image_size",
    "target_downsample_size",
    "aspect_bucket_alignment",
    "skip_unreadable_images",
    "max_image_pixels",
    "train_batch_size",
    "gradient_accumulation_steps",
)
"""Keys that may change, since what they lead to is compared itself (`FOUND`)."""

WRITTEN = (
    "output_dir",
    "slider_positive",
    "slider_negative",
    "cache_dir",
    "checkpoint_step_interval",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "report_to",
    "tracker_project_name",
    "validation_prompt",
    "user_prompt_library",
    "prompts",
    "validation_negative_prompt",
    "validation_adapter_strength",
    "validation_strengths",
    "validation_step_interval",
    "validation_num_inference_steps",
    "validation_guidance",
    "validation_resolution",
    "validation_num_video_frames",
    "validation_image",
    "validation_control_image",
    "validation_seed",
    "num_validation_images",
    "validation_disable",
    "validation_report",
    "validation_report_interval",
    "validation_report_stop",
    "strict",
)
"""Keys that may change, since they say what is written and drawn."""

FOUND = {
    "model": "the weights of the model",
    "adapter": "the adapter: its modules, sizes or kind",
    "data": "the images or their captions, sizes or crops",
    "frozen": "the LoRAs beside the slider",
    "global_batch": "the samples of a draw (train_batch_size times the number of processes)",
    "draws_per_step": "the draws of an optimizer step (gradient_accumulation_steps)",
}
"""What was found, and how it is called in messages."""


def facts_of(
    config: RunConfig, components: Components, adapter: Adapter, data: Encoded, draws_per_step: int, device: torch.device
) -> dict[str, Any]:
    """What a checkpoint says about the run that wrote it, besides its position. All processes call it together."""
    own = {id(parameter) for parameter in adapter.parameters()}
    models = [m for m in (components.denoiser, components.controlnet) if m is not None]
    return {
        "config": to_json(config),
        "model": _digest(line for model in models for line in _weights(model, own)),
        "adapter": _digest([json.dumps(adapter.facts(), sort_keys=True), *adapter.modules]),
        "data": data.digest,
        "frozen": _digest(f"{_file_digest(file.path)} {file.training!r}" for file in frozen_files(config)),
        "global_batch": config.train_batch_size * launched(),
        "draws_per_step": draws_per_step,
        "processes": launched(),
        "torch": torch.__version__,
        "device": device.type,
    }


def check_config(path: Path, recorded: Mapping[str, Any], config: RunConfig) -> None:
    """Raise UserError if a run with this configuration would not be the one that wrote a checkpoint with these facts."""
    before, now = _configs(recorded, config)
    other = [key for key in now if key not in (*SAID, *LOOKED_AT, *WRITTEN) and key in before and before[key] != now[key]]
    if other:
        changes = "; ".join(f"{key} was {_short(before[key])} and is {_short(now[key])}" for key in other)
        raise UserError(f"resume_from_checkpoint: {path} is of another run: {changes}. Restore these keys, or start anew")


def check_found(path: Path, recorded: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UserError if what was found for this run is not what the checkpoint's had."""
    other = [words for name, words in FOUND.items() if name in recorded and recorded[name] != now[name]]
    if other:
        raise UserError(
            f"resume_from_checkpoint: {path} cannot be resumed with these, for they are others: {'; '.join(other)}. "
            "Restore them, or start anew in another output_dir, with the finished slider as init_lora"
        )


def changes(recorded: Mapping[str, Any], config: RunConfig, now: Mapping[str, Any]) -> Iterator[str]:
    """What is another way from here on, one line each."""
    before, after = _configs(recorded, config)
    for key in SAID:
        if key in before and before[key] != after[key]:
            yield f"{key} is {_short(after[key])} from here on; it was {_short(before[key])}"
    for name, words in {"processes": "processes", "torch": "PyTorch", "device": "device"}.items():
        if name in recorded and recorded[name] != now[name]:
            yield f"{words}: {now[name]} instead of {recorded[name]}: the same run but for rounding"


def resume_schedule(schedule: Any, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Put a learning-rate schedule (a `LambdaLR`) back to a saved step, with the rates of the present configuration there."""
    schedule.load_state_dict({**saved, "base_lrs": schedule.base_lrs})
    rates = [base * shape(schedule.last_epoch) for base, shape in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    schedule._last_lr = rates
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _configs(recorded: Mapping[str, Any], config: RunConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both configurations with every key, as JSON has them; one that the former was written without has its default."""
    defaults = {**dict.fromkeys(RunConfig.model_fields), **_as_json(RunConfig(model_family=config.model_family))}
    now = {**defaults, **_as_json(config)}
    written = recorded.get("config")
    return ({} if written is None else {**dict.fromkeys(now), **defaults, **written}), now


def _as_json(config: RunConfig) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(to_json(config)))
    return values


def _short(value: Any) -> str:
    text = "not given" if value is None else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _digest(lines: Iterator[str] | Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()[:40]


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@torch.no_grad()
def _weights(model: nn.Module, own: set[int]) -> Iterator[str]:
    """Name, shape, type and evenly spaced values of every frozen weight."""
    for name, parameter in model.named_parameters():
        if id(parameter) not in own:
            yield f"{name} {tuple(parameter.shape)} {parameter.dtype} {_sample(parameter)}"


def _sample(parameter: Tensor) -> str:
    whole: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter  # sharded: gathered by all
    if type(whole.data) is not Tensor:
        return type(whole.data).__name__  # quantised: its shape and kind must do
    values_N = whole.reshape(-1)
    sample_N = values_N[:: max(1, len(values_N) // SAMPLED)].contiguous()
    return hashlib.sha256(sample_N.view(torch.uint8).cpu().numpy().tobytes()).hexdigest()
