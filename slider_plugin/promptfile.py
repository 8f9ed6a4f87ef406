"""The prompts of a run: its own, those of a prompt library, and the one of `validation_prompt`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from slider_plugin.config import PromptConfig
from slider_plugin.data.captions import with_lyrics
from slider_plugin.known_keys import PROMPT_KEYS
from slider_plugin.settle import Settler
from slider_plugin.wording import kind_of, shown

VALIDATION = "validation"
"""Name of the prompt that `validation_prompt` becomes."""


class Prompts:
    """Reads prompts; what is wrong goes to the problems of a reading."""

    def __init__(self, settler: Settler) -> None:
        self._settler, self._problems = settler, settler.problems

    def of(self, values: dict[str, Any], where: str) -> list[PromptConfig]:
        """All prompts of a configuration; their keys are taken out of `values`."""
        prompts = list(self._inline_prompts(values.pop("prompts", None), where))
        library = values.pop("user_prompt_library", None)
        file = self._settler.file(library, "user_prompt_library", where) if library is not None else None
        prompts += self.library(file) if file else ()
        text = values.get("validation_prompt")
        if isinstance(text, str):
            del values["validation_prompt"]
        if text and isinstance(text, str):
            prompts.append(PromptConfig(name=VALIDATION, prompt=text))
        self._check_names([p.name for p in prompts], where)
        return prompts

    def _check_names(self, names: list[str], where: str) -> None:
        twins = sorted({name for name in names if names.count(name) > 1})
        self._problems.extend([f"{where}: two prompts are named {name!r}; give each its own name" for name in twins])

    def _inline_prompts(self, entries: Any, where: str) -> Iterable[PromptConfig]:
        if entries is None:
            return
        if isinstance(entries, dict):
            yield from self._entries(entries, f"{where}: prompts")
            return
        if not isinstance(entries, list):
            self._problems.append(f"{where}: prompts: it must be an object of names and prompts, not {kind_of(entries)}")
            return
        for number, entry in enumerate(entries, start=1):
            found = (
                self._settler.validated(PromptConfig, entry, f"{where}: prompt {number}") if isinstance(entry, dict) else None
            )
            if found is not None:
                yield found
            elif not isinstance(entry, dict):
                self._problems.append(
                    f"{where}: prompt {number}: it must be an object of name and prompt, not {kind_of(entry)}"
                )

    def library(self, path: Path) -> tuple[PromptConfig, ...]:
        """The entries of a library file; what is wrong goes to `problems`."""
        before = len(self._problems)
        library = self._settler.object(path)
        if len(self._problems) == before and not library:
            self._problems.append(f"{path.name}: it holds no prompt; write a name and a text")
        return self._entries(library, path.name)

    def _entries(self, library: Mapping[str, Any], where: str) -> tuple[PromptConfig, ...]:
        self._check_names([str(name).strip() for name in library], where)
        entries = [self._prompt(str(name), value, where) for name, value in library.items()]
        return tuple(entry for entry in entries if entry is not None)

    def _prompt(self, name: str, value: Any, where: str) -> PromptConfig | None:
        place = f"{where}: prompt {name!r}"
        if not name.strip():
            self._problems.append(f"{where}: a prompt has an empty name; give it one")
            return None
        if isinstance(value, str):
            return PromptConfig(name=name.strip(), prompt=value)
        if not isinstance(value, dict):
            self._problems.append(
                f"{place}: it must be a text, or an object of prompt and adapter_strength, not {kind_of(value)}"
            )
            return None
        if "name" in value:
            self._problems.append(f"{place}: name: take it out; a prompt's name is the key in front of it")
        keys = {k: v for k, v in value.items() if k not in ("name", "lyrics")}
        own = self._settler.settle(keys, PromptConfig, PROMPT_KEYS, place, None)
        if "lyrics" in value:
            own["prompt"] = self._sung(own.get("prompt", ""), value["lyrics"], place)
        prompt: PromptConfig | None = self._settler.validated(PromptConfig, own | {"name": name.strip()}, place)
        return prompt

    def _sung(self, prompt: Any, lyrics: Any, place: str) -> Any:
        if isinstance(lyrics, str) and isinstance(prompt, str):
            return with_lyrics(prompt, lyrics)
        self._problems.append(f"{place}: lyrics: {shown(lyrics)} is not text")
        return prompt
