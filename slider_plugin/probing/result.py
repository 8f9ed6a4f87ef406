"""What a probe found: the stream of tokens that each module of a denoiser sees, what it does, and what follows for a slider."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from slider_hooks import Targets

Stream = Literal["image", "joint", "text", "fixed", "unused"]
"""What a module's input changes its shape with: the image, image and text in one sequence, text alone, neither (time, pooled
text, another modality), or the module was not called."""

Role = Literal["self", "joint", "proj", "io", "time", "cross", "other"]
"""What a module is to a slider. The first five are the kinds of `Targets.by_kind`; `cross` is attention of image tokens to
anything but image tokens; `other` is the rest: feed-forwards, modulation, text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A pipeline folder, measured. Modules are the Linear and convolution layers of the denoiser, by full name."""

    folder: str
    """The folder as it was given."""

    pipeline_class: str
    """Class of the pipeline, in diffusers."""

    denoiser: str
    """The pipeline's component that is denoised with: `unet`, `transformer`, ..."""

    denoiser_class: str
    """Its class: the name in diffusers, or `package.module:Class` for one from elsewhere."""

    streams: Mapping[str, Stream]
    """What each module sees."""

    roles: Mapping[str, Role]
    """What each module is to a slider; the same keys."""

    proposal: Targets
    """Expressions for a family module: `self_attention`, `joint_attention`, `projections`, `io`, `time`, `forbidden`,
    `standard`. They match exactly the modules of these roles here."""

    unsure: Mapping[str, str] = field(default_factory=dict)
    """Modules whose role was not settled by measurement, with the reason; the proposal may be wrong about these, and these
    alone."""

    notes: tuple[str, ...] = ()
    """How it was measured: sizes, and what could not be varied."""

    def targets(self, include_joint: bool = True) -> tuple[str, ...]:
        """The modules that the proposal selects, in the order of the model."""
        wanted = self.proposal.by_kind(include_joint)
        return tuple(name for name, role in self.roles.items() if role in wanted)
