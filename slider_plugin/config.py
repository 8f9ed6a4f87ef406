"""What a run is: every key of a configuration, typed, with its default and one line of help.

The key names are those of the specification and of SimpleTuner's config.json, dataloader JSON and prompt library, so that
existing files can be read. `configfile.py` reads files and flags into these models and reports every problem at once;
`config_values.py` holds the types of single values. The command line, `slider train --help` and the page are made from this
schema.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from slider_hooks import TargetRequest
from slider_plugin.config_values import (
    Chance,
    Count,
    Fraction,
    Modules,
    NotNegative,
    Number,
    Numbers,
    Positive,
    Seed,
    Settings,
    Shares,
    Shift,
    Size,
    Steps,
    Strength,
    Window,
    Words,
)
from slider_plugin.lycoris_config import LycorisConfig

STRENGTHS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=False)


class BucketConfig(_Strict):
    """One folder of the dataloader JSON, with the strength its images stand for."""

    id: str = Field(min_length=1, description="unique name of the bucket")
    instance_data_dir: Path = Field(
        description="folder of images, videos or sounds, with what is below it; relative to the dataloader file or to here"
    )
    dataset_type: Literal["image", "video", "audio"] = Field(
        "image", description="image; video: mp4, webm, gif or folders of frames; audio: wav, flac"
    )
    num_frames: Count | None = Field(None, description="frames of a training clip, from the middle of each video")
    fps: Positive | None = Field(None, description="frames per second that are taken of a video; None takes every frame")
    seconds: Positive | None = Field(None, description="length of a training sound, from the middle of each file")
    slider_strength: Strength | None = Field(
        None, description="positive: more of the concept; negative: less; 0 or absent: neutral"
    )
    probability: NotNegative = Field(1.0, description="weight among the buckets of the same sign")
    repeats: Steps = Field(0, description="extra passes over the images in each epoch")
    caption_strategy: Literal["filename", "textfile", "instanceprompt"] = Field(
        "textfile", description="where captions come from"
    )
    instance_prompt: str | None = Field(None, description="caption of every image (instanceprompt), or its beginning")
    prepend_instance_prompt: bool = Field(False, description="put instance_prompt in front of every caption")
    only_instance_prompt: bool = Field(False, description="use instance_prompt and ignore the captions")
    disable_multiline_split: bool = Field(False, description="a text file is one caption instead of one a line")
    resolution: Positive = Field(1024, description="in the unit of resolution_type")
    resolution_type: Literal["pixel", "area", "pixel_area"] = Field(
        "pixel_area", description="pixel: shorter edge; area: megapixels; pixel_area: edge of a square of that area"
    )
    crop: bool = Field(False, description="crop to crop_aspect instead of keeping the image's own aspect")
    crop_aspect: Literal["square", "preserve"] = Field("square", description="aspect of the crop")
    crop_style: Literal["random", "center", "centre", "corner"] = Field("random", description="where the crop is taken")
    minimum_image_size: NotNegative | None = Field(None, description="smaller images are left out; unit of resolution_type")
    maximum_image_size: Positive | None = Field(
        None, description="larger images are scaled to target_downsample_size before the crop"
    )
    target_downsample_size: Positive | None = Field(None, description="see maximum_image_size; both or neither")
    minimum_aspect_ratio: Positive | None = Field(None, description="width by height; outside images are left out")
    maximum_aspect_ratio: Positive | None = Field(None, description="width by height; outside images are left out")
    max_num_samples: Count | None = Field(None, description="use a fixed subset of that many images")
    conditioning_data_dir: Path | None = Field(
        None, description="folder of images by the same names and of the same sizes, which a ControlNet is shown"
    )
    disabled: bool = Field(False, description="leave this bucket out")


class PromptConfig(_Strict):
    """One entry of the prompt library."""

    name: str = Field(min_length=1, description="short; image files are named after it")
    prompt: str = Field(description="the text")
    adapter_strength: Strength | None = Field(None, description="its own strength; without one, validation_adapter_strength")


class TextConfig(_Strict):
    """The prompts of a text slider."""

    target: str = Field(description="what the slider is to change, without a word about the concept; may be empty")
    positive: str = Field(description="the same with more of the concept")
    negative: str = Field(description="the same with less of it")
    attributes: tuple[str, ...] = Field((), description="what is to be preserved; each is put in front of both ends")
    anchors: tuple[str, ...] = Field((), description="prompts under which nothing may change")

    @field_validator("negative")
    @classmethod
    def _another_end(cls, negative: str, info: ValidationInfo) -> str:
        if negative.strip() == str(info.data.get("positive", "")).strip():
            raise PydanticCustomError("ends", "is the positive prompt, too: nothing says what changes")
        return negative

    @field_validator("attributes", "anchors")
    @classmethod
    def _once_each(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(prompts)) < len(prompts):
            raise PydanticCustomError("once", "has one entry twice; keep one")
        return prompts


class BaseLoraConfig(_Strict):
    """One LoRA that counts as part of the base model: frozen, and active in training and in validation."""

    path: Path = Field(description="safetensors file of the LoRA")
    weight: Number = Field(1.0, description="its strength")


SECTIONS = {
    "model_family": "model",
    "lora_type": "adapter",
    "data_backend_config": "data",
    "slider_objective": "training",
    "output_dir": "output",
    "validation_prompt": "validation",
    "strict": "behaviour",
}
"""The first key of each section of `RunConfig`: what help and the page group keys by."""


class RunConfig(_Strict):
    """One training run. Field order is the order of help and of the page."""

    # --- model
    model_family: str = Field(description="which family plugin, see `slider plugins list`")
    model_flavour: str | None = Field(None, description="published version of the family; the default of the model's place")
    pretrained_model_name_or_path: str | None = Field(None, description="folder of a diffusers pipeline, or a hub id")
    revision: str | None = Field(None, description="revision of a hub id")
    variant: str | None = Field(None, description="variant of the weight files, such as fp16")
    base_model_precision: Literal["no_change", "int8-torchao", "nf4-bnb"] = Field(
        "no_change", description="the frozen model's Linear layers in 8 bit (torchao) or 4 (bitsandbytes), for a plain LoRA"
    )
    model_type: Literal["lora"] = Field("lora", description="sliders are adapters")

    # --- adapter
    lora_type: Literal["standard", "lycoris"] = Field(
        "standard", description="standard is a LoRA of PEFT; lycoris, lycoris-lora"
    )
    lycoris_config: Path | None = Field(None, description="JSON: algorithm, sizes and preset of lycoris-lora")
    lycoris: LycorisConfig | None = Field(None, description="the same itself, instead of a file")
    lora_rank: Count = Field(16, description="rank of the adapter")
    lora_alpha: Positive | None = Field(None, description="the adapter's output is scaled by alpha / rank; None is the rank")
    lora_use_rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead (rank-stabilised LoRA)")
    lora_init_type: Literal["default", "gaussian"] = Field("default", description="first weights; both begin as the base model")
    lora_dropout: Fraction = Field(0.0, description="dropout in front of the adapter")
    slider_lora_target: bool = Field(
        False, description="attach to the slider targets of the family: no cross-attention, no text branch"
    )
    include_joint: bool = Field(True, description="slider targets may include modules that see text and image tokens together")
    peft_lora_target_modules: Modules = Field(
        None,
        description="your own targets, which always win: a list matches by suffix, text is a pattern for the whole name",
    )
    init_lora: Path | None = Field(None, description="slider file of ours that the adapter starts from, with the same modules")
    base_loras: tuple[BaseLoraConfig, ...] = Field(
        (), description="LoRAs that count as part of the base model, each with path and weight: frozen, never off"
    )
    assistant_lora_path: Path | None = Field(
        None, description="LoRA that assists the training: frozen, active whatever the slider's strength, never saved"
    )
    assistant_lora_weight_name: str | None = Field(None, description="the file, where assistant_lora_path is a folder")
    assistant_lora_strength: Number = Field(1.0, description="strength of the assistant in training")
    assistant_lora_inference_strength: Number = Field(0.0, description="strength of the assistant in validation; 0 is off")
    disable_assistant_lora: bool = Field(False, description="train without the assistant that is named")

    controlnet: bool = Field(False, description="train the slider on the family's ControlNet instead of the denoiser")
    controlnet_model_name_or_path: str | None = Field(
        None, description="folder or hub id of a ControlNet; without controlnet it is frozen and holds the structure"
    )
    controlnet_conditioning_scale: Number = Field(1.0, description="what the ControlNet's residuals are multiplied by")
    controlnet_zero_layers: Literal["train", "refuse"] = Field(
        "train",
        description="of a fresh ControlNet, which pass no gradient: give them the adapter, too, or refuse it",
    )

    # --- data
    data_backend_config: Path | None = Field(None, description="dataloader JSON: the list of buckets")
    buckets: tuple[BucketConfig, ...] = Field((), description="the buckets themselves, instead of a file")
    data_backend_sampling: Literal["uniform", "auto-weighting"] = Field(
        "uniform", description="weight of a bucket in its group: probability, or times its share of the data"
    )
    resolution: Positive = Field(1024, description="default of every bucket")
    resolution_type: Literal["pixel", "area", "pixel_area"] = Field("pixel_area", description="default of every bucket")
    caption_strategy: Literal["filename", "textfile", "instanceprompt"] = Field(
        "textfile", description="default of every bucket"
    )
    instance_prompt: str | None = Field(None, description="default of every bucket")
    minimum_image_size: NotNegative | None = Field(None, description="default of every bucket")
    maximum_image_size: Positive | None = Field(None, description="default of every bucket")
    target_downsample_size: Positive | None = Field(None, description="default of every bucket")
    aspect_bucket_alignment: Count | None = Field(
        None, description="image sides are multiples of this; None is 64, or what the model needs below 512 pixels"
    )
    skip_unreadable_images: bool = Field(False, description="leave out images that cannot be read instead of stopping")
    max_image_pixels: Count = Field(64_000_000, description="larger images are refused")
    neutral_strength: Positive | None = Field(
        None, description="strength at which neutral images are preserved; None is the largest of the buckets"
    )
    caption_dropout_probability: Chance = Field(0.0, description="how often a caption is replaced by the empty one")

    cache_dir: Path | None = Field(
        None,
        description="latents and prompt embeddings are kept here, for all runs; None is .slider-cache beside output_dir. "
        "It may be deleted at any time",
    )

    # --- training
    slider_objective: Annotated[str, Field(min_length=1)] = Field(
        "bucket",
        description="bucket; pair: images match by file name; text: prompts alone, images if you like; or an extension's own",
    )
    pair_target: Literal["noise", "addift"] = Field(
        "noise", description="pair: noise; addift: what the frozen model answers on the other image, for few steps"
    )
    pair_mask: Chance | None = Field(
        None, description="pair: weight, 0 to 1, of what is alike in both images; None weighs all alike"
    )
    slider_text: tuple[TextConfig, ...] = Field(
        (), description="text: an object of target, positive and negative prompt, attributes, anchors; or a list of such"
    )
    text_guidance: Positive = Field(1.0, description="text: factor of the direction; above 1 the answer's norm is kept")
    text_rollout_steps: Count = Field(20, description="text without images: steps from noise to image of what the model draws")
    text_rollout_guidance: Positive = Field(1.0, description="text without images: guidance of what the model draws; 1 is none")
    random_strength: Shares = Field(
        None, description="on or LOW,HIGH: share of the strength that each cycle draws, both signs alike; off is always all"
    )
    objective_config: dict[str, Any] = Field({}, description="settings of an extension's objective, as an object")
    max_train_steps: Count = Field(1000, description="optimizer steps")
    train_batch_size: Count = Field(1, description="images per draw")
    gradient_accumulation_steps: Count = Field(1, description="draws per optimizer step, rounded up to whole cycles")
    signs_in_one_forward: Literal["auto", "yes", "no"] = Field(
        "auto",
        description="the draws of a cycle share a forward, with the same gradient; auto: where the model allows it and it fits",
    )
    gradient_checkpointing: bool = Field(False, description="less memory, more time")
    enable_group_offload: bool = Field(
        False, description="the frozen model's blocks wait in the computer's memory, and come to the GPU one at a time"
    )
    torch_compile: Literal["no", "inductor", "aot_eager", "eager"] = Field(
        "no",
        description="compile the model's blocks with torch.compile; eager and aot_eager need no compiler, and gain nothing",
    )
    learning_rate: Positive = Field(1e-4, description="peak learning rate; for prodigy a factor of its own, by default 1")
    optimizer: Literal["adamw", "adamw8bit", "prodigy", "adamw_schedulefree"] = Field(
        "adamw", description="adamw; adamw8bit of bitsandbytes; prodigy of prodigyopt; adamw_schedulefree of schedulefree"
    )
    optimizer_config: Settings = Field(
        {}, description="the optimizer's other settings, as an object or as d_coef=2,use_bias_correction=true"
    )
    adam_beta1: Fraction = Field(0.9, description="decay of the gradient's mean, for every optimizer")
    adam_beta2: Fraction = Field(0.999, description="decay of the squared gradient's mean, for every optimizer")
    adam_weight_decay: NotNegative = Field(0.01, description="decoupled weight decay, for every optimizer")
    adam_epsilon: Positive = Field(1e-8, description="added to the denominator, for every optimizer")
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] = Field(
        "constant", description="schedule of the learning rate after the warm-up"
    )
    lr_warmup_steps: Steps = Field(0, description="optimizer steps of warm-up, for every schedule")
    lr_num_cycles: Count = Field(1, description="cosine_with_restarts: how often it starts")
    lr_power: Positive = Field(1.0, description="polynomial: 1 falls in a straight line")
    lr_end: NotNegative = Field(1e-7, description="polynomial: the learning rate at the end")
    max_grad_norm: NotNegative = Field(1.0, description="clip the gradient's norm; 0 does not clip")
    timestep_sampling: Literal["uniform", "logit_normal"] = Field(
        "uniform", description="how the time of the noise is drawn; logit_normal prefers the middle (flow models)"
    )
    timestep_logit_mean: Number = Field(0.0, description="logit_normal: above 0 prefers noise")
    timestep_logit_scale: Positive = Field(1.0, description="logit_normal: below 1 is closer to the middle")
    timestep_shift: Shift = Field(
        None, description="above 1 moves time towards noise (flow models); auto: by the image's size; None is the model's own"
    )
    timestep_range: Window = Field(
        (0.0, 1.0), description="the part of the noise that is trained on, from 0 (image) to 1 (noise): 0.2,0.8"
    )
    snr_gamma: NotNegative | None = Field(
        None, description="min-SNR loss weights, usually 5 (epsilon and v models); 0 or None weighs every time alike"
    )
    use_ema: bool = Field(False, description="draw and export a moving average of the weights; checkpoints hold both")
    ema_decay: Fraction = Field(0.995, description="share of the average that one step keeps; lower in the first steps")
    mixed_precision: Literal["no", "bf16"] = Field(
        "bf16", description="bf16: frozen weights and arithmetic in bfloat16, adapter in float32"
    )
    seed: Seed = Field(42, description="every random choice derives from it")

    # --- output
    output_dir: Path = Field(Path("slider-output"), description="everything the run writes goes here")
    checkpoint_step_interval: Steps = Field(
        500, description="optimizer steps between checkpoints; 0 writes one at the end only"
    )
    checkpoints_total_limit: Count = Field(3, description="older checkpoints are deleted")
    resume_from_checkpoint: str | None = Field(None, description="`latest`, or the folder of a checkpoint")
    slider_positive: Words | None = Field(None, description="words for what is above 0, for people: in the file and its card")
    slider_negative: Words | None = Field(None, description="words for what is below 0, likewise")
    report_to: Literal["none", "tensorboard"] = Field("none", description="besides metrics.jsonl, which is always written")
    tracker_project_name: str = Field("slider", description="name of the log")

    # --- validation
    validation_prompt: str | None = Field(None, description="one more prompt, named `validation`")
    user_prompt_library: Path | None = Field(None, description="JSON: name to prompt, or to {prompt, adapter_strength}")
    prompts: tuple[PromptConfig, ...] = Field((), description="the prompts themselves, instead of a file")
    validation_negative_prompt: str | None = Field("blurry, cropped, ugly", description="negative prompt of all")
    validation_adapter_strength: Strength = Field(1.0, description="strength of prompts without one of their own")
    validation_strengths: Numbers = Field(STRENGTHS, description="strengths of the strips; empty draws none")
    validation_step_interval: Steps = Field(0, description="optimizer steps between validations; 0 validates at the end only")
    validation_num_inference_steps: Count = Field(30, description="denoising steps")
    validation_guidance: NotNegative | None = Field(None, description="guidance scale; None is the family's own")
    validation_resolution: Size = Field(None, description="edge in pixels or WIDTHxHEIGHT; None is that of the buckets")
    validation_num_video_frames: Count | None = Field(
        None, description="frames of a video that is drawn; None is that of the buckets"
    )
    validation_image: Path | None = Field(None, description="the image that an image-to-video model begins its videos with")
    validation_control_image: Path | None = Field(
        None, description="the image that a ControlNet is shown in validation; None is the first one of the first bucket"
    )
    validation_seed: Seed | None = Field(None, description="None is the run's seed")
    num_validation_images: Count = Field(1, description="seeds per prompt")
    validation_disable: bool = Field(False, description="draw nothing")
    validation_report: bool = Field(
        False, description="measure the slider while it trains, and keep the best checkpoint (`slider report`)"
    )
    validation_report_interval: Steps | None = Field(
        None, description="optimizer steps between reports; None is validation_step_interval, and 0 reports at the end only"
    )
    validation_report_stop: bool = Field(
        False, description="end a run that its reports show to go the wrong way, to break, or to get no better"
    )

    # --- behaviour
    strict: bool = Field(False, description="warnings about targets are errors")
    family_options: dict[str, Any] = Field(
        default_factory=dict, description="values of the family's own options, filled from its keys"
    )

    @property
    def has_controlnet(self) -> bool:
        """Whether a ControlNet takes part, trained or frozen."""
        return self.controlnet or self.controlnet_model_name_or_path is not None

    @property
    def report_interval(self) -> int:
        """Optimizer steps between reports; 0 for none but the last one."""
        return self.validation_step_interval if self.validation_report_interval is None else self.validation_report_interval

    @model_validator(mode="before")
    @classmethod
    def _prodigy_s_rate(cls, values: Any) -> Any:
        """Prodigy finds the step size itself, and its learning rate is a factor of it: 1 unless something else is given."""
        if isinstance(values, dict) and values.get("optimizer") == "prodigy":
            return {"learning_rate": 1.0} | values
        return values

    def target_request(self) -> TargetRequest:
        """What a LoRA is to be attached to."""
        return TargetRequest(
            slider=self.slider_lora_target, explicit=self.peft_lora_target_modules, include_joint=self.include_joint
        )
