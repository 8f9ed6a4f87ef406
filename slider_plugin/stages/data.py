"""The data: encoded once, after which what encoded it leaves memory."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Protocol

from slider_hooks import Components
from slider_plugin import console
from slider_plugin.config import RunConfig
from slider_plugin.data.buckets import Bucket
from slider_plugin.data.cache import Cache, Memory, Store, cache_folder
from slider_plugin.data.digests import Digests
from slider_plugin.data.encode import Encoded, encode_once
from slider_plugin.data.fingerprint import Opaque, fingerprint
from slider_plugin.data.pairs import assert_different
from slider_plugin.preflight import Preflight, draws_any
from slider_plugin.training.parking import Parked, move
from slider_plugin.training.processes import Processes, draws_here

if TYPE_CHECKING:
    from accelerate import Accelerator

    from slider_plugin.family import LoadedFamily


class Wanted(Protocol):
    """What is known of the data beforehand: a run's preflight, or a report's."""

    @property
    def model(self) -> str:
        """Folder or hub id."""

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The opened buckets."""


def encode(config: RunConfig, family: LoadedFamily, components: Components, checked: Wanted, machine: Accelerator) -> Encoded:
    """Encode the images and captions that are not in the cache."""
    started = time.perf_counter()
    store, where = _open_store(config, family, components, checked.model, machine)
    prepare = partial(move, components, machine.device)
    told = (checked.objective, checked.twins, checked.drawn, checked.cycle) if isinstance(checked, Preflight) else ()
    processes = Processes(machine)
    data = encode_once(family, components, checked.buckets, config, machine.device, store, prepare, processes, *told)
    assert_different(data.latents, data.buckets, checked.twins if isinstance(checked, Preflight) else {})
    images = _counted("images", len(data.latents), data.fresh_images)
    captions = _counted("captions", len(data.prompts), data.fresh_prompts)
    console.say(f"{images}; {captions}, in {time.perf_counter() - started:.1f} s ({where})")
    return data


def _counted(what: str, total: int, fresh: int) -> str:
    return f"{total} {what}: {total - fresh} from the cache, {fresh} encoded"


def _open_store(
    config: RunConfig, family: LoadedFamily, components: Components, model: str, machine: Accelerator
) -> tuple[Store, str]:
    """Where encodings are kept, and how that is written."""
    folder = cache_folder(config)
    try:
        made_by = fingerprint(family, components, machine.device)
    except Opaque as error:
        console.say(f"nothing is kept in {folder}, since nothing can be told of what encodes: {error}")
        return Memory(), "in memory"
    about = {"family": family.facts.name, "model": model, "plugin": f"{family.distribution} {family.version}"}
    return Cache(folder, made_by, Digests(folder / "digests.json"), about), str(folder)


def park(config: RunConfig, components: Components, machine: Accelerator) -> Parked:
    """Send everything but the denoiser out of memory, until it draws."""
    back = draws_any(config) and draws_here(Processes(machine))
    parked = Parked(components, machine.device, config.output_dir if back else None)
    if parked.names:
        until = "until it draws" if back else "for good"
        console.say(f"{', '.join(parked.names)} ({parked.size / 1e6:,.1f} MB) left memory {until}")
    return parked
