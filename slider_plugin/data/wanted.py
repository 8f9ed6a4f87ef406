"""What a run needs encoded: the key by which each image and each prompt lies in the cache, and the batches it goes there in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from slider_hooks import Components
from slider_plugin.data.buckets import Bucket, Item
from slider_plugin.data.cache import Store
from slider_plugin.data.fingerprint import described_controlnet

T = TypeVar("T")

AT_ONCE = {"image": 8, "video": 1, "audio": 1}
"""Of each kind, how many are encoded in one go."""

PROMPTS_AT_ONCE = 16

What = Literal["images", "conditioning images", "captions", "blank images"]
Drawn = tuple[int, int, int]
"""Width, height and frames of images that the model draws."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What is encoded in one go."""

    what: What
    bucket: Bucket | None
    """Of images; None for captions."""

    members: dict[str, Any]
    """By key, the `Item` or the caption."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The keys of all that a run needs."""

    buckets: Sequence[Bucket]
    images: dict[tuple[str, Path], str]
    """By bucket and file."""

    shown: dict[tuple[str, Path], str]
    """Likewise, of the conditioning images of a run with a ControlNet: they have entries of their own."""

    prompts: dict[str, str]
    """By caption."""

    blank: dict[str, Drawn]
    """By key, the size of what the model draws."""

    def missing(self, store: Store) -> list[Chunk]:
        """What the store does not hold."""
        return [
            *_image_chunks(self.buckets, self.images, store, "images"),
            *_image_chunks(self.buckets, self.shown, store, "conditioning images"),
            *_prompt_chunks(self.prompts, store),
            *(Chunk("blank images", None, {key: size}) for key, size in self.blank.items() if key not in store),
        ]

    @property
    def digest(self) -> str:
        """What is trained on: by bucket (whose name the sampler knows), each image's captions and keys: content and crop."""
        found = (self.images, self.shown)
        return _key([[(i.captions, [keys.get((b.name, i.path)) for keys in found]) for i in b.items] for b in self.buckets])


def find_wanted(
    buckets: Sequence[Bucket], prompts: Iterable[str], drawn: Drawn | None, components: Components, store: Store, rate: int
) -> Wanted:
    """The keys of the buckets' images, of prompts, and of what is drawn; `rate` is that of sound, 0 where there is none."""
    return Wanted(
        buckets=buckets,
        images={(b.name, item.path): _image_key(store, b, item, rate) for b in buckets for item in b.items},
        shown=_shown_keys(store, components, buckets),
        prompts={prompt: _key("prompt", prompt) for prompt in prompts},
        blank={_key("blank", drawn): drawn} if drawn else {},
    )


def _key(*facts: object) -> str:
    """What an entry is found by: a hash of all that shapes it, besides the model and the code."""
    text = json.dumps(facts, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()


def _image_key(store: Store, bucket: Bucket, item: Item, rate: int) -> str:
    own = bucket.config
    clip = (own.dataset_type, own.num_frames, own.fps, own.seconds, rate if own.dataset_type == "audio" else 0)
    return _key("image", store.content(item.path), asdict(item.placement), clip)


def _shown_keys(store: Store, components: Components, buckets: Sequence[Bucket]) -> dict[tuple[str, Path], str]:
    if components.control is None:
        return {}
    seen_by = described_controlnet(components)
    return {
        (b.name, item.path): _key("control", store.content(item.conditioning or item.path), asdict(item.placement), seen_by)
        for b in buckets
        for item in b.items
    }


def _image_chunks(buckets: Sequence[Bucket], keys: Mapping[tuple[str, Path], str], store: Store, what: What) -> Iterator[Chunk]:
    """Images of one bucket and one size together."""
    for bucket in buckets if keys else ():
        for places in bucket.shapes().values():
            keyed = {keys[bucket.name, item.path]: item for item in (bucket.items[i] for i in places)}
            missing = {key: item for key, item in keyed.items() if key not in store}
            yield from (Chunk(what, bucket, dict(part)) for part in _parts(missing, AT_ONCE[bucket.config.dataset_type]))


def _prompt_chunks(keys: Mapping[str, str], store: Store) -> Iterator[Chunk]:
    missing = {key: caption for caption, key in keys.items() if key not in store}
    yield from (Chunk("captions", None, dict(part)) for part in _parts(missing, PROMPTS_AT_ONCE))


def _parts(values: Mapping[str, T], size: int) -> Iterator[Sequence[tuple[str, T]]]:
    pairs = list(values.items())
    return (pairs[i : i + size] for i in range(0, len(pairs), size))
