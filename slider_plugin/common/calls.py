"""Pipelines whose call the host cannot use as it is."""

from __future__ import annotations

from typing import Any


class PipelineCall:
    """A pipeline behind another call, which a subclass states: the host switches its scheduler and progress bars as ever."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    @property
    def vae(self) -> Any:
        return self.pipeline.vae

    @property
    def scheduler(self) -> Any:
        return self.pipeline.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self.pipeline.scheduler = scheduler

    def set_progress_bar_config(self, **config: Any) -> None:
        self.pipeline.set_progress_bar_config(**config)
