"""The words of the contract: what a family states, what a hook is asked, what it answers.

Shapes: B batch, C channels, H and W latent (or pixel) rows and columns, T text tokens, D features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

Conditioning = Mapping[str, "Tensor"]
"""What the denoiser wants to know about one prompt: named tensors **without** a batch dimension, so that prompts of
different lengths can be stored one by one. `predict` receives one per sample and brings them together. A sequence has its
token axis first, `(T, ...)`, and so has its mask, `(T,)`."""


# --- Facts that a family states --------------------------------------------------------------------------------------


def sigma_as_is(sigma: Tensor) -> Tensor:
    """The denoiser is told sigma, 0 (image) to 1 (noise)."""
    return sigma


def one_minus_sigma(sigma: Tensor) -> Tensor:
    """The denoiser is told 1 - sigma: 0 is noise, 1 is the image (Z-Image, Lumina 2)."""
    return 1.0 - sigma


def thousand_sigma(sigma: Tensor) -> Tensor:
    """The denoiser is told sigma on the scale 0..1000 of its scheduler's timesteps."""
    return sigma * 1000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """Flow matching: `x_sigma = (1 - sigma) * x0 + sigma * noise`, velocity `noise - x0` (arXiv 2210.02747, 2403.03206)."""

    sign: Literal[1, -1] = 1
    """What `predict`'s output is multiplied by to be the velocity `noise - x0`; -1 where the model's output is negated."""

    time: Callable[[Tensor], Tensor] = thousand_sigma
    """From sigma `(B,)` in 0..1 to what the denoiser is told, `(B,)`."""

    shift: float | None = None
    """Timestep shift while training, `s*u / (1 + (s-1)*u)`; None takes `shift` of the loaded scheduler, or 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diffusion:
    """Discrete-time diffusion over the loaded scheduler's `alphas_cumprod` (arXiv 2006.11239)."""

    prediction: Literal["epsilon", "v_prediction"] | None = None
    """What the denoiser predicts; None reads `prediction_type` of the loaded scheduler."""

    sign: Literal[1, -1] = 1
    """What `predict`'s output is multiplied by to be this prediction; -1 where the model's output is negated (Cosmos 1)."""

    alpha_bar: Callable[[Tensor], Tensor] | None = None
    """For a denoiser in continuous time: from r `(B,)`, 0 (image) to 1 (noise), to the cumulative alpha `(B,)` in 0..1. r is
    drawn evenly. None takes the scheduler's table, and the denoiser is told the integer step."""

    time: Callable[[Tensor], Tensor] | None = None
    """With `alpha_bar`: from r `(B,)` to what the denoiser is told, `(B,)`, which rises with r; None tells it r."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Where adapters attach: regular expressions over full module names, always matched as a whole (`re.fullmatch`).

    A slider trains visual self-attention, the in and out projections and convolutions, and the time embedding, and leaves
    cross-attention and everything that sees text alone untouched.
    """

    self_attention: str = ""
    """Attention of image tokens among themselves."""

    joint_attention: str = ""
    """Attention in which one weight multiplies text and image tokens; left out when `include_joint` is off."""

    projections: str = ""
    """Projections into and out of the attention blocks."""

    io: str = ""
    """First and last layer of the denoiser."""

    time: str = ""
    """Time embedding."""

    forbidden: str = ""
    """Cross-attention and text-only modules: a slider target that matches one of these is an error."""

    standard: str = ""
    """Standard LoRA targets, which are the fallback where no slider target matches."""

    documented: tuple[str, ...] = ()
    """The suffix list that the specification documents for this family, for reports; empty where it is the general one."""

    weight_read: str = ""
    """Modules whose weight the forward pass reads besides calling them. LyCORIS `full` takes the weight out of its layer, and
    leaves these alone."""

    controlnet: str = ""
    """Slider targets of the family's ControlNet, where it has one (`Family.controlnet_class`). What it shares with the
    denoiser is left out."""

    def by_kind(self, include_joint: bool = True) -> dict[str, str]:
        """The slider expressions that are stated, by kind: self, joint, proj, io, time."""
        kinds = {
            "self": self.self_attention,
            "joint": self.joint_attention if include_joint else "",
            "proj": self.projections,
            "io": self.io,
            "time": self.time,
        }
        return {kind: expression for kind, expression in kinds.items() if expression}

    def slider(self, include_joint: bool = True) -> str:
        """All slider expressions as one; "" if the family states none."""
        return "|".join(f"(?:{expression})" for expression in self.by_kind(include_joint).values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Key names under which another program reads a LoRA of this family.

    State only what was held against the program itself or its table of names: a file that is read by half is a weak slider.
    """

    prefix: str
    """What every key begins with, such as `lora_unet_` or `diffusion_model.`."""

    flat: bool = False
    """The format of kohya: dots of module names become underscores, factors are `lora_down` and `lora_up`, and each module has
    an `alpha`. Otherwise names keep their dots, factors are `lora_A` and `lora_B`, and alpha is the rank."""

    names: tuple[tuple[str, str], ...] = ((r".+", r"\g<0>"),)
    """From module names here to those there: expression and replacement, matched as a whole; the first that matches counts. A
    module that none matches has no name there."""

    left_out: str = ""
    """Modules that the program's readers cannot take, as an expression."""

    programs: str = ""
    """Who reads it, for people."""

    reads_diffusers: bool = False
    """The program reads the diffusers file as well, so that `slider train` need not write a second one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A configuration key of one family alone; the command line, the configuration file and the page read it."""

    name: str
    """The key, in lower case with underscores; begin it with the family's name."""

    type: type[bool] | type[int] | type[float] | type[str]
    """What its values are."""

    default: bool | int | float | str | None
    """The value where the key is not given."""

    help: str
    """One line for people."""

    choices: tuple[Any, ...] = ()
    """The values that are allowed; empty for any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flavour:
    """One published version of a family."""

    model: str | None = None
    """Hub id of its pipeline: the default of `pretrained_model_name_or_path`. None where no source names one."""

    source: str = ""
    """Where the hub id is published."""

    reference: Mapping[str, Any] = field(default_factory=dict)
    """What differs from `Family.reference`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The facts about a model family. Everything that is not a fact is a hook with a default."""

    name: str
    """The family's name, equal to that of its entry point: lower case, digits and underscores."""

    title: str
    """The name that people use."""

    denoiser: str
    """Name of the pipeline component that is trained: `unet`, `transformer`, ... Also the prefix of keys in exported files."""

    denoiser_class: str
    """Class of the denoiser: the diffusers name, as in the `_class_name` of its config.json, or `package.module:Class`."""

    reference: Mapping[str, Any] = field(default_factory=dict)
    """The published configuration of the denoiser, as arguments of its class: `slider targets` builds it without memory."""

    noise: Flow | Diffusion
    """The noise process with its sign and time conventions."""

    targets: Targets = field(default_factory=Targets)
    """Where adapters attach."""

    pipeline_class: str = ""
    """Class name of the diffusers pipeline that loads and draws; "" takes the one that the folder names."""

    load_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Extra keyword arguments of the pipeline's `from_pretrained`."""

    controlnet_class: str = ""
    """Class of the family's ControlNet: the diffusers name, or `package.module:Class`; "" for none."""

    call_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Extra keyword arguments of the pipeline's call when it draws."""

    expects: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Denoiser configuration keys and the values this family can train; any other value is reported as a wrong model. With
    `_class_name`, the names under which the class was published, where there are several."""

    modalities: tuple[Literal["image", "video", "audio"], ...] = ("image",)
    """What it makes. With `video` among them `encode_images` gets frames, with `audio` a waveform."""

    guidance_scale: float = 5.0
    """Default `guidance_scale` of validation."""

    flavours: Mapping[str, Flavour] = field(default_factory=dict)
    """Published versions by name (`model_flavour`)."""

    default_flavour: str | None = None
    """The flavour that is meant if none is named."""

    options: tuple[Option, ...] = ()
    """Configuration keys of this family alone."""

    aliases: tuple[str, ...] = ()
    """Other spellings of the name that a configuration may use."""

    layouts: Mapping[Literal["kohya", "comfyui"], Layout] = field(default_factory=dict)
    """Key names for other programs, by what `slider export --to` says. Without any, a slider is offered for diffusers (and for
    lycoris-lora, which takes diffusers' names), and nothing is promised about other programs."""

    file_metadata: Mapping[str, str] = field(default_factory=dict)
    """More strings for the header of a slider's file, by which other programs tell the model (`ss_base_model_version`,
    `modelspec.architecture`)."""

    tiny: Callable[[Path], None] | None = None
    """Write a tiny random pipeline folder, built from configs with real classes, for tests."""

    tiny_size: int = 32
    """Side in pixels of the images that the tiny pipeline works on, or length in samples of its sounds."""

    tiny_frames: int = 5
    """Frames of the videos that the tiny pipeline works on: one, and one more group of four, as most autoencoders count."""

    tiny_latents: tuple[int, ...] | None = None
    """Shape `(C, h, w)` of the latents in tests, where `encode_images` cannot work in this version; None where it can."""

    limits: str = ""
    """One line on what this family cannot do in this version, for lists and tables; "" where it can do all."""

    contract: tuple[int, int] = (1, 0)
    """The version of the contract that this module was written for; whoever needs more than 1.0 states it."""


# --- What hooks are asked, and what they answer -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """Which model to load, and how."""

    model: str
    """Folder of a diffusers pipeline, or a hub id."""

    dtype: Any
    """`torch.dtype` of the frozen weights."""

    revision: str | None = None
    """Revision of a hub id."""

    variant: str | None = None
    """Variant of the weight files, such as `fp16`."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Values of the family's own options; the host fills in their defaults."""


@dataclass(slots=True, kw_only=True)
class Components:
    """A loaded model. Mutable: the host moves its parts, and keeps in memory what training needs."""

    denoiser: Any
    """What is trained: a `torch.nn.Module` (Any, since one of diffusers also has a `config`), frozen and in evaluation mode;
    adapters are injected into it in place."""

    pipeline: Any
    """The diffusers pipeline (or an object with its call) around the same denoiser. The host calls its `to(device)` where it
    has one, and the default `encode_images` and `encode_prompts` use its `vae` and its `encode_prompt`."""

    scheduler: Any
    """The scheduler that the model was published with. None will do for a flow family that states `Flow.shift`."""

    prediction: Literal["epsilon", "v_prediction", "flow"]
    """What the denoiser predicts, read from the loaded files."""

    time_range: tuple[float, float] = (0.0, 1.0)
    """The part of the noise that this denoiser answers for, in sigma (flow) or as a share of the time steps: some models
    have one denoiser for strong noise and another for weak (Wan 2.2)."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Values of the family's own options."""

    controlnet: Any = None
    """The ControlNet, where the run has one; set by the host with what `load_controlnet` gave."""

    control: Any = None
    """The host's own: what shows the ControlNet its images."""

    extras: dict[str, Any] = field(default_factory=dict)
    """Anything a family wants to keep. While the denoiser trains, the pipeline's other models are out of memory; a part of it
    that `predict` needs, besides settings, belongs here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRequest:
    """What the user wants adapters attached to."""

    slider: bool
    """`slider_lora_target`: slider targets instead of the standard ones."""

    explicit: tuple[str, ...] | str | None = None
    """The user's own targets, which always win: a list is matched by suffix as PEFT does, a string as a whole name."""

    adapter: str = "lora"
    """Adapter kind."""

    include_joint: bool = True
    """Whether modules that see text and image tokens together may be matched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedTargets:
    """The answer of `resolve_lora_targets`."""

    expression: str
    """One regular expression over full module names, matched as a whole."""

    source: Literal["slider", "documented", "explicit", "standard"]
    """Where it comes from: the family's verified expression, the documented list, the user, the standard LoRA targets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketInfo:
    """One dataset entry, as the sampler sees it."""

    name: str
    """Its id; unique."""

    strength: float | None
    """`slider_strength`; None or 0 is neutral."""

    batches: int
    """Batches in one epoch, at least 1."""

    samples: int
    """Images in one epoch, repeats included."""

    probability: float = 1.0
    """Weight inside its group, at least 0; at 0 it is drawn only if nothing else in its group can be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One step of the cycle: which bucket, which of its batches, and the scale that the adapter runs at."""

    position: int
    """How many draws came before this one since the start of the run."""

    epoch: int
    """Counted from 0."""

    bucket: str
    """The bucket's name."""

    index: int
    """Which batch of the bucket in this epoch, 0 to `BucketInfo.batches - 1`."""

    scale: float
    """What the adapter is multiplied by: the bucket's strength, or plus and minus `neutral_scale` in turn."""

    neutral: bool
    """Whether the frozen model's prediction is to be preserved here instead of learning the images."""


# --- What a slider learns from ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a denoiser is asked in one forward, one row for each sample."""

    noisy: Tensor
    """`(B, C, H, W)`, as `predict` gets it."""

    time: Tensor
    """`(B,)`, in the unit of the noise process."""

    conditioning: Sequence[Conditioning]
    """One for each sample, on the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One draw with its noise: what the adapter is asked, and all that its answer may be compared with."""

    draw: Draw
    """Its bucket, and the sign and size of its whole strength in `scale`."""

    turn: int
    """Which cycle of the run it belongs to; all draws of a cycle share noise and time."""

    ask: Ask
    """What the denoiser with the adapter is asked, at the scale `strength * draw.scale`."""

    clean: Tensor
    """The latents of the images `(B, C, H, W)`, float32; zeros where there are none."""

    noise: Tensor
    """Standard normal, the same for all draws of a cycle."""

    twin: Tensor | None
    """Of matched pairs the latents of the other side's images, in the same order."""

    strength: float
    """The share of `draw.scale` that the adapter runs at, which `random_strength` draws; else 1."""

    add_noise: Callable[[Tensor, Tensor], Tensor]
    """From clean latents and noise to noisy latents, at the times of `ask`."""

    truth: Callable[[Tensor, Tensor], Tensor]
    """From clean latents and noise to the answer that is right for them, at the times of `ask`; linear in both."""

    told: Callable[[str], Sequence[Conditioning]]
    """The conditioning of `ask` with another prompt, one of `Objective.prompts`, in the place of its own."""


class Objective(ABC):
    """What the adapter learns from. The host draws, noises, keeps neutral images as they are, weighs times and trains; an
    objective says for a draw with a sign which answer is right. All answers are in the convention of the noise process, and
    `f_s` is the denoiser with the adapter at scale s.
    """

    data: Literal["buckets", "pairs", "optional"] = "buckets"
    """Which images it needs: buckets with a strength; pairs of them matched by file name; none."""

    prompts: tuple[str, ...] = ()
    """All texts that it asks about, besides captions; the host encodes them."""

    anchors: tuple[str, ...] = ()
    """Prompts for which nothing may change: `f_s` is kept at `f_0`, in draws of their own."""

    def prompt(self, turn: int) -> str | None:
        """What the denoiser is told in the draws with a sign of a cycle, one of `prompts`; None for the images' captions."""
        return None

    def asks(self, question: Question) -> Sequence[Ask]:
        """What the frozen model `f_0` is asked for a draw; all is answered in one forward without gradient."""
        return ()

    @abstractmethod
    def target(self, question: Question, frozen: Sequence[Tensor]) -> Tensor:
        """The right answer `(B, C, H, W)` at the whole strength, `draw.scale`.

        At the share u of it the host takes `f_0 + u (target - f_0)`.

        Args:
            question: the draw.
            frozen: the answers of `f_0` to `asks`.
        """

    def weight(self, question: Question) -> Tensor | None:
        """What the squared error is weighed by, `(B, 1, H, W)` or whatever broadcasts; None weighs all alike."""
        return None


@runtime_checkable
class Sampler(Protocol):
    """An endless, deterministic sequence of draws whose position can be saved."""

    def __iter__(self) -> Iterator[Draw]: ...

    def __next__(self) -> Draw: ...

    def state_dict(self) -> dict[str, Any]:
        """The position, as something JSON can hold."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved position. Raises ValueError if the state belongs to other buckets."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEntry:
    """One entry of the prompt library."""

    name: str
    """Its key."""

    prompt: str
    """The text."""

    adapter_strength: float | None = None
    """Its own strength; None takes the global one."""
