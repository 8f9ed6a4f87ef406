"""Both signs in one forward: which draws of a cycle may share one, and whether the model keeps their samples apart.

Draws share a forward if their latents have one shape. Whether a model then answers each sample as it answers it alone, at that
sample's strength, is not believed but measured, for each shape when it first comes up: models lay frames and tokens of several
samples one behind another, pad prompts, or read one sample's time for all. The adapter gets random weights for this, since an
untrained one changes nothing, and gets its own back bit for bit.

Four answers are compared, for two samples at the strengths s and -s in one forward:

* with those at (s, s) and (-s, -s): what is the strength of the one must not reach the other. Nothing else differs between
  these forwards, so they are equal to the last bit, but for models that group tokens by their content (experts);
* with that of each sample alone, up to the rounding of another batch size.

Differences are measured in the adapter's own effect, and where prompts of different length meet also in that of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slider_hooks import Conditioning
from slider_plugin import console
from slider_plugin.adapters.base import Adapter
from slider_plugin.adapters.samples import NotPerSample
from slider_plugin.data.encode import Batch
from slider_plugin.errors import UserError
from slider_plugin.training.noise import NoiseProcess

Predict = Callable[[Tensor, Tensor, Sequence[Conditioning]], Tensor]
"""`(noisy_BCHW, time_B, conditioning) -> prediction_BCHW`, as in the training step."""

LEAK = 1e-3
"""How much of one sample's strength may reach another, as a share of the adapter's effect. A wrong layer shows at far more."""

ALONE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""How far a sample's answer may be from the one it has alone, as a share of the effect of adapter (and text), by arithmetic."""

EFFECT = 0.2
"""How much of the answer the random adapter should change at least: rounding is small beside that."""

STRENGTHS = tuple(4.0**power for power in range(7))
"""Strengths that are tried for this, in turn."""

NOISE = 0.3
"""Of the random weights, as a share of what keeps a layer's output as large as its input."""

TIMES = (0.4, 0.7)
"""Shares of noise of the two samples."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a check holds for."""

    latents: tuple[int, ...]
    """Shape of one sample's latents."""

    alike: bool
    """Whether all that is known of the samples has the same shapes; if not, prompts of different length meet."""


@dataclass(slots=True)
class Pairing:
    """Whether the draws of a cycle share forwards, and which of them."""

    on: bool = False
    insist: bool = False
    """Whether it is an error if they cannot."""

    family: str = ""
    """For messages."""

    checked: dict[Kind, str] = field(default_factory=dict)
    """Why samples of a kind cannot share a forward; "" if they can."""

    def groups(self, batches: Sequence[Batch], check: Callable[[Sequence[Batch]], str]) -> list[list[Batch]]:
        """Put the batches that may share a forward together, in order; each alone where this is off.

        Args:
            batches: of one cycle.
            check: says why the samples of some batches cannot share a forward, or ""; asked once for each kind.
        """
        groups: list[list[Batch]] = []
        for batch in batches:
            place = next((group for group in groups if self._fit([*group, batch], check)), None)
            if place is None:
                groups.append([batch])
            else:
                place.append(batch)
        return groups

    def stop(self, reason: str) -> None:
        """Train each draw in a forward of its own from here on, and say why. Raises UserError if the user insists."""
        if self.insist:
            raise UserError(f"signs_in_one_forward: {self.family} cannot: {reason}; write auto or no")
        self.on = False
        console.say(f"signs_in_one_forward: {self.family}: {reason}; each sign is trained in a forward of its own")

    def _fit(self, batches: Sequence[Batch], check: Callable[[Sequence[Batch]], str]) -> bool:
        kind = kind_of(batches) if self.on else None
        if kind is None:
            return False
        if kind not in self.checked:
            reason = self.checked[kind] = check(batches)
            if reason and kind.alike:
                self.stop(reason)
            elif reason:
                console.say(f"signs_in_one_forward: {self.family}: {reason}; prompts of different length are trained apart")
        return not self.checked[kind]


def kind_of(batches: Sequence[Batch]) -> Kind | None:
    """The kind of samples in a forward over all of these, or None if they cannot be put into one."""
    latents = {tuple(batch.clean_BCHW.shape[1:]) for batch in batches}
    told = [conditioning for batch in batches for conditioning in batch.conditioning]
    names = {frozenset((name, value.ndim, value.dtype) for name, value in c.items()) for c in told}
    if len(latents) > 1 or len(names) > 1:
        return None
    shapes = {tuple((name, tuple(value.shape)) for name, value in sorted(c.items())) for c in told}
    return Kind(latents.pop(), alike=len(shapes) == 1)


# --- The check --------------------------------------------------------------------------------------------------------


def why_not(predict: Predict, adapter: Adapter, noise: NoiseProcess, batches: Sequence[Batch], bf16: bool) -> str:
    """Why samples of these batches cannot share a forward, or "". Adapter and random states are afterwards as they were.

    Args:
        predict: the denoiser's answer.
        adapter: inside the denoiser.
        noise: for the noisy latents.
        batches: two or more that share shapes.
        bf16: whether `predict` computes in bfloat16.
    """
    first, second = _most_different(batches)
    clean_2CHW = torch.stack([first[0], second[0]])
    told = (first[1], second[1])
    device = clean_2CHW.device
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []), _random_weights(adapter):
        noise_2CHW = torch.randn(clean_2CHW.shape, generator=torch.Generator().manual_seed(0)).to(device)
        time_2 = torch.cat([noise.at(share, 1) for share in TIMES])
        noisy_2CHW = noise.add_noise(clean_2CHW, noise_2CHW, time_2)
        try:
            return _Pair(predict, adapter, noisy_2CHW, time_2, told).fault(ALONE[torch.bfloat16 if bf16 else torch.float32])
        except NotPerSample as error:
            return str(error)


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two samples, and how they are answered."""

    predict: Predict
    adapter: Adapter
    noisy_2CHW: Tensor
    time_2: Tensor
    told: tuple[Conditioning, Conditioning]

    def fault(self, tolerance: float) -> str:
        """What is wrong with the answers at (s, -s); "" if nothing."""
        strength, plus, minus = self._strong_enough()
        if strength is None:
            return "the adapter has too little effect to be checked"
        effect = [_size(plus[i] - minus[i]) for i in (0, 1)]
        both = self._together((strength, -strength))
        leaks = (_size(both[0] - plus[0]) / effect[0], _size(both[1] - minus[1]) / effect[1])
        if not all(leak <= LEAK for leak in leaks):
            return f"the strength of one sample reaches another ({max(leaks):.2g} of its effect)"
        yardsticks = [min(effect[i], self._effect_of_text(i, strength)) for i in (0, 1)]
        alone = [self._alone(0, strength), self._alone(1, -strength)]
        misses = [_size(both[i] - alone[i]) / max(yardsticks[i], 1e-12) for i in (0, 1)]
        if not all(miss <= tolerance for miss in misses):
            return f"a sample is not answered as it is alone ({max(misses):.2g} of the adapter's effect or the text's)"
        return ""

    def _strong_enough(self) -> tuple[float | None, Tensor, Tensor]:
        """A strength at which the adapter's effect is no matter of rounding, and the answers at plus and minus."""
        for strength in STRENGTHS:
            plus, minus = self._together((strength, strength)), self._together((-strength, -strength))
            if min(_size(plus[i] - minus[i]) / _size(plus[i] + minus[i]) for i in (0, 1)) >= EFFECT:
                return strength, plus, minus
        return None, plus, minus

    def _together(self, scales: tuple[float, float]) -> Tensor:
        with self.adapter.scaled(scales):
            return self.predict(self.noisy_2CHW, self.time_2, self.told).double()

    def _alone(self, i: int, scale: float, text_of: int | None = None) -> Tensor:
        told = self.told[i if text_of is None else text_of]
        with self.adapter.scaled(scale):
            return self.predict(self.noisy_2CHW[i : i + 1], self.time_2[i : i + 1], (told,)).double()[0]

    def _effect_of_text(self, i: int, scale: float) -> float:
        """How far the other sample's text would move this one's answer; infinite where neither length nor mask is another."""
        if not _difference(*self.told):
            return float("inf")
        return _size(self._alone(i, scale) - self._alone(i, scale, text_of=1 - i))


def _size(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())


Sample = tuple[Tensor, Conditioning]


def _most_different(batches: Sequence[Batch]) -> tuple[Sample, Sample]:
    """A sample of the first batch and one of another, whose prompts differ most in length or in what their masks hide."""
    firsts, *others = [list(zip(batch.clean_BCHW, batch.conditioning, strict=True)) for batch in batches]
    pairs = [(a, b) for a in firsts for other in others for b in other]
    return max(pairs, key=lambda pair: _difference(pair[0][1], pair[1][1]))


def _difference(first: Conditioning, second: Conditioning) -> float:
    def extent(value: Tensor) -> float:
        hidden = 0.0 if value.is_floating_point() else float(value.double().sum())
        return value.numel() + hidden

    return sum(abs(extent(first[name]) - extent(second[name])) for name in first)


@contextmanager
def _random_weights(adapter: Adapter) -> Iterator[None]:
    """Random numbers upon an adapter's weights inside, so that it has an effect; its own, bit for bit, outside."""
    parameters = adapter.parameters()
    kept = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(0)
    try:
        for parameter in parameters:
            inputs = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.add_(NOISE / inputs**0.5 * torch.randn(parameter.shape, generator=generator).to(parameter))
        yield
    finally:
        for parameter, own in zip(parameters, kept, strict=True):
            parameter.copy_(own)
