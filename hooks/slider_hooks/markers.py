"""The markers of the contract, its version and the names of its entry-point groups."""

import pluggy

PROJECT = "slider_plugin"
"""The pluggy project name; `hookimpl` below carries it, so authors never write it."""

CONTRACT = (1, 0)
"""Version of the contract, (major, minor). A new hook, field or argument is a minor version; a removal is a major one.

A family states the version it was written for in `Family.contract`. The host refuses another major version and warns about
a newer minor one.
"""

ARCHITECTURES = "slider_plugin.architectures"
"""Entry-point group of the families; the entry point's name is the family's name."""

EXTENSIONS = "slider_plugin.extensions"
"""Entry-point group of plugins that serve every family."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
