"""The hooks in `hooks/README.md`, made from the contract: `python -m slider_plugin.hook_docs` writes them there."""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path

from slider_hooks import specs
from slider_plugin.errors import UserError
from slider_plugin.files import write_atomic

PAGE = Path(__file__).resolve().parents[1] / "hooks" / "README.md"
START = "<!-- hooks: python -m slider_plugin.hook_docs -->\n"
END = "<!-- /hooks -->"


def markdown() -> str:
    """Every hook with its exact arguments, in the order of the contract; those of extensions at the end."""
    return "\n".join(section(hook) for hook in specs.EVERY)


def section(hook: str) -> str:
    """One hook: its signature, when it is called, its arguments, what it returns, an example."""
    function = getattr(specs, hook)
    about, arguments, returns, example = _parts(inspect.cleandoc(function.__doc__ or ""))
    lines = [f"* `{name}`: {text}" for name, text in arguments]
    return (
        f"### {hook}\n\n```python\n{_signature(hook)}\n```\n\n{about}\n\n"
        + "\n".join(lines)
        + f"\n\nReturns: {returns}\n\n```python\n{example}\n```\n"
    )


def _signature(hook: str) -> str:
    signature = inspect.signature(getattr(specs, hook))
    line = f"{hook}{signature}".replace("'", "")
    if len(line) <= 110:
        return line
    arguments = "".join(f"    {parameter},\n".replace("'", "") for parameter in signature.parameters.values())
    return f"{hook}(\n{arguments}) -> {signature.return_annotation}"


def _parts(doc: str) -> tuple[str, list[tuple[str, str]], str, str]:
    """What a spec's docstring says in its four parts: about, arguments, returns, example."""
    about, arguments, returns, example = re.split(r"\n\nArgs:\n|\n\nReturns:\n|\n\nExample::\n\n", doc)
    entries = re.split(r"^(\w+): ", textwrap.dedent(arguments), flags=re.MULTILINE)[1:]
    named = [(name, _flowed(text)) for name, text in zip(entries[::2], entries[1::2], strict=True)]
    return _flowed(about), named, _flowed(returns), textwrap.dedent(example).strip()


def _flowed(text: str) -> str:
    """Wrapped lines as one paragraph."""
    return " ".join(text.split())


def written(page: str) -> str:
    """A page with the hooks between its markers. Raises UserError if the page has no markers."""
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise UserError(f"{PAGE} has no line {START.strip()} with {END} below it; put them where the hooks belong")
    return before + start + markdown() + end + after


def main() -> None:
    """Renew the page. Raises UserError outside a checkout."""
    if not PAGE.is_file():
        raise UserError(f"there is no {PAGE}: run this in a checkout")
    write_atomic(PAGE, written(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
