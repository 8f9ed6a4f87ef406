"""`python -m slider_plugin` is the `slider` command."""

from slider_plugin.cli import main

main()
