"""All latents and prompts of a run: encoded once, and dealt out as batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slider_hooks import BucketInfo, Components, Conditioning, Draw, Objective
from slider_plugin.config import RunConfig
from slider_plugin.data.buckets import Bucket, Sample
from slider_plugin.data.cache import Kept, Store
from slider_plugin.data.drawn import ANCHOR, text_infos
from slider_plugin.data.encoders import LATENTS, Encoders, fill_together
from slider_plugin.data.wanted import Drawn, find_wanted
from slider_plugin.training.processes import Part, Processes, Share
from slider_plugin.training.seeds import generator
from slider_plugin.validation.samples import sampling_rate

if TYPE_CHECKING:
    from slider_plugin.family import LoadedFamily

ALL = Share()
"""What one process takes of each draw."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one draw trains on, or a process's share of it."""

    draw: Draw
    clean_BCHW: Tensor
    """Latents, float32 on the device."""

    conditioning: tuple[Conditioning, ...]
    """One per sample, on the device."""

    files: tuple[Path, ...]
    """Of the whole draw."""

    share: Share = ALL
    """What the process takes of each draw."""

    twin_BCHW: Tensor | None = None
    """Of matched pairs the latents of the other side's images."""

    drawn: int = 0
    """Samples of the whole draw where the model draws images of its own, and `clean_BCHW` is zeros; 0 where there are files."""

    @property
    def part(self) -> Part:
        """Which samples of the draw these are."""
        return self.share.of(self.drawn or len(self.files))


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """All latents and prompts of a run, and how a draw becomes a batch."""

    buckets: dict[str, Bucket]
    latents: Mapping[tuple[str, Path], Tensor]
    """By bucket and file, `(C, H, W)` or what the family makes of its media, float32 on the CPU; mapped from the cache."""

    conditions: Mapping[tuple[str, Path], Conditioning]
    """By bucket and file, what the denoiser is told about the image itself, likewise."""

    prompts: Mapping[str, Conditioning]
    """By caption, likewise."""

    fresh_images: int
    """How many of the latents were encoded now; the others were in the cache."""

    fresh_prompts: int

    digest: str
    """Of the files, how they are scaled and cropped, and their captions, wherever they are."""

    seed: int
    batch_size: int
    """Of all processes together."""

    share: Share
    caption_dropout: float
    device: torch.device
    twins: Mapping[str, str] = field(default_factory=dict)
    """Of matched pairs, each bucket's other side."""

    objective: Objective | None = None
    """May tell draws with a sign another prompt than their captions."""

    cycle: int = 1
    """Draws in one cycle."""

    blank_CHW: Tensor | None = None
    """Zeros in the shape of latents, where the model draws images of its own for want of buckets with a strength."""

    def infos(self) -> tuple[BucketInfo, ...]:
        """The buckets as the sampler sees them."""
        infos = tuple(bucket.info(self.batch_size) for bucket in self.buckets.values())
        if self.blank_CHW is None:
            return infos
        return (*text_infos(sum(info.batches for info in infos), self.batch_size), *infos)

    def batch(self, draw: Draw) -> Batch:
        """This process's share of a draw; images and captions are the same for the same draw in any number of processes."""
        source = self._source(draw)
        if source is None:
            return self._drawn(draw)
        samples = self._samples(source)
        mine = self.share.of(len(samples)).places
        captions = self._captions(draw, [s.caption for s in samples])[mine]
        keys = [(source.bucket, s.item.path) for s in samples[mine]]
        told = [{**self.prompts[caption], **self.conditions[key]} for caption, key in zip(captions, keys, strict=True)]
        conditioning = tuple(_to(c, self.device) for c in told)
        files = tuple(s.item.path for s in samples)
        return Batch(draw, self._latents(keys), conditioning, files, self.share, self._twin(source, mine))

    def told(self, conditioning: Sequence[Conditioning], prompt: str) -> list[Conditioning]:
        """The conditioning of samples with another prompt in the place of their own; what is told about images stays."""
        text = _to(self.prompts[prompt], self.device)
        return [{**own, **text} for own in conditioning]

    def _samples(self, source: Draw) -> list[Sample]:
        return self.buckets[source.bucket].batch(source.epoch, source.index, self.seed, self.batch_size)

    def _latents(self, keys: Sequence[tuple[str, Path]]) -> Tensor:
        return torch.stack([self.latents[key] for key in keys]).to(self.device)

    def _twin(self, source: Draw, mine: slice) -> Tensor | None:
        other = self.twins.get(source.bucket)
        if other is None:
            return None
        return self._latents([(other, s.item.path) for s in self._samples(replace(source, bucket=other))[mine]])

    def _source(self, draw: Draw) -> Draw | None:
        """The draw whose images are taken: its own; for an anchor one of the signed buckets in turn; None if there is none."""
        if draw.bucket in self.buckets:
            return draw
        signed = [info for info in self.infos() if info.strength and info.name in self.buckets]
        if draw.bucket != ANCHOR or not signed:
            return None
        rounds, place = divmod(draw.index, len(signed))
        epoch, index = divmod(rounds, signed[place].batches)
        return replace(draw, bucket=signed[place].name, epoch=epoch, index=index)

    def _drawn(self, draw: Draw) -> Batch:
        """A batch whose images the model will draw."""
        assert self.blank_CHW is not None
        part = self.share.of(self.batch_size)
        text = _to(self.prompts[self._captions(draw, [""])[0]], self.device)
        clean_BCHW = self.blank_CHW.expand(part.count, *self.blank_CHW.shape).clone().to(self.device)
        return Batch(draw, clean_BCHW, (text,) * part.count, (), self.share, drawn=self.batch_size)

    def _captions(self, draw: Draw, captions: list[str]) -> list[str]:
        """What the samples of a draw are told."""
        if draw.bucket == ANCHOR:
            anchors = self.objective.anchors if self.objective else ()
            return [anchors[draw.index % len(anchors)]] * len(captions)
        prompt = self.objective.prompt(draw.position // self.cycle) if self.objective and not draw.neutral else None
        return self._with_dropout(draw, captions) if prompt is None else [prompt] * len(captions)

    def _with_dropout(self, draw: Draw, captions: list[str]) -> list[str]:
        if not self.caption_dropout:
            return captions
        lots = torch.rand(len(captions), generator=generator(self.seed, "caption", draw.position)).tolist()
        return ["" if lot < self.caption_dropout else caption for lot, caption in zip(lots, captions, strict=True)]


def encode_once(
    family: LoadedFamily,
    components: Components,
    buckets: Sequence[Bucket],
    config: RunConfig,
    device: torch.device,
    store: Store,
    prepare: Callable[[], object] = lambda: None,
    processes: Processes | None = None,
    objective: Objective | None = None,
    twins: Mapping[str, str] | None = None,
    drawn: Drawn | None = None,
    cycle: int = 1,
) -> Encoded:
    """Encode those images and captions of the buckets that the store does not hold.

    What is encoded in one batch is kept as a whole, so a run that was killed here and starts again goes on with the same
    batches, and ends in the same values. An image that is encoded alone later may differ from them in its last bits.

    Args:
        family: whose hooks `encode_images`, `condition_on_images` and `encode_prompts` are called.
        components: the loaded model.
        buckets: the opened buckets.
        config: the `RunConfig`.
        device: where encoding takes place and batches will go.
        store: where results are kept; what it holds already must have been made by the same model and code.
        prepare: called before the first hook, and not at all where there is nothing to encode.
        processes: those that call this together; each encodes some of the batches, and all read what is on the disk then.
        objective: whose prompts are encoded with the captions.
        twins: of matched pairs, the negative bucket by the positive one.
        drawn: width, height and frames of what the model draws for want of images; None if it draws nothing.
        cycle: draws in one cycle.

    Raises:
        UserError: an image cannot be decoded after all, or an encoder gave values that are not finite.
    """
    captions = {c: None for bucket in buckets for item in bucket.items for c in item.captions}
    if config.caption_dropout_probability or (drawn and config.text_rollout_guidance != 1.0):
        captions[""] = None
    spoken = (*objective.prompts, *objective.anchors) if objective else ()
    rate = _sampling_rate(components, buckets)
    wanted = find_wanted(buckets, (*captions, *spoken), drawn, components, store, rate)
    images, shown, prompts = wanted.images, wanted.shown, wanted.prompts
    encoders = Encoders(family, components, device, config.max_image_pixels, rate)
    processes = processes or Processes()
    fresh = fill_together(store, wanted, encoders, prepare, processes)
    return Encoded(
        buckets={bucket.name: bucket for bucket in buckets},
        latents=Kept(images, lambda name: store.tensor(images[name], LATENTS)),
        conditions=Kept(images, lambda name: _told(store, images[name], shown.get(name))),
        prompts=Kept(prompts, lambda caption: _entry(store, prompts[caption])),
        fresh_images=sum(key in fresh for key in images.values()),
        fresh_prompts=sum(key in fresh for key in prompts.values()),
        digest=wanted.digest,
        seed=config.seed,
        batch_size=config.train_batch_size * processes.count,
        share=processes.share,
        caption_dropout=config.caption_dropout_probability,
        device=device,
        twins={**(twins or {}), **{other: one for one, other in (twins or {}).items()}},
        objective=objective,
        cycle=cycle,
        blank_CHW=next((torch.zeros_like(store.tensor(key, LATENTS)) for key in wanted.blank), None),
    )


def _entry(store: Store, key: str) -> Conditioning:
    return {name: store.tensor(key, name) for name in store.names(key) if name != LATENTS}


def _told(store: Store, image: str, shown: str | None) -> Conditioning:
    """What the denoiser is told about an image, and what its ControlNet is shown."""
    return {**_entry(store, image), **(_entry(store, shown) if shown else {})}


def _sampling_rate(components: Components, buckets: Sequence[Bucket]) -> int:
    sounds = any(bucket.config.dataset_type == "audio" for bucket in buckets)
    return sampling_rate(components.pipeline) if sounds else 0


def _to(conditioning: Conditioning, device: torch.device) -> Conditioning:
    return {name: tensor.to(device) for name, tensor in conditioning.items()}
