"""The keys that SimpleTuner's users have in their files and that are no keys here, and what becomes of each.

One line a key: SimpleTuner's default, and what holds here instead. An `ignored` key cannot change the result, whatever its
value, and costs one note. A `refused` key would: it is an error, unless its value is SimpleTuner's own default (a note) or
one of `same`, which asks for what is done here anyway (nothing to say). Where even the default would change the result,
`strict` makes it an error too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["same", "ignored", "refused"]


@dataclass(frozen=True, slots=True)
class Known:
    """What becomes of a key that SimpleTuner has and we have not."""

    default: Any
    """SimpleTuner's default."""

    why: str
    """What holds here instead; the end of the note or of the error."""

    matters: bool
    """Whether a value could change the result."""

    same: tuple[Any, ...] = ()
    """Values that ask for what is done here anyway."""

    strict: bool = False
    """Whether even the default is refused."""

    def verdict(self, value: Any) -> Verdict:
        """What to do about this value."""
        plain = _plain(value)
        if plain is None or any(plain == _plain(same) for same in self.same):  # null is a key that is not given
            return "same"
        at_default = plain == _plain(self.default) and not self.strict
        return "ignored" if at_default or not self.matters else "refused"


@dataclass(frozen=True, slots=True)
class Value:
    """A value of one of our own keys that other tools have and we have not."""

    why: str
    """What holds here instead."""

    instead: Any = None
    """The value to go on with; None refuses."""


def _plain(value: Any) -> Any:
    """Text as configurations have it, to what it means: "False", "0.10", "None" and "" are no different from the real thing."""
    if value is None or not isinstance(value, str):
        return value
    text = value.strip().lower()
    words = {"true": True, "false": False, "none": None, "null": None, "": None}
    if text in words:
        return words[text]
    try:
        return float(text)
    except ValueError:
        return text


def _ignored(default: Any, why: str) -> Known:
    return Known(default, why, matters=False)


def _refused(default: Any, why: str, *same: Any, strict: bool = False) -> Known:
    return Known(default, why, matters=True, same=same, strict=strict)


_CACHE = "latents and embeddings are kept in cache_dir, and found again by what made them"
_BATCHES = "how many are encoded or written at once is decided here"
_UPLOAD = "nothing is uploaded; upload the exported file yourself"
_MIRROR = "a slider must mirror, and DoRA is not linear in its strength; use a plain LoRA"
_QUANT = "text encoders leave memory before training and are not quantised; write no_change"
_EPOCHS = "steps are counted here, not epochs; use max_train_steps"
_WEIGHTS = "every part comes from pretrained_model_name_or_path; put it into a copy of that folder"
_EMA = "the moving average stays on the device and follows every step"
_RATE = "the learning rate is what learning_rate says; take it out"
_TIMES = "use timestep_sampling, timestep_shift and timestep_range; take it out"
_TIMESTEPS = "timesteps are drawn alike for every bucket; use timestep_range for all of them, and take it out"
_MEMORY = "a matter of memory and speed; use gradient_checkpointing or a smaller resolution if memory is short"
_OFFLOAD = "enable_group_offload fetches one block at a time from the computer's memory, in order with what is computed"
_GUIDANCE = "this family has no such setting"
_PICTURES = "a matter of pictures that are not drawn here"

CONFIG_KEYS: Mapping[str, Known] = {
    # --- model
    "pretrained_vae_model_name_or_path": _refused(None, _WEIGHTS),
    "pretrained_transformer_model_name_or_path": _refused(None, _WEIGHTS),
    "pretrained_unet_model_name_or_path": _refused(None, _WEIGHTS),
    "train_text_encoder": _refused(False, "a slider leaves the text encoder alone; take it out", False),
    "text_encoder_1_precision": _refused("no_change", _QUANT, "no_change"),
    "text_encoder_2_precision": _refused("no_change", _QUANT, "no_change"),
    "text_encoder_3_precision": _refused("no_change", _QUANT, "no_change"),
    "text_encoder_4_precision": _refused("no_change", _QUANT, "no_change"),
    "base_model_default_dtype": _refused("bf16", "mixed_precision says in which type the frozen weights are kept; take it out"),
    "quantize_via": _ignored("accelerator", "weights are quantised before they go to the device"),
    "attention_mechanism": _ignored("diffusers", "attention is PyTorch's own"),
    "fuse_qkv_projections": _refused(False, "adapters attach to separate projections; take it out", False),
    "tokenizer_max_length": _refused(None, "the family decides how long prompts may be; take it out"),
    "gradient_checkpointing_interval": _ignored(None, _MEMORY),
    "dynamo_mode": _refused(None, "torch_compile compiles in the default mode; take it out", "default"),
    "dynamo_fullgraph": _ignored(False, "blocks are compiled as far as they can be"),
    "dynamo_dynamic": _ignored(None, "PyTorch finds out which sizes vary"),
    "dynamo_use_regional_compilation": _ignored(None, "blocks are compiled one by one where the model repeats them"),
    "group_offload_type": _ignored("block_level", _OFFLOAD),
    "group_offload_blocks_per_group": _ignored(1, _OFFLOAD),
    "group_offload_use_stream": _ignored(False, _OFFLOAD),
    "group_offload_to_disk_path": _ignored(None, _OFFLOAD),
    "vae_enable_tiling": _ignored(False, _MEMORY),
    "vae_enable_slicing": _ignored(False, _MEMORY),
    # --- adapter
    "peft_lora_mode": _refused("standard", "only plain LoRA is trained; write standard", "standard"),
    "use_dora": _refused(False, _MIRROR, False),
    "lora_format": _refused("diffusers", "the diffusers layout is written; write diffusers", "diffusers"),
    "init_lokr_norm": _ignored(None, "it belongs to LyCORIS"),
    "flux_lora_target": _refused("all", "use slider_lora_target or peft_lora_target_modules; take it out"),
    # --- data
    "aspect_bucket_rounding": _refused(2, "aspect ratios are not rounded; set aspect_bucket_alignment instead"),
    "dataloader_prefetch": _ignored(False, "batches come from memory or the cache, which is mapped into it"),
    "vae_batch_size": _ignored(4, _BATCHES),
    "write_batch_size": _ignored(128, _BATCHES),
    "cache_dir_vae": _ignored("", _CACHE),
    "cache_dir_text": _ignored("cache", _CACHE),
    "vae_cache_ondemand": _ignored(False, _CACHE),
    "vae_cache_disable": _ignored(False, _CACHE),
    "vae_cache_clear_each_epoch": _ignored(None, _CACHE),
    "text_cache_ondemand": _ignored(False, _CACHE),
    "text_cache_disable": _ignored(False, _CACHE),
    "compress_disk_cache": _ignored(False, _CACHE),
    "preserve_data_backend_cache": _ignored(False, _CACHE),
    "override_dataset_config": _ignored(False, _CACHE),
    "hash_filenames": _ignored(True, _CACHE),
    "skip_file_discovery": _ignored("", "folders are always searched"),
    "metadata_update_interval": _ignored(3600, "nothing is written into the image folders"),
    "disable_bucket_pruning": _ignored(False, "buckets of any size are trained"),
    "allow_dataset_oversubscription": _ignored(False, "buckets of any size are trained"),
    "delete_unwanted_images": _ignored(False, "images are never deleted"),
    "delete_problematic_images": _ignored(False, "images are never deleted; see skip_unreadable_images"),
    # --- training
    "num_train_epochs": _refused(1, _EPOCHS, 0),
    "strict_epoch_limit": _ignored(False, _EPOCHS),
    "ignore_final_epochs": _ignored(False, _EPOCHS),
    "optimizer_cpu_offload_method": _ignored(None, "the optimizer stays on the device"),
    "optimizer_release_gradients": _ignored(False, _MEMORY),
    "lr_scale": _refused(False, _RATE, False),
    "lr_scale_sqrt": _ignored(False, "it belongs to lr_scale"),
    "grad_clip_method": _refused("value", "the gradient's norm is clipped, at max_grad_norm", "norm"),
    "ema_device": _ignored("cpu", _EMA),
    "ema_cpu_only": _ignored(False, _EMA),
    "ema_foreach_disable": _ignored(False, _EMA),
    "ema_update_interval": _refused(None, _EMA + "; take it out", 1),
    "ema_validation": _refused("comparison", "with use_ema pictures are drawn with the average; write ema_only", "ema_only"),
    "use_soft_min_snr": _refused(False, "use snr_gamma, which is min-SNR itself; take it out", False),
    "noise_offset": _refused(
        0.1, "no offset is added, as it shifts brightness whichever way the slider goes; take it out or write 0", 0, strict=True
    ),
    "loss_type": _refused("l2", "the loss is l2; take it out", "l2"),
    "prediction_type": _refused(None, "what the model predicts is read from its own files; take it out"),
    "flow_schedule_auto_shift": _refused(False, "write timestep_shift: auto", False),
    "flow_use_uniform_schedule": _ignored(False, "timestep_sampling says how times are drawn: uniform or logit_normal"),
    "flow_use_beta_schedule": _refused(False, _TIMES, False),
    "flow_beta_schedule_alpha": _ignored(2.0, "it belongs to flow_use_beta_schedule"),
    "flow_beta_schedule_beta": _ignored(2.0, "it belongs to flow_use_beta_schedule"),
    "flow_custom_timesteps": _refused(None, _TIMES),
    "timestep_bias_strategy": _refused("none", "use timestep_range, which trains on a part of the noise; take it out", None),
    "timestep_bias_begin": _ignored(0, "it belongs to timestep_bias_strategy"),
    "timestep_bias_end": _ignored(1000, "it belongs to timestep_bias_strategy"),
    "timestep_bias_multiplier": _ignored(1.0, "it belongs to timestep_bias_strategy"),
    "timestep_bias_portion": _ignored(0.25, "it belongs to timestep_bias_strategy"),
    "flux_guidance_mode": _refused("constant", _GUIDANCE),
    "flux_guidance_value": _refused(1.0, _GUIDANCE),
    "post_checkpoint_script": _refused(None, "no scripts are run; call it after the training"),
    # --- output
    "checkpoint_epoch_interval": _refused(None, "use checkpoint_step_interval", 0),
    "tracker_run_name": _ignored("simpletuner-testing", "a run is named after its output_dir"),
    "push_to_hub": _refused(False, _UPLOAD, False),
    "push_checkpoints_to_hub": _refused(False, _UPLOAD, False),
    "hub_model_id": _ignored(None, _UPLOAD),
    "webhook_config": _ignored(None, "nobody is called while training; metrics.jsonl can be followed"),
    # --- validation
    "validation_prompt_library": _refused(False, "there is no built-in library; write your own as user_prompt_library", False),
    "validation_epoch_interval": _refused(None, "use validation_step_interval", 0),
    "validation_guidance_real": _refused(1.0, "use validation_guidance"),
    "validation_guidance_rescale": _refused(0.0, "guidance is not rescaled; take it out", 0),
    "validation_noise_scheduler": _refused(None, "pictures are drawn with the model's own scheduler; take it out"),
    "validation_adapter_path": _refused(None, "only the slider itself is drawn; take it out"),
    "validation_adapter_name": _ignored(None, "only the slider itself is drawn"),
    "validation_adapter_config": _refused(None, "only the slider itself is drawn; see validation_strengths"),
    "validation_adapter_mode": _ignored("adapter_only", "strips hold strength 0, which is the model without the slider"),
    "validation_disable_unconditional": _ignored(False, "the empty prompt is drawn only if the library has it"),
    "validation_image_format": _ignored("png", "pictures are PNG"),
    "validation_on_startup": _ignored(False, "strips hold strength 0, which is the model as it was"),
    "validation_preview": _ignored(False, _PICTURES),
    "validation_preview_steps": _ignored(1, _PICTURES),
    "validation_method": _refused("simpletuner-local", "pictures are drawn in the run itself; take it out"),
    "validation_external_script": _refused(None, "no scripts are run; call it after the training"),
    "validation_disable_benchmark": _ignored(False, _PICTURES),
    "disable_benchmark": _ignored(False, _PICTURES),
    "num_eval_images": _ignored(4, "there are no evaluation sets here"),
    "evaluation_type": _ignored(None, "there are no evaluation sets here"),
}
"""Keys of SimpleTuner's config.json."""

_KIND = "only folders of images, videos or sounds are trained; take the entry out, or write disabled: true"
_PAIRED = "only images and their captions are trained; take it out"
_WINDOW = "a bucket takes part from beginning to end; take it out"

ENTRY_KEYS: Mapping[str, Known] = {
    "type": _refused("local", "only folders on this machine are read; download the images and write local", "local"),
    "default": _ignored(False, "it matters for text embeddings only"),
    "crop_aspect_buckets": _refused(None, "crop_aspect is square or preserve; take it out", []),
    "max_upscale_threshold": _refused(None, "use minimum_image_size"),
    "caption_shuffle": _refused(None, "captions are used as they are; take it out", {}, {"enable": False}),
    "metadata_backend": _refused("discovery", "folders are searched; write discovery", "discovery", "json"),
    "parquet": _refused(None, "captions come from file names, text files or instance_prompt; take it out"),
    "train_batch_size": _refused(None, "train_batch_size of the configuration holds for every bucket"),
    "start_epoch": _refused(1, _WINDOW, 0, 1),
    "start_step": _refused(0, _WINDOW, 0, 1),
    "end_epoch": _refused(None, _WINDOW, 0),
    "end_step": _refused(None, _WINDOW, 0),
    "disable_after_epoch_step": _refused(None, _WINDOW, 0),
    "timestep_sampling_offset": _refused(0, _TIMESTEPS, 0),
    "conditioning": _refused(None, "conditioning images are not made here; put them in a folder and name it", []),
    "source_dataset_id": _refused(None, _PAIRED),
    "video": _refused(None, "write num_frames and fps beside it instead", {}),
    "audio": _refused(None, "write seconds beside it instead", {}),
    "text_embeds": _ignored(None, _CACHE),
    "image_embeds": _ignored(None, _CACHE),
    "conditioning_image_embeds": _ignored(None, _CACHE),
    "cache_dir": _ignored(None, _CACHE),
    "cache_dir_vae": _ignored(None, _CACHE),
    "cache_file_suffix": _ignored(None, _CACHE),
    "vae_cache_ondemand": _ignored(False, _CACHE),
    "vae_cache_disable": _ignored(False, _CACHE),
    "vae_cache_clear_each_epoch": _ignored(None, _CACHE),
    "text_cache_ondemand": _ignored(False, _CACHE),
    "text_cache_disable": _ignored(False, _CACHE),
    "write_batch_size": _ignored(128, _BATCHES),
    "text_encoder_batch_size": _ignored(1, _BATCHES),
    "preserve_data_backend_cache": _ignored(False, _CACHE),
    "hash_filenames": _ignored(True, _CACHE),
    "skip_file_discovery": _ignored("", "folders are always searched"),
    "metadata_update_interval": _ignored(3600, "nothing is written into the image folders"),
    "delete_unwanted_images": _ignored(False, "images are never deleted"),
    "delete_nsfw_images": _ignored(False, "images are never deleted"),
    "disable_validation": _ignored(False, "pictures are drawn from the prompt library"),
}
"""Keys of an entry of SimpleTuner's dataloader JSON."""

CACHES = ("text_embeds", "image_embeds", "conditioning_image_embeds", "distillation_cache")
"""Kinds of entries that say only where something is cached."""

FOREIGN_DATA = ("eval", "caption")
"""Kinds of entries whose data is not trained here."""

REGULARISATION = ("is_regularisation_data", "is_regularization_data")
"""What SimpleTuner calls images whose prediction must not change. Here they are those without slider_strength."""

PROMPT_KEYS: Mapping[str, Known] = {
    "bbox_entities": _refused(None, "boxes are not supported; take it out", []),
    "bbox_keyframes": _refused(None, "boxes are not supported; take it out", []),
}
"""Keys of an entry of SimpleTuner's prompt library."""

RENAMED: Mapping[str, str] = {
    "checkpointing_steps": "checkpoint_step_interval",
    "dynamo_backend": "torch_compile",
    "validation_steps": "validation_step_interval",
    "validation_lycoris_strength": "validation_adapter_strength",
    "optimizer_beta1": "adam_beta1",
    "optimizer_beta2": "adam_beta2",
    "flow_schedule_shift": "timestep_shift",
    "flow_sigmoid_scale": "timestep_logit_scale",
}
"""Other names of our own keys."""

MEANT: Mapping[tuple[str, Any], tuple[str, Any]] = {
    ("flow_schedule_auto_shift", True): ("timestep_shift", "auto"),
    ("flow_use_uniform_schedule", True): ("timestep_sampling", "uniform"),
}
"""Other tools' switches, and the key and the value of ours that one asks for when it is on."""

ENTRY_RENAMED: Mapping[str, str] = {"disable": "disabled"}
"""Other names of a bucket's keys."""

PROMPT_RENAMED: Mapping[str, str] = {"caption": "prompt", "tags": "prompt"}
"""Other names of a prompt's keys."""

_SAMPLED_CROP = Value("crops are square or keep the image's own aspect; write square or preserve")
_COLUMNS = Value("captions come from file names, text files or instance_prompt; write filename, textfile or instanceprompt")
_TRACKER = Value("metrics.jsonl is always written; write none or tensorboard")

_EIGHT_BIT = ("int8-quanto", "fp8-quanto", "fp8uz-quanto", "fp8-torchao", "int8-bnb", "int8-sdnq")
_FOUR_BIT = ("int4-quanto", "int2-quanto", "int4-torchao", "fp4-bnb", "int4-sdnq")
_PLAIN = Value("AdamW in float32 is used", instead="adamw")
_MOVED = Value("it does not begin as the base model, so strength 0 would not be the base; write default or gaussian")

VALUES: Mapping[str, Mapping[Any, Value]] = {
    "model_type": {"full": Value("a slider is an adapter: a whole model has no strength to turn up or down; write lora")},
    "lora_init_type": {
        True: Value("", instead="default"),
        **dict.fromkeys(("pissa", "olora", "loftq", "eva", "corda", "orthogonal"), _MOVED),
    },
    "optimizer": {
        **dict.fromkeys(("adamw_bf16", "optimi-adamw", "bnb-adamw", "bnb-adamw-paged", "deepspeed-adamw"), _PLAIN),
        "torch-adamw": Value("", instead="adamw"),
        "bnb-adamw8bit": Value("", instead="adamw8bit"),
        "bnb-adamw8bit-paged": Value("its state stays on the device: adamw8bit is used", instead="adamw8bit"),
        "ao-adamw8bit": Value("adamw8bit, that of bitsandbytes, is used", instead="adamw8bit"),
        "adamw_schedulefree+no_kahan": Value("", instead="adamw_schedulefree"),  # weights are float32 here
    },
    "mixed_precision": {
        False: Value("", instead="no"),  # YAML reads a bare `no` as false
        "fp16": Value("float16 gradients underflow without loss scaling; write bf16 or no"),
    },
    "base_model_precision": {
        **dict.fromkeys(("no", False), Value("", instead="no_change")),
        **dict.fromkeys(_EIGHT_BIT, Value("of 8 bit there is int8-torchao; write that, or no_change")),
        **dict.fromkeys(_FOUR_BIT, Value("of fewer bits there is nf4-bnb; write that, int8-torchao or no_change")),
        "bnb-nf4": Value("", instead="nf4-bnb"),
    },
    "torch_compile": {True: Value("", instead="inductor"), False: Value("", instead="no")},
    "signs_in_one_forward": {True: Value("", instead="yes"), False: Value("", instead="no")},  # YAML's bare `yes` and `no`
    "report_to": {"wandb": _TRACKER, "comet_ml": _TRACKER, "all": _TRACKER, "swanlab": _TRACKER},
    "caption_strategy": {"parquet": _COLUMNS, "huggingface": _COLUMNS, "csv": _COLUMNS, "webshart": _COLUMNS},
    "crop_aspect": {"random": _SAMPLED_CROP, "closest": _SAMPLED_CROP},
    "dataset_type": {kind: Value(_KIND) for kind in FOREIGN_DATA},
    "crop_style": {"face": Value("faces are not looked for; write center, random or corner")},
}
"""Values of our own keys that SimpleTuner has and we have not."""
