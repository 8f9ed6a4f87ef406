"""The stages of `run.py`: each takes what the stages before it made and makes one thing."""

from slider_plugin.stages.card import write_card
from slider_plugin.stages.data import encode, park
from slider_plugin.stages.model import attach, find_targets, load, load_model, open_machine
from slider_plugin.stages.results import check_validation, draw, export, export_best, validate
from slider_plugin.stages.training import build_sampler, build_trainer, run

__all__ = [
    "attach",
    "build_sampler",
    "build_trainer",
    "check_validation",
    "draw",
    "encode",
    "export",
    "export_best",
    "find_targets",
    "load",
    "load_model",
    "open_machine",
    "park",
    "run",
    "validate",
    "write_card",
]
