"""Train a concept slider for any diffusion model: the host that family plugins plug into.

Other trainers use it as a library: `from slider_plugin import load_family, attach_slider, BucketInfo` (see `api.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slider_hooks import BucketInfo, Draw
    from slider_plugin.api import Slider, attach_slider, load_family
    from slider_plugin.errors import UserError
    from slider_plugin.inference import SliderUse, use_sliders

__all__ = ["BucketInfo", "Draw", "Slider", "SliderUse", "UserError", "attach_slider", "load_family", "use_sliders"]

_HOMES = {
    "BucketInfo": "slider_hooks",
    "Draw": "slider_hooks",
    "UserError": "slider_plugin.errors",
    "Slider": "slider_plugin.api",
    "attach_slider": "slider_plugin.api",
    "load_family": "slider_plugin.api",
    "SliderUse": "slider_plugin.inference",
    "use_sliders": "slider_plugin.inference",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: the command line imports this package and must not pay for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
