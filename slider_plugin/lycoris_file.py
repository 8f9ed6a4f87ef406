"""Read lycoris_config.json, or the same inside a configuration."""

from __future__ import annotations

from typing import Any

from slider_plugin.lycoris_config import SWITCHED_OFF, LycorisConfig, LycorisPreset, problems_of
from slider_plugin.settle import Settler
from slider_plugin.wording import kind_of

HINT = ", since lora_type is lycoris: `slider targets FAMILY --lycoris lokr` prints one"


def read_lycoris(settler: Settler, values: dict[str, Any], where: str) -> LycorisConfig | None:
    """The configuration of lycoris-lora, from its file or from the key that holds it; these keys are taken out of `values`.

    What is wrong goes to the problems of the reading.
    """
    source, inline = values.get("lycoris_config"), values.pop("lycoris", None)
    if values.get("lora_type") != "lycoris":
        values.pop("lycoris_config", None)  # SimpleTuner's configurations name one in any case
        return None
    if (source is None) == (inline is None):
        wrong = "is needed" if source is None else "and lycoris are both given; keep one"
        settler.problems.append(f"{where}: lycoris_config {wrong}{HINT if source is None else ''}")
        return None
    written, name = inline, where
    if source is not None:
        file = settler.file(source, "lycoris_config", where)
        written, name = (settler.document(file), file.name) if file else (None, where)
    values.pop("lycoris_config", None)
    if not isinstance(written, dict):
        if written is not None:
            settler.problems.append(f"{name}: it must hold an object of keys and values, not {kind_of(written)}")
        return None
    settler.problems += (f"{name}: {problem}" for problem in problems_of(written))
    own = settler.settle(
        {key: value for key, value in written.items() if key not in SWITCHED_OFF}, LycorisConfig, {}, name, None
    )
    preset = own.get("apply_preset", {})
    if isinstance(preset, dict):
        known = settler.settle(preset, LycorisPreset, {}, f"{name}: apply_preset", None)
        own["apply_preset"] = settler.validated(LycorisPreset, known, f"{name}: apply_preset")
    config: LycorisConfig | None = settler.validated(LycorisConfig, {k: v for k, v in own.items() if v is not None}, name)
    return config
