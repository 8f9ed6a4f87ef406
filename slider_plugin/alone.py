"""What some ways to save memory do not go together with: they take a plain LoRA on the denoiser, and nothing beside it."""

from __future__ import annotations

from slider_plugin.config import RunConfig
from slider_plugin.errors import UserError


def assert_alone(config: RunConfig, setting: str, way_out: str, **others: bool) -> None:
    """Raise UserError if a setting meets one that it does not go together with.

    Args:
        config: the run's.
        setting: the key, and its value where that is no switch.
        way_out: what to write instead.
        others: further keys, and whether they are set.
    """
    beside = {
        "lora_type lycoris": config.lycoris is not None,
        "a ControlNet": config.has_controlnet,
        "base_loras": bool(config.base_loras),
        "assistant_lora_path": config.assistant_lora_path is not None and not config.disable_assistant_lora,
        "torch_compile": config.torch_compile != "no",
        **others,
    }
    if found := [name for name, given in beside.items() if given]:
        raise UserError(f"{setting} does not go together with {', '.join(found)} in this version; {way_out}, or take that out")
