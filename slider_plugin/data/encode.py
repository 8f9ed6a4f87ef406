"""Encode every image and every caption once, and deal them out as batches.

The families' own encoders run here and nowhere in the training step, and only for what is not in the cache yet.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from slider_hooks import BucketInfo, Components, Conditioning, Draw, Objective
from slider_plugin import console
from slider_plugin.config import RunConfig
from slider_plugin.control import SHOWN, encode_for_controlnet
from slider_plugin.data.buckets import Bucket, Item, Sample
from slider_plugin.data.cache import Entry, Kept, Memory, Store
from slider_plugin.data.drawn import ANCHOR, text_infos
from slider_plugin.data.fingerprint import described_controlnet
from slider_plugin.data.media import KINDS
from slider_plugin.errors import UserError
from slider_plugin.loading import image_dtype
from slider_plugin.training.processes import Part, Processes, Share
from slider_plugin.training.seeds import generator
from slider_plugin.validation.samples import sampling_rate

if TYPE_CHECKING:
    from slider_plugin.family import LoadedFamily

T = TypeVar("T")

AT_ONCE = {"image": 8, "video": 1, "audio": 1}
"""Of each kind, how many are encoded in one go."""

PROMPTS_AT_ONCE = 16

ALL = Share()
"""What one process takes of each draw."""

LATENTS = "//latents"
"""Name of the latents in the entry of an image; no family calls what it tells the denoiser so."""


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
    rate = _sampling_rate(components, buckets)
    images = {(b.name, item.path): _image_key(store, b, item, rate) for b in buckets for item in b.items}
    captions = {c: None for bucket in buckets for item in bucket.items for c in item.captions}
    if config.caption_dropout_probability or (drawn and config.text_rollout_guidance != 1.0):
        captions[""] = None
    spoken = (*objective.prompts, *objective.anchors) if objective else ()
    prompts = {caption: _key("prompt", caption) for caption in (*captions, *spoken)}
    blank = {_key("blank", drawn): drawn} if drawn else {}
    shown = _shown_keys(store, components, buckets)

    def missing() -> list[_Chunk]:
        return [
            *_image_chunks(buckets, images, store, "images"),
            *_image_chunks(buckets, shown, store, "conditioning images"),
            *_prompt_chunks(prompts, store),
            *(_Chunk("blank images", None, {key: size}) for key, size in blank.items() if key not in store),
        ]

    work = _Encoders(family, components, device, config.max_image_pixels, rate)
    processes = processes or Processes()
    fresh = _fill_together(store, missing, work, prepare, processes)
    return Encoded(
        buckets={bucket.name: bucket for bucket in buckets},
        latents=Kept(images, lambda name: store.tensor(images[name], LATENTS)),
        conditions=Kept(images, lambda name: _told(store, images[name], shown.get(name))),
        prompts=Kept(prompts, lambda caption: _entry(store, prompts[caption])),
        fresh_images=sum(key in fresh for key in images.values()),
        fresh_prompts=sum(key in fresh for key in prompts.values()),
        digest=_digest(buckets, images, shown),
        seed=config.seed,
        batch_size=config.train_batch_size * processes.count,
        share=processes.share,
        caption_dropout=config.caption_dropout_probability,
        device=device,
        twins={**(twins or {}), **{other: one for one, other in (twins or {}).items()}},
        objective=objective,
        cycle=cycle,
        blank_CHW=next((torch.zeros_like(store.tensor(key, LATENTS)) for key in blank), None),
    )


def _entry(store: Store, key: str) -> Conditioning:
    return {name: store.tensor(key, name) for name in store.names(key) if name != LATENTS}


def _told(store: Store, image: str, shown: str | None) -> Conditioning:
    """What the denoiser is told about an image, and what its ControlNet is shown."""
    return {**_entry(store, image), **(_entry(store, shown) if shown else {})}


# --- What there is to encode, and under which key ---------------------------------------------------------------------


def _key(*facts: object) -> str:
    """What an entry is found by: a hash of all that shapes it, besides the model and the code."""
    text = json.dumps(facts, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()


def _image_key(store: Store, bucket: Bucket, item: Item, rate: int) -> str:
    own = bucket.config
    clip = (own.dataset_type, own.num_frames, own.fps, own.seconds, rate if own.dataset_type == "audio" else 0)
    return _key("image", store.content(item.path), asdict(item.placement), clip)


def _shown_keys(store: Store, components: Components, buckets: Sequence[Bucket]) -> dict[tuple[str, Path], str]:
    """Of the conditioning images of a run with a ControlNet: they have entries of their own."""
    if components.control is None:
        return {}
    seen_by = described_controlnet(components)
    return {
        (b.name, item.path): _key("control", store.content(item.conditioning or item.path), asdict(item.placement), seen_by)
        for b in buckets
        for item in b.items
    }


def _digest(buckets: Sequence[Bucket], *keys: Mapping[tuple[str, Path], str]) -> str:
    """What is trained on: by bucket (whose name the sampler knows), each image's captions and keys: content and crop."""
    return _key([[(item.captions, [found.get((b.name, item.path)) for found in keys]) for item in b.items] for b in buckets])


What = Literal["images", "conditioning images", "captions", "blank images"]
Drawn = tuple[int, int, int]
"""Width, height and frames of images that the model draws."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """What is encoded in one go."""

    what: What
    bucket: Bucket | None
    """Of images; None for captions."""

    members: dict[str, Any]
    """By key, the `Item` or the caption."""


def _image_chunks(
    buckets: Sequence[Bucket], keys: Mapping[tuple[str, Path], str], store: Store, what: What
) -> Iterator[_Chunk]:
    """Images of one bucket and one size together."""
    for bucket in buckets if keys else ():
        for places in bucket.shapes().values():
            keyed = {keys[bucket.name, item.path]: item for item in (bucket.items[i] for i in places)}
            missing = {key: item for key, item in keyed.items() if key not in store}
            yield from (_Chunk(what, bucket, dict(part)) for part in _parts(missing, AT_ONCE[bucket.config.dataset_type]))


def _prompt_chunks(keys: Mapping[str, str], store: Store) -> Iterator[_Chunk]:
    missing = {key: caption for caption, key in keys.items() if key not in store}
    yield from (_Chunk("captions", None, dict(part)) for part in _parts(missing, PROMPTS_AT_ONCE))


def _parts(values: Mapping[str, T], size: int) -> Iterator[Sequence[tuple[str, T]]]:
    pairs = list(values.items())
    return (pairs[i : i + size] for i in range(0, len(pairs), size))


# --- Encoding ---------------------------------------------------------------------------------------------------------


def _fill_together(
    store: Store, missing: Callable[[], list[_Chunk]], work: _Encoders, prepare: Callable[[], object], processes: Processes
) -> set[str]:
    """Encode what is missing, each process its share of the batches; the keys of what was encoded by any of them."""
    everything = missing()
    alone = processes.count == 1 or isinstance(store, Memory)  # memory is not shared: each encodes all
    processes.wait()  # nobody writes before all have looked, or the shares would not fit together
    _fill(store, everything if alone else everything[processes.index :: processes.count], work, prepare)
    processes.wait()
    store.refresh()
    _fill(store, missing(), work, prepare)  # what is damaged by now, or was removed
    return {key for chunk in everything for key in chunk.members}


def _fill(store: Store, chunks: Sequence[_Chunk], work: _Encoders, prepare: Callable[[], object]) -> set[str]:
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
class _Encoders:
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


def _sampling_rate(components: Components, buckets: Sequence[Bucket]) -> int:
    sounds = any(bucket.config.dataset_type == "audio" for bucket in buckets)
    return sampling_rate(components.pipeline) if sounds else 0


def _kept(conditioning: Conditioning) -> Conditioning:
    return {name: tensor.detach().cpu().clone() for name, tensor in conditioning.items()}


def _to(conditioning: Conditioning, device: torch.device) -> Conditioning:
    return {name: tensor.to(device) for name, tensor in conditioning.items()}
