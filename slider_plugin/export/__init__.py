"""A finished adapter as a file: written and read back, in the key names of other programs, with what a header says of it."""

from slider_plugin.export.metadata import slider_metadata
from slider_plugin.export.write import (
    AdapterState,
    ExportError,
    ExportReport,
    export_diffusers,
    fold,
    write_verified,
)

__all__ = [
    "AdapterState",
    "ExportError",
    "ExportReport",
    "export_diffusers",
    "fold",
    "slider_metadata",
    "write_verified",
]
