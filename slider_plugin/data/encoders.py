"""Encode what is wanted and not in the cache yet.

The families' own encoders run here and nowhere in the training step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slider_hooks import Components, Conditioning
from slider_plugin import console
from slider_plugin.control import SHOWN, encode_for_controlnet
from slider_plugin.data.buckets import Bucket, Item
from slider_plugin.data.cache import Entry, Memory, Store
from slider_plugin.data.media import KINDS
from slider_plugin.data.wanted import Chunk, Drawn, Wanted, What
from slider_plugin.errors import UserError
from slider_plugin.loading import image_dtype
from slider_plugin.training.processes import Processes

if TYPE_CHECKING:
    from slider_plugin.family import LoadedFamily

LATENTS = "//latents"
"""Name of the latents in the entry of an image; no family calls what it tells the denoiser so."""


def fill_together(
    store: Store, wanted: Wanted, work: Encoders, prepare: Callable[[], object], processes: Processes
) -> set[str]:
    """Encode what is missing, each process its share of the batches; the keys of what was encoded by any of them."""
    everything = wanted.missing(store)
    alone = processes.count == 1 or isinstance(store, Memory)  # memory is not shared: each encodes all
    processes.wait()  # nobody writes before all have looked, or the shares would not fit together
    _fill(store, everything if alone else everything[processes.index :: processes.count], work, prepare)
    processes.wait()
    store.refresh()
    _fill(store, wanted.missing(store), work, prepare)  # what is damaged by now, or was removed
    return {key for chunk in everything for key in chunk.members}


def _fill(store: Store, chunks: Sequence[Chunk], work: Encoders, prepare: Callable[[], object]) -> set[str]:
    """Encode what the chunks hold into the store, with a progress bar; the keys of what was encoded.

    Before each chunk the store is asked again: an image may stand in several buckets, and other processes encode, too.
    """
    total, done, fresh = sum(len(chunk.members) for chunk in chunks), 0, set[str]()
    if chunks:
        prepare()
    try:
        with console.ticking("encoding", total) as ticker, torch.no_grad():
            for chunk in chunks:
                store.refresh()
                members = {key: member for key, member in chunk.members.items() if key not in store}
                if members:
                    store.add(work.encoded(chunk.what, chunk.bucket, members))
                fresh.update(members)
                done += len(chunk.members)
                ticker.tick(done, chunk.what)
    finally:
        store.finish()  # also of a run that is interrupted here
    return fresh


@dataclass(frozen=True, slots=True)
class Encoders:
    """The family's hooks, and what they are given."""

    family: LoadedFamily
    components: Components
    device: torch.device
    max_pixels: int
    rate: int
    """Samples of sound per second; 0 where there is none."""

    def encoded(self, what: What, bucket: Bucket | None, members: Mapping[str, Any]) -> dict[str, Entry]:
        """The entries of a chunk."""
        if what == "blank images":
            return self._blank(members)
        if bucket is None:
            return self._prompts(members)
        return self._images(bucket, members) if what == "images" else self._shown(bucket, members)

    def _images(self, bucket: Bucket, items: Mapping[str, Item]) -> dict[str, Entry]:
        """Latents, and what the denoiser is told about each image besides."""
        media_B = self._media(bucket, [(item.path, item) for item in items.values()])
        if "video" in self.family.facts.modalities and media_B.ndim == 4:
            media_B = media_B.unsqueeze(2)  # an image is a video of one frame
        latents_B = self.family.encode_images(self.components, media_B).float().cpu()
        told_B = self.family.condition_on_images(self.components, media_B)
        entries: dict[str, Entry] = {}
        for (key, item), latents, told in zip(items.items(), latents_B, told_B, strict=True):
            if not torch.isfinite(latents).all():
                raise UserError(f"{item.path}: its latents are not finite; try mixed_precision no")
            entries[key] = {LATENTS: latents.clone(), **_kept(told)}
        return entries

    def _shown(self, bucket: Bucket, items: Mapping[str, Item]) -> dict[str, Entry]:
        """What the ControlNet is shown of each conditioning image."""
        media_B = self._media(bucket, [(item.conditioning or item.path, item) for item in items.values()])
        shown_B = encode_for_controlnet(self.family, self.components, media_B)
        return {key: _kept({SHOWN: shown}) for key, shown in zip(items, shown_B, strict=True)}

    def _blank(self, sizes: Mapping[str, Drawn]) -> dict[str, Entry]:
        """Latents of black images, for their shape."""
        entries: dict[str, Entry] = {}
        for key, (width, height, frames) in sizes.items():
            shape = (frames, height, width) if "video" in self.family.facts.modalities else (height, width)
            media_1 = torch.zeros(1, 3, *shape, device=self.device, dtype=image_dtype(self.components))
            if self.family.condition_on_images(self.components, media_1)[0]:
                raise UserError(
                    f"slider_objective: {self.family.facts.name} is told an image beside the prompt, so a text slider needs "
                    "images, too: give a positive and a negative bucket"
                )
            entries[key] = {LATENTS: self.family.encode_images(self.components, media_1)[0].float().cpu().clone()}
        return entries

    def _prompts(self, captions: Mapping[str, str]) -> dict[str, Entry]:
        """What the denoiser is told about each caption."""
        answers = self.family.encode_prompts(self.components, list(captions.values()))
        return {key: _kept(answer) for key, answer in zip(captions, answers, strict=True)}

    def _media(self, bucket: Bucket, files: Sequence[tuple[Path, Item]]) -> Tensor:
        kind = KINDS[bucket.config.dataset_type]
        loaded = [kind.load(path, bucket.config, item.placement, self.max_pixels, self.rate) for path, item in files]
        return torch.stack(loaded).to(self.device, image_dtype(self.components))


def _kept(conditioning: Conditioning) -> Conditioning:
    return {name: tensor.detach().cpu().clone() for name, tensor in conditioning.items()}
