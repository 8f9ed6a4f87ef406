"""The contract between `slider_plugin` and the plugins that add model families to it.

A family is one module with a `FAMILY` constant and, where the family is special, functions marked with `hookimpl`::

    from slider_hooks import Family, Flow, Targets, hookimpl, one_minus_sigma

    FAMILY = Family(
        name="my_family",
        title="My Family",
        denoiser="transformer",
        denoiser_class="MyTransformer2DModel",
        noise=Flow(sign=-1, time=one_minus_sigma),
        targets=Targets(self_attention=r"blocks\\.\\d+\\.attn\\.(to_q|to_k|to_v|to_out\\.0)", forbidden=r"text_.*"),
    )

    @hookimpl
    def predict(components, noisy, time, conditioning):
        ...

It is found through an entry point of the group `slider_plugin.architectures` whose name is the family's name. Importing this
package needs the standard library and pluggy alone, and a family module should not import torch at its top either: it is
imported to read a configuration, before anything is loaded.
"""

from slider_hooks.errors import UserError
from slider_hooks.markers import ARCHITECTURES, CONTRACT, EXTENSIONS, PROJECT, hookimpl, hookspec
from slider_hooks.types import (
    Ask,
    BucketInfo,
    Components,
    Conditioning,
    Diffusion,
    Draw,
    Family,
    Flavour,
    Flow,
    Layout,
    LoadRequest,
    Objective,
    Option,
    PromptEntry,
    Question,
    ResolvedTargets,
    Sampler,
    TargetRequest,
    Targets,
    one_minus_sigma,
    sigma_as_is,
    thousand_sigma,
)

__all__ = [
    "ARCHITECTURES",
    "CONTRACT",
    "EXTENSIONS",
    "PROJECT",
    "Ask",
    "BucketInfo",
    "Components",
    "Conditioning",
    "Diffusion",
    "Draw",
    "Family",
    "Flavour",
    "Flow",
    "Layout",
    "LoadRequest",
    "Objective",
    "Option",
    "PromptEntry",
    "Question",
    "ResolvedTargets",
    "Sampler",
    "TargetRequest",
    "Targets",
    "UserError",
    "hookimpl",
    "hookspec",
    "one_minus_sigma",
    "sigma_as_is",
    "thousand_sigma",
]
