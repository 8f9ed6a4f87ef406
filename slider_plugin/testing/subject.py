"""A family on its tiny pipeline, with everything that the rules of this kit need at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from slider_hooks import Components, Conditioning, Family, LoadRequest, TargetRequest, UserError
from slider_plugin.family import LoadedFamily
from slider_plugin.targets import TargetPlan, resolve_targets

PROMPTS = ("a red circle", "a photo of a large blue square on the left")


def write_tiny(facts: Family, folder: Path) -> Path:
    """Have a family write its tiny pipeline into `folder`, unless it is there. Raises UserError if it states none."""
    if facts.tiny is None:
        raise UserError(f"family {facts.name} has no tiny pipeline to test on: state FAMILY.tiny, a function that writes one")
    if not folder.exists():
        folder.mkdir(parents=True)
        facts.tiny(folder)
    return folder


@dataclass(slots=True)
class Subject:
    """A freshly loaded tiny model of one family."""

    family: LoadedFamily
    components: Components
    size: int
    """Side of a test image in pixels, or samples of a test sound."""

    folder: Path
    """Of the tiny pipeline."""

    @classmethod
    def load(cls, family: LoadedFamily, folder: Path) -> Subject:
        """Load the tiny pipeline that `Family.tiny` wrote into `folder`, in float32 on the processor."""
        options = {option.name: option.default for option in family.facts.options}
        request = LoadRequest(model=str(folder), dtype=torch.float32, options=options)
        return cls(family, family.load_components(request), family.facts.tiny_size, folder)

    @property
    def denoiser(self) -> torch.nn.Module:
        denoiser: torch.nn.Module = self.components.denoiser
        return denoiser

    def media(self, count: int = 1, wider: int = 1) -> Tensor:
        """Test media in -1..1 as `encode_images` takes them, images in 8 bits; `wider` times as wide, or as long."""
        modalities = self.family.facts.modalities
        generator = torch.Generator().manual_seed(7)
        if "audio" in modalities:
            return torch.rand(count, 2, self.size * wider, generator=generator) * 2 - 1
        frames = (self.family.facts.tiny_frames,) if "video" in modalities else ()
        shape = (count, 3, *frames, self.size, self.size * wider)
        return torch.randint(256, shape, generator=generator) / 127.5 - 1.0

    def first_image(self) -> Image.Image:
        """The first image, or first frame, of `media`."""
        media = self.media()
        first_3HW = ((media[0, :, 0] if media.ndim == 5 else media[0]) + 1.0) * 127.5
        return Image.fromarray(first_3HW.round().to(torch.uint8).permute(1, 2, 0).numpy())

    @torch.no_grad()
    def told(self, latents: Tensor) -> list[Conditioning]:
        """What `condition_on_images` says about media that gave latents of this shape."""
        usual = self.latents().shape
        return list(self.family.condition_on_images(self.components, self.media(len(latents), latents.shape[-1] // usual[-1])))

    @torch.no_grad()
    def latents(self, count: int = 1, wider: int = 1) -> Tensor:
        """Random latents of the shape that `encode_images` gives for `media`."""
        known = self.family.facts.tiny_latents
        if known is not None:
            shape: Sequence[int] = (count, *known[:-1], known[-1] * wider)
        else:
            shape = self.family.encode_images(self.components, self.media(count, wider)).shape
        return torch.randn(shape, generator=torch.Generator().manual_seed(11))

    @torch.no_grad()
    def conditioning(self, prompts: Sequence[str] = PROMPTS[:1]) -> list[Conditioning]:
        """What `encode_prompts` gives."""
        return list(self.family.encode_prompts(self.components, prompts))

    def predict(self, noisy: Tensor, conditioning: Sequence[Conditioning], time: float = 0.5) -> Tensor:
        """One call of the denoiser, half way between image and noise."""
        from slider_plugin.training.noise import noise_process

        process = noise_process(self.family.facts, self.components)
        return self.predict_at(noisy, process.told(process.at(time, len(noisy))), conditioning)

    def predict_at(self, noisy: Tensor, told: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
        """One call of the denoiser at what it is told about the time, `(B,)`."""
        known = [{**text, **image} for text, image in zip(conditioning, self.told(noisy), strict=True)]
        return self.family.predict(self.components, noisy, told, known)

    def targets(self, include_joint: bool = True) -> TargetPlan:
        """The slider targets of the loaded model."""
        return resolve_targets(self.family, self.denoiser, TargetRequest(slider=True, include_joint=include_joint), rank=1)


@contextmanager
def answered_by(denoiser: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Put another `forward` in the denoiser's place, on this object alone."""
    denoiser.forward = forward
    try:
        yield
    finally:
        del denoiser.forward
