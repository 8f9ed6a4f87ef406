"""Where the bundled pipelines and buckets lie: inside the installed package, or in `fixtures/` of a checkout."""

from __future__ import annotations

from pathlib import Path

from slider_plugin.errors import UserError

FAMILIES = ("sd1", "z_image")
CONCEPTS = ("size", "brightness", "hue", "position", "elevation")


def fixtures() -> Path:
    """The folder that holds `tiny/` and `buckets/`. Raises UserError if it is not there."""
    here = Path(__file__).resolve()
    for place in (here.parents[1] / "fixtures", here.parents[2] / "fixtures"):
        if (place / "tiny").is_dir() and (place / "buckets").is_dir():
            return place
    raise UserError(
        "the demo's fixtures are not in this installation; reinstall slider-plugin from its wheel or its repository"
    )
