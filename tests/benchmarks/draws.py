"""What a draw of the sampler costs, and its memory, by the number of buckets.

python -m tests.benchmarks.draws
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
from collections.abc import Sequence

from slider_hooks import BucketInfo
from slider_plugin.data.sampler import CycleSampler

from .timing import Row, show

COUNTS = (10, 1000, 100_000)


def measure(count: int, draws: int = 2000, repeats: int = 9) -> Row:
    """Medians over blocks of draws; epochs that begin in between are part of it."""
    tracemalloc.start()
    sampler = CycleSampler(
        [
            BucketInfo(name=f"bucket-{i}", strength=(1.0, -1.0, 0.0)[i % 3], batches=4, samples=4, probability=1.0 + i % 7)
            for i in range(count)
        ],
        seed=0,
    )
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    blocks = []
    for _ in range(repeats):
        started = time.process_time()
        for _ in range(draws):
            next(sampler)
        blocks.append((time.process_time() - started) / draws * 1e6)
    return {
        "buckets": f"{count:,}",
        "a draw, us": round(statistics.median(blocks), 1),
        "least, most": f"{min(blocks):.1f}, {max(blocks):.1f}",
        "memory with buckets, MB": round(size / 1e6, 1),
        "peak, MB": round(peak / 1e6, 1),
    }


def rows(counts: Sequence[int] = COUNTS, draws: int = 2000) -> list[Row]:
    return [measure(count, draws) for count in counts]


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", nargs="*", type=int, default=list(COUNTS), help="numbers of buckets")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    found = rows(given.counts)
    show(found, given.json)
    return found


if __name__ == "__main__":
    main()
