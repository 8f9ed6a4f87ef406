"""The largest cycle of a run, without values: what `memory` runs a training step on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slider_hooks import Components, Conditioning, Draw
from slider_plugin.config import RunConfig
from slider_plugin.data.buckets import Bucket, Item
from slider_plugin.data.drawn import ANCHOR, TEXT
from slider_plugin.data.encode import ALL, Batch, Encoded
from slider_plugin.data.media import KINDS
from slider_plugin.loading import image_dtype
from slider_plugin.preflight import Preflight
from slider_plugin.validation.samples import sampling_rate

if TYPE_CHECKING:
    from slider_plugin.family import LoadedFamily


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """One image and the longest caption of each sign, encoded by the family's own hooks."""

    config: RunConfig
    family: LoadedFamily
    components: Components
    checked: Preflight
    device: torch.device

    def data(self) -> Encoded:
        """What a run has encoded, but for images: the objective's prompts, and the latents of what the model draws."""
        objective = self.checked.objective
        texts = dict.fromkeys((*objective.prompts, *objective.anchors, *([""] if self.checked.drawn else [])))
        return Encoded(
            buckets={},
            latents={},
            conditions={},
            prompts={text: self.family.encode_prompts(self.components, [text])[0] for text in texts},
            fresh_images=0,
            fresh_prompts=0,
            digest="",
            seed=self.config.seed,
            batch_size=self.config.train_batch_size,
            share=ALL,
            caption_dropout=0.0,
            device=self.device,
            objective=objective,
            cycle=self.checked.cycle,
            blank_CHW=self._blank(),
        )

    def cycle(self, data: Encoded) -> list[Batch]:
        """For each sign a full batch of its largest images, or of what the model draws; and of the longest anchor."""
        batches = [self._batch(bucket, item, place) for place, (bucket, item) in enumerate(self._largest_images())]
        if self.checked.drawn:
            for scale, name in TEXT.items():
                batches.append(data.batch(_draw(name, scale, len(batches))))
        if anchors := self.checked.objective.anchors:
            longest = max(anchors, key=len)
            draw = _draw(ANCHOR, self.checked.neutral_scale, len(batches), neutral=True)
            batches.append(replace(batches[0], draw=draw, conditioning=_told(data, batches[0], longest)))
        return [self._in_turn(data, batch) for batch in batches]

    def _in_turn(self, data: Encoded, batch: Batch) -> Batch:
        """In the cycle whose prompts ask most."""
        sets = self.config.slider_text
        turn = max(range(len(sets)), key=lambda i: (len(sets[i].attributes), len(sets[i].positive)), default=0)
        prompt = None if batch.draw.neutral else self.checked.objective.prompt(turn)
        draw = replace(batch.draw, position=turn * self.checked.cycle + batch.draw.position)
        return replace(batch, draw=draw, conditioning=batch.conditioning if prompt is None else _told(data, batch, prompt))

    def _blank(self) -> Tensor | None:
        if self.checked.drawn is None:
            return None
        width, height, frames = self.checked.drawn
        shape = (frames, height, width) if "video" in self.family.facts.modalities else (height, width)
        media_1 = torch.zeros(1, 3, *shape, dtype=image_dtype(self.components))
        return self.family.encode_images(self.components, media_1)[0].float()

    def _largest_images(self) -> Sequence[tuple[Bucket, Item]]:
        """Of each sign that there is."""
        largest: dict[float, tuple[int, Bucket, Item]] = {}
        for bucket in self.checked.buckets:
            sign = (bucket.strength or 0.0) and (1.0 if (bucket.strength or 0.0) > 0 else -1.0)
            for item in bucket.items:
                width, height = item.placement.target
                size = width * height * (bucket.config.num_frames or 1)
                if sign not in largest or size > largest[sign][0]:
                    largest[sign] = (size, bucket, item)
        return [(bucket, item) for _, bucket, item in largest.values()]

    def _batch(self, bucket: Bucket, item: Item, position: int) -> Batch:
        """A full batch of one image with its bucket's longest caption."""
        config, family, components = self.config, self.family, self.components
        kind = KINDS[bucket.config.dataset_type]
        rate = sampling_rate(components.pipeline) if bucket.config.dataset_type == "audio" else 0
        media = kind.load(item.path, bucket.config, item.placement, config.max_image_pixels, rate)
        media_B = torch.stack([media] * config.train_batch_size).to(image_dtype(components))
        if "video" in family.facts.modalities and media_B.ndim == 4:
            media_B = media_B.unsqueeze(2)
        clean_BCHW = family.encode_images(components, media_B).float().to(self.device)
        caption = max((caption for one in bucket.items for caption in one.captions), key=len)
        texts = family.encode_prompts(components, [caption] * config.train_batch_size)
        told = family.condition_on_images(components, media_B)
        conditioning = [{**text, **image} for text, image in zip(texts, told, strict=True)]
        paired = bucket.strength and self.checked.objective.data == "pairs"
        return Batch(
            _draw(bucket.name, bucket.strength or self.checked.neutral_scale, position, neutral=not bucket.strength),
            clean_BCHW,
            tuple({name: value.to(self.device) for name, value in one.items()} for one in conditioning),
            (item.path,) * config.train_batch_size,
            twin_BCHW=torch.empty_like(clean_BCHW) if paired else None,
        )


def _told(data: Encoded, batch: Batch, prompt: str) -> tuple[Conditioning, ...]:
    return tuple(data.told(batch.conditioning, prompt))


def _draw(bucket: str, scale: float, position: int, neutral: bool = False) -> Draw:
    return Draw(position=position, epoch=0, bucket=bucket, index=0, scale=scale, neutral=neutral)
