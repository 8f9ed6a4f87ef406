"""A `lycoris_config.json`: which algorithm of lycoris-lora, with which sizes, on which modules.

The keys are those of `create_lycoris` and of its presets (lycoris-lora wrapper.py:50-160, config_sdk.py), as SimpleTuner's file
has them. What could never be a slider, whose -s must be the opposite of its +s, is refused here with its reason, as measured in
tests/test_lycoris.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

ALGORITHMS = ("lora", "locon", "loha", "lokr", "full", "glora", "ia3", "diag-oft")
"""Algorithms that mirror."""

UNMIRRORED: Mapping[str, str] = {
    "boft": "BOFT is not linear in its strength",
    "dylora": "DyLoRA draws another rank in each call, also when images are drawn, and its file means another scale (4.1.3)",
    "tlora": "T-LoRA masks its rank by the timestep, which it is not told here",
}

WEIGHT_DECOMPOSED = ("dora_wd", "weight_decompose", "use_dora")
"""Keys that turn an algorithm into a DoRA."""

MIRROR = "a slider must mirror, so that -s is the opposite of +s"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LycorisPreset(_Strict):
    """Which modules are wrapped. lycoris-lora's own meaning, and one more: a `target_module` that is no class is a suffix."""

    target_module: tuple[str, ...] | None = Field(
        None, description="classes, with all layers below them; or endings of module names. None is every Linear, conv and norm"
    )
    target_name: tuple[str, ...] = Field((), description="names of layers, or expressions that match from a name's beginning")
    exclude_name: tuple[str, ...] = Field((), description="names or expressions of what is left out, with all below it")
    use_fnmatch: bool = Field(False, description="names are shell patterns instead of regular expressions")
    enable_conv: bool = Field(True, description="false leaves out every convolution with a kernel")
    module_algo_map: dict[str, dict[str, Any]] = Field(default_factory=dict, description="class to settings of its own")
    name_algo_map: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="name or expression to settings of its own"
    )
    lora_prefix: Literal["lycoris"] = Field("lycoris", description="the beginning of the file's keys")


class LycorisConfig(_Strict):
    """The whole file."""

    algo: str = Field("lora", description=f"one of {', '.join(ALGORITHMS)}")
    multiplier: float = Field(1.0, gt=0, allow_inf_nan=False, description="what every strength is multiplied by")
    linear_dim: int = Field(4, ge=1, description="rank of Linear layers")
    linear_alpha: float = Field(1.0, gt=0, allow_inf_nan=False, description="the output is scaled by alpha / rank")
    conv_dim: int | None = Field(None, ge=1, description="rank of convolutions with a kernel; None is linear_dim")
    conv_alpha: float | None = Field(None, gt=0, allow_inf_nan=False, description="their alpha; None is linear_alpha")
    factor: int = Field(-1, description="LoKr: how weights are factored; -1 is as squarely as possible")
    full_matrix: bool = Field(False, description="LoKr: both factors whole")
    decompose_both: bool = Field(False, description="LoKr: both factors of low rank")
    unbalanced_factorization: bool = Field(False, description="LoKr: the output's factors the other way round")
    use_tucker: bool = Field(False, description="convolutions: Tucker decomposition of the kernel")
    use_scalar: bool = Field(False, description="a trained factor in front of each layer's change")
    bypass_mode: bool | None = Field(None, description="compute the change beside the layer instead of on its weight")
    constraint: float = Field(0.0, ge=0, allow_inf_nan=False, description="Diag-OFT: how far blocks may turn")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the input or the change")
    rank_dropout: float = Field(0.0, ge=0, lt=1, description="of ranks")
    module_dropout: float = Field(0.0, ge=0, lt=1, description="of whole layers")
    apply_preset: LycorisPreset = Field(default_factory=LycorisPreset, description="which modules are wrapped")

    def settings(self) -> dict[str, Any]:
        """The arguments of `create_lycoris` besides model and multiplier."""
        given = self.model_dump(exclude={"apply_preset", "multiplier"})
        return {name: value for name, value in given.items() if value is not None}


def problems_of(written: Mapping[str, Any]) -> Iterator[str]:
    """What in a file could never be a slider; each is `key: why`."""
    yield from _unmirrored(written)
    preset = written.get("apply_preset")
    for key in ("module_algo_map", "name_algo_map"):
        own = preset.get(key) if isinstance(preset, Mapping) else None
        for name, settings in own.items() if isinstance(own, Mapping) else ():
            if isinstance(settings, Mapping):
                yield from (f"apply_preset: {key}: {name}: {problem}" for problem in _unmirrored(settings))


def _unmirrored(settings: Mapping[str, Any]) -> Iterator[str]:
    algo = str(settings.get("algo", "lora")).lower()
    if algo in UNMIRRORED:
        yield f"algo: {algo!r} cannot be used: {MIRROR}, and {UNMIRRORED[algo]}; use lora or lokr"
    elif algo not in ALGORITHMS:
        yield f"algo: lycoris-lora has no algorithm {algo!r}; it is one of {', '.join(ALGORITHMS)}"
    for key in WEIGHT_DECOMPOSED:
        if settings.get(key) in (True, 1, "true", "True"):
            yield f"{key}: it cannot be used: {MIRROR}, and DoRA is not linear in its strength"
    if settings.get("rescaled") in (True, 1, "true", "True"):
        yield "rescaled: it cannot be used: its trained scale stays where the strength is 0; take it out"
    if settings.get("train_norm") in (True, 1, "true", "True"):
        yield "train_norm: norms are no slider targets; take it out"
    if algo == "full" and settings.get("bypass_mode"):
        yield "bypass_mode: algo full has none; take it out"
    if algo == "diag-oft" and settings.get("multiplier") not in (None, 1, 1.0):
        yield "multiplier: Diag-OFT's file cannot hold one; take it out, and raise the strengths"
    if algo == "diag-oft" and settings.get("bypass_mode"):
        yield "bypass_mode: that of Diag-OFT fails in lycoris-lora 4.1; take it out"


SWITCHED_OFF = (*WEIGHT_DECOMPOSED, "rescaled", "train_norm")
"""Keys that are fine as long as they are false, and are then left out."""

DOCUMENTED: Mapping[str, tuple[str, ...]] = {
    "most models": (
        "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
        "conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2",
    ),
    "Kandinsky 5": (
        "attn1.to_query", "attn1.to_key", "attn1.to_value",
        "conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2",
    ),
    "Flux, Chroma, AuraFlow": ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_qkv_mlp_proj"),
    "Flux, Chroma, AuraFlow without attn": ("to_q", "to_k", "to_v", "to_out.0", "to_qkv"),
}  # fmt: skip
"""The presets of the specification. lycoris-lora itself compares `target_module` with class names, so they match nothing."""
