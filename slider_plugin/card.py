"""The model card of a finished run: README.md beside the slider, with what it is, how it is used and how it was trained.

All that a user wrote is escaped: it is text, and no markup, link or code, whatever is in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from slider_hooks import Family
from slider_plugin.export.layouts import needs_own_file
from slider_plugin.export.metadata import title, words

NAME = "README.md"

MARK = "<!-- written by slider train -->"
"""The last line of a card: a README.md without it is somebody's own, and stays."""

_PUNCTUATION = re.compile(r"([\\`*_\[\]<>#|~&$@:]|(?<=www)\.)")
"""What means something in the middle of a line: in CommonMark, in GitHub's tables, mentions and links, and in formulas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What a card is made of."""

    header: Mapping[str, str]
    """Of the slider's file."""

    family: Family
    model: str
    """Hub id, or name of the folder, of the base model."""

    is_hub_id: bool
    file: str
    comfyui_file: str | None
    """The second file, where there is one."""

    pipeline: str | None
    """Class of the diffusers pipeline; None where it is not one of diffusers."""

    loader: str
    """How diffusers loads the file: `pipeline`, `denoiser` or `none`."""

    adapter: str
    """`lora`, `lycoris` or `controlnet`."""

    makes: str
    """`image`, `video` or `audio`."""

    prompt: str
    call: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the pipeline's call with which the strips were drawn."""

    wants_image: bool = False
    """The pipeline begins with an image."""

    sampling_rate: int = 0
    """Of sounds."""

    load: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `load_lora_weights`."""

    pictures: Sequence[str] = ()
    """Places of strips, relative to the card."""

    training: Sequence[tuple[str, str]] = ()
    """Rows of the table: what, how much; not escaped yet."""


def escaped(text: str) -> str:
    """Any text as one line of Markdown that shows it as it is (CommonMark 2.4: backslash before ASCII punctuation)."""
    return _PUNCTUATION.sub(r"\\\1", " ".join(text.split()))


def card(facts: CardFacts) -> str:
    """The whole card."""
    header = facts.header
    positive, negative = words(header)
    low, high = header["slider.recommended_min"], header["slider.recommended_max"]
    parts = [
        _front_matter(facts),
        f"# {escaped(title(header))}",
        f"A concept slider for {escaped(facts.family.title)}: an adapter whose strength turns one thing up or down and leaves "
        "the rest alone.",
        _table(
            [
                ("above 0", positive),
                ("below 0", negative),
                ("0", "the base model"),
                ("strength", f"{low} to {high}"),
                ("base model", facts.model),
            ]
        ),
        *(f"![Images at rising strength]({_place(picture)})" for picture in facts.pictures),
        "## diffusers",
        *_diffusers(facts),
        "## ComfyUI and web UIs",
        *_programs(facts),
        "## Training",
        _table(facts.training),
        "Made with slider-plugin. The licence of the base model holds for what is made with it.",
        MARK,
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(facts: CardFacts) -> str:
    """What the Hugging Face hub reads of a card."""
    tasks = {"image": "text-to-image", "video": "text-to-video", "audio": "text-to-audio"}
    told: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": tasks[facts.makes],
        "tags": ["concept-slider", "slider-plugin", facts.family.name, "lora" if facts.adapter != "lycoris" else "lycoris"],
    }
    if facts.is_hub_id:
        told |= {"base_model": facts.model, "base_model_relation": "adapter"}
    return "---\n" + yaml.safe_dump(told, sort_keys=False, allow_unicode=True) + "---"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {escaped(name)} | {escaped(value)} |" for name, value in rows)])


def _place(path: str) -> str:
    """A relative place as a link's target."""
    from urllib.parse import quote

    return quote(path, safe="/")


# --- diffusers --------------------------------------------------------------------------------------------------------


def _diffusers(facts: CardFacts) -> list[str]:
    if facts.adapter == "controlnet":
        return [
            "It belongs to a ControlNet, not to the base model's denoiser: "
            f'`controlnet.load_lora_adapter("{facts.file}", prefix="controlnet")`.'
        ]
    if facts.pipeline is None or facts.loader == "none":
        return ["diffusers has no loader for it. `slider validate` draws it."]
    return ["```python\n" + code(facts) + "```"]


def code(facts: CardFacts) -> str:
    """A program that draws one prompt at three strengths."""
    is_lycoris = facts.adapter == "lycoris"
    lines = [
        "import torch",
        f"from diffusers import {facts.pipeline}",
        *(["from diffusers.utils import export_to_video"] if facts.makes == "video" else []),
        *(["from diffusers.utils import load_image"] if facts.wants_image else []),
        *(["import soundfile"] if facts.makes == "audio" else []),
        *(["from lycoris import create_lycoris_from_weights"] if is_lycoris else []),
        "",
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        'dtype = torch.bfloat16 if device == "cuda" else torch.float32',
        f"pipe = {facts.pipeline}.from_pretrained({facts.model!r}, dtype=dtype).to(device)",
        *(_load_lycoris(facts) if is_lycoris else _load_lora(facts)),
        "",
        f"for strength in ({_ends(facts)}):",
        f"    {_set(facts)}",
        "    generator = torch.Generator().manual_seed(0)",
        f"    drawn = pipe({', '.join([f'prompt={facts.prompt!r}', *_arguments(facts), 'generator=generator'])})",
        f"    {_save(facts)}",
    ]
    return "\n".join(lines) + "\n"


def _load_lora(facts: CardFacts) -> list[str]:
    if facts.loader == "denoiser":
        place = f'weight_name="{facts.file}", prefix="{facts.family.denoiser}", adapter_name="slider"'
        return [f'pipe.{facts.family.denoiser}.load_lora_adapter(".", {place})']
    more = "".join(f", {key}={value!r}" for key, value in facts.load.items())
    return [f'pipe.load_lora_weights(".", weight_name="{facts.file}", adapter_name="slider"{more})']


def _load_lycoris(facts: CardFacts) -> list[str]:
    return [
        f'slider, _ = create_lycoris_from_weights(1.0, "{facts.file}", pipe.{facts.family.denoiser})',
        "slider.apply_to()",
        "slider.to(device, dtype)",
    ]


def _set(facts: CardFacts) -> str:
    if facts.adapter == "lycoris":
        return "slider.set_multiplier(strength)"
    owner = "pipe" if facts.loader == "pipeline" else f"pipe.{facts.family.denoiser}"
    return f'{owner}.set_adapters("slider", strength)'


def _ends(facts: CardFacts) -> str:
    low, high = (float(facts.header[f"slider.recommended_{end}"]) for end in ("min", "max"))
    return ", ".join(repr(end) for end in sorted({low, 0.0, high}))


def _arguments(facts: CardFacts) -> list[str]:
    image = ['image=load_image("first.png")'] if facts.wants_image else []
    return image + [f"{name}={value!r}" for name, value in facts.call.items()]


def _save(facts: CardFacts) -> str:
    if facts.makes == "video":
        return 'export_to_video(list(drawn.frames[0]), f"strength{strength:+g}.mp4")'
    if facts.makes == "audio":
        sound = "torch.as_tensor(drawn.audios[0]).float().cpu().numpy().T"
        return f'soundfile.write(f"strength{{strength:+g}}.wav", {sound}, {facts.sampling_rate})'
    return 'drawn.images[0].save(f"strength{strength:+g}.png")'


# --- Other programs ---------------------------------------------------------------------------------------------------


def _programs(facts: CardFacts) -> list[str]:
    if facts.adapter == "controlnet":
        return ["No program but diffusers was tried with a slider on a ControlNet."]
    if facts.adapter == "lycoris":
        return [f"`{facts.file}` has the keys of lycoris-lora, and its loader is the only one that was tried."]
    layout = facts.family.layouts.get("comfyui")
    if layout is None:
        return [f"Key names of other programs are not verified for {escaped(facts.family.title)}: use diffusers."]
    if needs_own_file(facts.family):
        if facts.comfyui_file is None:
            return ["They need other key names, and not all modules of this slider have one there: use diffusers."]
        which = f"Use `{facts.comfyui_file}` there ({layout.programs}): they do not read the keys of `{facts.file}`."
    else:
        which = f"`{facts.file}` is for them, too ({layout.programs})."
    flat = " In prompts of the web UIs: `<lora:" + (facts.comfyui_file or facts.file).removesuffix(".safetensors") + ":-1>`."
    return [
        which + " The key names were held against the programs' tables, not tried in the programs themselves.",
        "In ComfyUI: *Load LoRA*, with `strength_model` above or below 0." + (flat if layout.flat else ""),
        f"Where strengths below 0 are not possible, `slider export {facts.file} --to comfyui --flip` swaps the two sides.",
    ]
