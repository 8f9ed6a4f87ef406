"""How much of the concept pictures show, by a model of their own: CLIP, SigLIP or DINO from a local folder, or an extension.

With words, the score of a picture is the cosine of its embedding and that of the positive words, less that of the negative
words (the text direction of Concept Sliders' evaluation, arXiv 2311.12092). Without, it is the part of the normalised
embedding along the line from the mean negative to the mean positive image; a model without text, such as DINO, knows this one
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from slider_plugin.errors import UserError
from slider_plugin.report.probe import Score

if TYPE_CHECKING:
    from slider_plugin.family import LoadedFamily

Array = np.ndarray

EXTENSION = "extension"
"""The word that asks for the hook `score_images` instead of a folder."""

AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Words:
    """What the concept is called; "" where nothing is said."""

    positive: str = ""
    negative: str = ""

    def __bool__(self) -> bool:
        return bool(self.positive or self.negative)


def check_scorer(scorer: str, words: Words, family: LoadedFamily) -> None:
    """Raise UserError unless the scorer can be asked: its folder is there, an extension answers, and words can be read."""
    if scorer == EXTENSION:
        if not family.has_scorer:
            raise UserError("--scorer extension: no installed extension answers score_images; name a folder instead")
        return
    folder = Path(scorer)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--scorer {scorer}: there is no config.json; name the folder of a CLIP, SigLIP or DINO of transformers"
        )
    if words and not (words.positive and words.negative):
        raise UserError("--positive and --negative: a scorer needs both words or none")


def open_scorer(
    scorer: str, words: Words, family: LoadedFamily, device: torch.device, ends: Sequence[Sequence[Image.Image]]
) -> Score:
    """What scores pictures.

    Args:
        scorer: a folder, or `extension`.
        words: of the concept.
        family: asked by `extension`.
        device: where the model runs.
        ends: the positive and the negative images.

    Raises:
        UserError: the folder holds no such model.
    """
    if scorer == EXTENSION:
        return lambda images: np.array(family.score_images(list(images), words.positive, words.negative))
    seer = Seer(Path(scorer), device)
    if words:
        line_D = seer.read([words.positive]) - seer.read([words.negative])
    else:
        line_D = seer.see(ends[0]).mean(0, keepdims=True) - seer.see(ends[1]).mean(0, keepdims=True)
    return lambda images: np.asarray((seer.see(images) @ line_D.T)[:, 0])


class Seer:
    """A model of transformers that embeds pictures, and perhaps words."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Load it from a folder; nothing is downloaded, and no code of the folder is run. Raises UserError if that fails."""
        from transformers import AutoModel

        self._folder, self._device = folder, device
        try:
            model: Any = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"--scorer {folder}: it cannot be loaded ({str(error).splitlines()[0]})") from error
        self._model = model.to(device).eval().requires_grad_(False)
        self._look = self._part("AutoImageProcessor")

    def _part(self, name: str) -> Any:
        import transformers

        try:
            return getattr(transformers, name).from_pretrained(self._folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"--scorer {self._folder}: its {name} cannot be loaded ({str(error).splitlines()[0]})") from error

    @torch.no_grad()
    def see(self, images: Sequence[Image.Image]) -> Array:
        """Embeddings of length 1, `(B, D)`."""
        parts = [list(images[i : i + AT_ONCE]) for i in range(0, len(images), AT_ONCE)]
        return np.concatenate([self._seen(part) for part in parts])

    def _seen(self, images: list[Image.Image]) -> Array:
        given = {name: value.to(self._device) for name, value in self._look(images=images, return_tensors="pt").items()}
        embed = getattr(self._model, "get_image_features", None)
        return _normalised(_pooled(embed(**given) if embed else self._model(**given)))

    @torch.no_grad()
    def read(self, texts: list[str]) -> Array:
        """Embeddings of words, `(B, D)`. Raises UserError if the model has no text."""
        embed = getattr(self._model, "get_text_features", None)
        if embed is None:
            raise UserError(
                f"--positive: {type(self._model).__name__} of --scorer reads no words; leave them out, and the images tell "
                "what the concept is"
            )
        tokens = self._part("AutoTokenizer")(**self._how(texts), truncation=True, return_tensors="pt")
        return _normalised(_pooled(embed(**{name: value.to(self._device) for name, value in tokens.items()})))

    def _how(self, texts: list[str]) -> dict[str, Any]:
        """SigLIP embeds what stands last at the one length that it was trained at, in small letters and with nothing masked.

        Its second version's tokenizer says none of this itself.
        """
        if "siglip" not in type(self._model).__name__.lower():
            return {"text": texts, "padding": True}
        length = self._model.config.text_config.max_position_embeddings
        return {
            "text": [text.lower() for text in texts],
            "padding": "max_length",
            "max_length": length,
            "return_attention_mask": False,
        }


def _pooled(answer: Any) -> Tensor:
    """The embedding `(B, D)` in a model's answer, which is a tensor in some versions of transformers."""
    if isinstance(answer, Tensor):
        return answer
    pooled: Tensor | None = getattr(answer, "pooler_output", None)
    return answer.last_hidden_state[:, 0] if pooled is None else pooled


def _normalised(embeddings_BD: Tensor) -> Array:
    unit_BD: Array = functional.normalize(embeddings_BD.float(), dim=-1).cpu().double().numpy()
    return unit_BD
