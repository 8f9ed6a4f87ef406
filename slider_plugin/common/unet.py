"""What the UNets of Stable Diffusion 1 and 2, SDXL and Kolors have in common: their modules have the same names."""

from __future__ import annotations

from slider_hooks import Targets

TARGETS = Targets(
    self_attention=r"(.*\.)?attn1\.(to_q|to_k|to_v|to_out\.0)",
    projections=r".*attentions\.\d+\.proj_(in|out)",
    io=r"conv_in|conv_out",
    time=r"time_embedding\.linear_[12]",
    forbidden=r"(.*\.)?attn2\..*|add_embedding\..*|encoder_hid_proj",
    standard=r"(.*\.)?attn[12]\.(to_q|to_k|to_v|to_out\.0)",
    controlnet=r"(.*\.)?attn1\.(to_q|to_k|to_v|to_out\.0)|.*attentions\.\d+\.proj_(in|out)|conv_in|time_embedding\.linear_[12]",
)
"""Slider targets of a `UNet2DConditionModel` whose `attn1` is self-attention and `attn2` attends to text.

In some upscalers `only_cross_attention` makes attn1 attend to text as well: a family states in `expects` that it does not.
"""
