"""What the cache costs and saves: cold and warm start with 100, 1,000 and 10,000 images, and reading batches.

    python -m tests.benchmarks.cache
    python -m tests.benchmarks.cache --counts 100 --json

A tiny Stable Diffusion encodes images of 32 pixels, so that the cache's own part shows. `batch` is a batch of four, its latents
and embeddings: out of memory, and out of the cache when it has been read before. `--layouts` compares one file for each image
with shards of several.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save

from slider_hooks import Draw
from slider_plugin.config import BucketConfig, RunConfig
from slider_plugin.data.buckets import Bucket, open_buckets
from slider_plugin.data.cache import Cache, Memory, Store
from slider_plugin.data.digests import Digests
from slider_plugin.data.encode import Encoded, encode_once
from slider_plugin.data.fingerprint import fingerprint
from slider_plugin.files import write_atomic
from slider_plugin.registry import Plugins
from slider_plugin.testing.subject import Subject, write_tiny

CPU = torch.device("cpu")
SIDE, BATCH = 32, 4


def draw_images(folder: Path, count: int) -> Path:
    """Images of noise, with eight different captions."""
    folder.mkdir()
    numbers = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(numbers.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a photo of noise number {i % 8}\n")
    return folder


def disk(folder: Path) -> int:
    """Bytes that the files below a folder take on the disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    answer = work()
    return time.perf_counter() - started, answer


def microseconds(data: Encoded, repeats: int) -> float:
    """Median over the batches of an epoch, after one has been read."""
    (bucket,) = data.buckets.values()
    draws = [
        Draw(position=i, epoch=0, bucket=bucket.name, index=i, scale=1.0, neutral=False)
        for i in range(min(repeats, bucket.info(BATCH).batches))
    ]
    for draw in draws:
        data.batch(draw)
    return statistics.median(seconds(lambda draw=draw: data.batch(draw))[0] for draw in draws) * 1e6


def measure(count: int, subject: Subject, folder: Path) -> dict[str, Any]:
    """One row: a cold start, two warm ones (the first reads the images' content again if they are brand new), batches."""
    images = draw_images(folder / "images", count)
    made = RunConfig(
        model_family="sd1", resolution=SIDE, train_batch_size=BATCH, output_dir=folder / "out",
        buckets=(BucketConfig(id="all", instance_data_dir=images, slider_strength=1.0, resolution=SIDE),),
    )  # fmt: skip
    scanning, opened = seconds(lambda: open_buckets(made, 8))
    place = folder / "cache"

    def start(store: Callable[[], Store]) -> tuple[float, Encoded]:
        buckets: tuple[Bucket, ...] = opened.buckets
        return seconds(lambda: encode_once(subject.family, subject.components, buckets, made, CPU, store()))

    def cache() -> Cache:
        return Cache(place, fingerprint(subject.family, subject.components, CPU), Digests(place / "digests.json"))

    uncached, kept = start(Memory)
    cold, _ = start(cache)
    warm, data = min((start(cache) for _ in range(3)), key=lambda pair: pair[0])
    assert data.fresh_images == 0 and all(torch.equal(kept.latents[key], data.latents[key]) for key in kept.latents)
    return {
        "images": count,
        "scan, s": round(scanning, 2),
        "uncached, s": round(uncached, 2),
        "cold, s": round(cold, 2),
        "cold, images/s": round(count / cold),
        "warm, s": round(warm, 3),
        "warm, us/image": round(warm / count * 1e6, 1),
        "latents, MB": round(sum(z.nbytes for z in kept.latents.values()) / 1e6, 1),
        "disk, MB": round(disk(place) / 1e6, 1),
        "shards": len(list(place.glob("*/*.safetensors"))),
        "batch memory, us": round(microseconds(kept, 500), 1),
        "batch cache, us": round(microseconds(data, 500), 1),
        "peak, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000,
    }


def layout(count: int, together: int, folder: Path) -> dict[str, Any]:
    """Latents of 4 KiB, so many to a file: written flushed and renamed, opened, and each read."""
    latents = [torch.randn(16, 8, 8) for _ in range(count)]
    folder.mkdir()

    def write() -> None:
        for first in range(0, count, together):
            tensors = {f"{k:040x}/latents": latents[k] for k in range(first, min(count, first + together))}
            write_atomic(folder / f"{first}.safetensors", save(tensors, {"entries": " ".join(tensors)}))

    writing, _ = seconds(write)
    opening, files = seconds(lambda: [(file, file.keys()) for file in (safe_open(p, "pt") for p in sorted(folder.iterdir()))])
    reading, _ = seconds(lambda: [file.get_tensor(key) for file, keys in files for key in keys])
    return {
        "latents in a file": together,
        "files": len(files),
        "write, s": round(writing, 2),
        "open all, ms": round(opening * 1e3, 1),
        "read, us each": round(reading / count * 1e6, 1),
        "disk, MB": round(disk(folder) / 1e6, 1),
    }


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", nargs="*", type=int, default=[100, 1000, 10_000], help="numbers of images")
    parser.add_argument("--layouts", action="store_true", help="one file for each image, or several in one")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    given = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        if given.layouts:
            rows += [layout(max(given.counts), together, root / str(together)) for together in (1, 8, 64, 512)]
        else:
            family = Plugins.discover().load("sd1")
            subject = Subject.load(family, write_tiny(family.facts, root / "model"))
            for count in given.counts:
                (root / str(count)).mkdir()
                rows.append(measure(count, subject, root / str(count)))
    if not given.json:
        for row in rows:
            print("  ".join(f"{name} {value}" for name, value in row.items()))
    print(json.dumps(rows))
    return rows


if __name__ == "__main__":
    main()
