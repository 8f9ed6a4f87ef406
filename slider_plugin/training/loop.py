"""The training loop: one optimizer step is whole cycles of draws, each at its own strength.

A draw is trained with the adapter at the draw's scale until after its backward pass. The draws of one cycle share noise and
time, so that what the positive and the negative side have in common cancels in the adapter's gradient. They may also share one
forward and one backward, each sample at its draw's scale: the gradient is the same (see `pairing`).

Several processes take a share of each draw's samples, with the noise and times that these samples have in one process, and add
their gradients up before the step (see `processes`).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slider_hooks import Ask, Components, Conditioning, Draw, Objective, Question, Sampler
from slider_plugin.adapters.base import Adapter
from slider_plugin.adapters.samples import NotPerSample, Scale
from slider_plugin.data.drawn import ANCHOR
from slider_plugin.data.encode import Batch, Encoded
from slider_plugin.errors import UserError
from slider_plugin.objectives.bucket import Bucket
from slider_plugin.objectives.losses import anchor_loss, learning_loss, preservation_loss, share_of
from slider_plugin.training.ema import Ema
from slider_plugin.training.noise import NoiseProcess
from slider_plugin.training.optimizers import present_rate
from slider_plugin.training.pairing import Pairing, why_not
from slider_plugin.training.processes import Processes
from slider_plugin.training.reports import DrawReport, StepReport, report_of
from slider_plugin.training.rollout import Predict, rollout, steps_to
from slider_plugin.training.seeds import derived_seed, generator, seed_device

if TYPE_CHECKING:
    from accelerate import Accelerator

    from slider_plugin.family import LoadedFamily


class NotFinite(UserError):
    """The loss or its gradient is not a number any more."""


@dataclass(slots=True, kw_only=True)
class Trainer:
    """All that a training step needs."""

    family: LoadedFamily
    components: Components
    adapter: Adapter
    data: Encoded
    sampler: Sampler
    noise: NoiseProcess
    objective: Objective = field(default_factory=Bucket)
    """What the adapter learns from."""

    random_strength: tuple[float, float] | None = None
    """The shares of their strengths that cycles draw; None is always all."""

    rollout_steps: int = 20
    """From noise to image, where the model draws what it is asked about."""

    rollout_guidance: float = 1.0
    """Of the same, towards the prompt and away from the empty one; 1 is none."""

    accelerator: Accelerator
    optimizer: torch.optim.Optimizer
    schedule: Any
    """The learning-rate schedule."""

    seed: int
    cycle: int
    """Draws in one cycle: how many of the signs +, -, 0 there are."""

    draws_per_step: int
    """`gradient_accumulation_steps`, in whole cycles."""

    max_grad_norm: float
    bf16: bool
    """Arithmetic in bfloat16; not left to accelerate, whose precision is fixed for the life of a process."""

    ema: Ema | None = None
    """The moving average of the adapter's weights, where one is kept."""

    step: int = 0
    """Optimizer steps done."""

    pairing: Pairing = field(default_factory=Pairing)
    """Whether the draws of a cycle share a forward."""

    processes: Processes = field(default_factory=Processes)
    """Those that train together."""

    facts: dict[str, Any] = field(default_factory=dict)
    """What a checkpoint says about the run."""

    def run(self, steps: int, after: Callable[[StepReport], bool]) -> bool:
        """Train until `steps` are done, or until `after`, called with each step's report, asks to stop.

        Returns:
            Whether all steps are done.
        """
        while self.step < steps:
            report = self.optimizer_step()
            if after(report):
                return self.step >= steps
        return True

    def optimizer_step(self) -> StepReport:
        """One step of the optimizer over whole cycles. Raises NotFinite with the batch named, before any weight moves."""
        started = time.perf_counter()
        draws = self._of_all(self._gradients([next(self.sampler) for _ in range(self.draws_per_step)]))
        norm = self._clip()
        self._assert_finite(draws, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        learning_rate = present_rate(self.optimizer)
        if self.ema:
            self.ema.update()
        self.schedule.step()
        self.step += 1
        return StepReport(self.step, draws, float(norm), learning_rate, time.perf_counter() - started)

    def _gradients(self, draws: Sequence[Draw]) -> list[DrawReport]:
        """The gradient of all draws, signs in one forward where that is on. If it does not fit, all is done again without."""
        if self.pairing.on:
            try:
                return [report for cycle in self._cycles(draws) for report in self._one_forward(cycle)]
            except (NotPerSample, RuntimeError) as error:
                reason = _way_back(error)
                if not reason:
                    raise
            self.pairing.stop(f"{reason} (step {self.step + 1})")
            self._forget_gradients()  # here, where nothing holds the tensors of the failed pass any more
        return [report for draw in draws for report in self._pass([self.data.batch(draw)])]

    def _of_all(self, draws: Sequence[DrawReport]) -> list[DrawReport]:
        """Gradients and losses of all processes. If one of them has given up the one forward, all do from the next step on."""
        if self.processes.count == 1:
            return list(draws)
        apart_1 = draws[0].loss.new_tensor([float(not self.pairing.on)])
        losses_D = torch.stack([draw.loss * draw.weight for draw in draws])
        *losses, apart = self.processes.add_gradients(self.adapter.parameters(), torch.cat([losses_D, apart_1]))
        if self.pairing.on and float(apart) > 0:
            self.pairing.stop(f"another process cannot (step {self.step + 1})")
        return [replace(draw, loss=loss, weight=1.0) for draw, loss in zip(draws, losses, strict=True)]

    def _cycles(self, draws: Sequence[Draw]) -> list[list[Draw]]:
        return [list(cycle) for _, cycle in itertools.groupby(draws, key=lambda draw: draw.position // self.cycle)]

    def _one_forward(self, cycle: Sequence[Draw]) -> list[DrawReport]:
        groups = self.pairing.groups([self.data.batch(draw) for draw in cycle], self._why_apart)
        reports = [report for group in groups for report in self._pass(group)]
        return sorted(reports, key=lambda report: report.draw.position)

    def check_pairing(self) -> None:
        """Check the draws of the next cycle, so that a run says at its start how it trains. The sampler stays where it is."""
        if self.adapter.one_scale_only:
            self.pairing.stop(self.adapter.one_scale_only)
            return
        position = self.sampler.state_dict()
        draws = [next(self.sampler) for _ in range(self.cycle)]
        self.sampler.load_state_dict(position)
        for cycle in self._cycles(draws):
            self.pairing.groups([self.data.batch(draw) for draw in cycle], self._why_apart)

    def _why_apart(self, batches: Sequence[Batch]) -> str:
        try:
            return why_not(self.predict, self.adapter, self.noise, batches, self.bf16)
        except RuntimeError as error:
            if reason := _way_back(error):
                return reason
            raise

    def _forget_gradients(self) -> None:
        from accelerate.utils import release_memory

        self.optimizer.zero_grad(set_to_none=True)
        release_memory()

    def _pass(self, batches: Sequence[Batch]) -> list[DrawReport]:
        """One forward and one backward over the draws of these batches, each sample at its draw's scale."""
        own = [self.processes.index] if self.processes.index else []  # or all shares would lose the same features to dropout
        seed_device(derived_seed(self.seed, "model", batches[0].draw.position, *own), self.accelerator.device)
        with self.adapter.scaled(self.scale(batches)):  # until after backward: checkpointing runs the forward again
            losses = self.losses(batches)
            shares = [batch.part.weight * loss for batch, loss in zip(batches, losses, strict=True)]
            self.accelerator.backward(torch.stack(shares).sum() / self.draws_per_step)
        return [report_of(batch, loss) for batch, loss in zip(batches, losses, strict=True)]

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a draw at the adapter's present scale, a float32 scalar."""
        return self.losses([batch])[0]

    def losses(self, batches: Sequence[Batch]) -> list[Tensor]:
        """The loss of each draw at the adapter's present scale, float32 scalars; one forward over the samples of all draws."""
        questions = self._questions(batches)
        targets = self._targets(questions)
        answers = self._answers([question.ask for question in questions])
        return [
            self._loss(question, answer_BCHW, target_BCHW)
            for question, answer_BCHW, target_BCHW in zip(questions, answers, targets, strict=True)
        ]

    def _loss(self, question: Question, answer_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
        weight_B = self.noise.weight(question.ask.time)
        if question.draw.bucket == ANCHOR:
            return anchor_loss(answer_BCHW, target_BCHW, weight_B)
        if question.draw.neutral:
            return preservation_loss(answer_BCHW, target_BCHW, weight_B)
        return learning_loss(answer_BCHW, target_BCHW, weight_B, self.objective.weight(question))

    def _targets(self, questions: Sequence[Question]) -> list[Tensor]:
        """What each draw's answer should be: for neutral ones the frozen model's, else the objective's."""
        asked = [[] if question.draw.neutral else list(self.objective.asks(question)) for question in questions]
        asks = {id(ask): ask for q, of_q in zip(questions, asked, strict=True) for ask in (*_own(q), *of_q)}
        frozen = dict(zip(asks, self._frozen(list(asks.values())), strict=True))
        return [
            self._target(question, frozen.get(id(question.ask)), [frozen[id(ask)] for ask in of_question])
            for question, of_question in zip(questions, asked, strict=True)
        ]

    def _target(self, question: Question, own_BCHW: Tensor | None, frozen: Sequence[Tensor]) -> Tensor:
        """At the drawn share of the strength; `own_BCHW` is the frozen answer to the draw's own question."""
        if question.draw.neutral:
            assert own_BCHW is not None
            return own_BCHW
        target_BCHW = self.objective.target(question, frozen)
        if question.strength == 1.0 or own_BCHW is None:
            return target_BCHW
        return share_of(own_BCHW, target_BCHW, question.strength)

    def _questions(self, batches: Sequence[Batch]) -> list[Question]:
        """Batches with noise; the draws of a cycle share it, and the time. Both are drawn for the whole batch."""
        noise = [self._noise(batch) for batch in batches]
        times = [self._times(batch)[batch.part.places] for batch in batches]
        noisy = [
            self.noise.add_noise(batch.clean_BCHW, noise_BCHW, time_B)
            for batch, noise_BCHW, time_B in zip(batches, noise, times, strict=True)
        ]
        drawn = [place for place, batch in enumerate(batches) if batch.drawn]
        rolled = self._rolled([batches[i] for i in drawn], [noise[i] for i in drawn], [times[i] for i in drawn])
        for place, latents_BCHW in zip(drawn, rolled, strict=True):
            noisy[place] = latents_BCHW
        return [self._question(*facts) for facts in zip(batches, noise, times, noisy, strict=True)]

    def _question(self, batch: Batch, noise_BCHW: Tensor, time_B: Tensor, noisy_BCHW: Tensor) -> Question:
        return Question(
            draw=batch.draw,
            turn=batch.draw.position // self.cycle,
            ask=Ask(noisy=noisy_BCHW, time=time_B, conditioning=batch.conditioning),
            clean=batch.clean_BCHW,
            noise=noise_BCHW,
            twin=batch.twin_BCHW,
            strength=self._share(batch.draw),
            add_noise=lambda clean_BCHW, noise_BCHW: self.noise.add_noise(clean_BCHW, noise_BCHW, time_B),
            truth=lambda clean_BCHW, noise_BCHW: self.noise.target(clean_BCHW, noise_BCHW, time_B),
            told=lambda prompt: self.data.told(batch.conditioning, prompt),
        )

    def _noise(self, batch: Batch) -> Tensor:
        cycle, part, shape = batch.draw.position // self.cycle, batch.part, batch.clean_BCHW.shape[1:]
        noise_BCHW = torch.randn((part.whole, *shape), generator=generator(self.seed, "noise", cycle))[part.places]
        return noise_BCHW.to(batch.clean_BCHW.device)

    def _times(self, batch: Batch) -> Tensor:
        """Of the whole batch, whatever the process's share of it."""
        cycle, size = batch.draw.position // self.cycle, tuple(batch.clean_BCHW.shape[2:])
        return self.noise.draw_time(batch.part.whole, generator(self.seed, "time", cycle), size)

    def _share(self, draw: Draw) -> float:
        """The share of its strength that a draw is trained at: one for all of a cycle."""
        if self.random_strength is None:
            return 1.0
        low, high = self.random_strength
        numbers = generator(self.seed, "strength", draw.position // self.cycle)
        return low + (high - low) * float(torch.rand((), generator=numbers))

    def _rolled(self, batches: Sequence[Batch], noise: Sequence[Tensor], times: Sequence[Tensor]) -> Sequence[Tensor]:
        """The noisy latents that the model draws with the adapter at each draw's strength, all in one go."""
        if not batches:
            return []
        conditioning = [told for batch in batches for told in batch.conditioning]
        count = steps_to(self.noise, torch.cat([self._times(batch) for batch in batches]), self.rollout_steps)
        with torch.no_grad(), self.adapter.scaled(self.scale(batches)):
            noisy_BCHW = rollout(self.noise, self._guided(conditioning), torch.cat(list(noise)), torch.cat(list(times)), count)
        rolled: Sequence[Tensor] = noisy_BCHW.split([len(time_B) for time_B in times])
        return rolled

    def _guided(self, conditioning: Sequence[Conditioning]) -> Predict:
        """The denoiser's answer, with classifier-free guidance (arXiv 2207.12598) where that is asked for."""
        if self.rollout_guidance == 1.0:
            return lambda noisy_BCHW, time_B: self.predict(noisy_BCHW, time_B, conditioning)
        empty = self.data.told(conditioning, "")

        def guided(noisy_BCHW: Tensor, time_B: Tensor) -> Tensor:
            told_BCHW, empty_BCHW = (self.predict(noisy_BCHW, time_B, prompt) for prompt in (conditioning, empty))
            return empty_BCHW + self.rollout_guidance * (told_BCHW - empty_BCHW)

        return guided

    def scale(self, batches: Sequence[Batch]) -> Scale:
        """The scale of one draw, or one for each sample of several."""
        scales = [self._share(batch.draw) * batch.draw.scale for batch in batches]
        if len(batches) == 1:
            return scales[0]
        return [scale for batch, scale in zip(batches, scales, strict=True) for _ in batch.conditioning]

    def _frozen(self, asks: Sequence[Ask]) -> Sequence[Tensor]:
        """The frozen model's answers, one forward without gradient."""
        if not asks:
            return ()
        with torch.no_grad(), self.adapter.scaled(0.0):  # not disabled: a process that skips the adapter would hang the others
            return self._answers(asks)

    def _answers(self, asks: Sequence[Ask]) -> Sequence[Tensor]:
        """The answers to each question, from one forward over all."""
        noisy_BCHW, time_B = torch.cat([ask.noisy for ask in asks]), torch.cat([ask.time for ask in asks])
        conditioning = [told for ask in asks for told in ask.conditioning]
        answers: Sequence[Tensor] = self.predict(noisy_BCHW, time_B, conditioning).split([len(ask.time) for ask in asks])
        return answers

    def predict(self, noisy_BCHW: Tensor, time_B: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
        """The denoiser's answer in the convention of the noise process."""
        told_B = self.noise.told(time_B).to(noisy_BCHW.device)
        with torch.autocast(noisy_BCHW.device.type, torch.bfloat16, enabled=self.bf16):
            answer_BCHW = self.family.predict(self.components, noisy_BCHW, told_B, conditioning)
        return self.noise.output(answer_BCHW)

    def _clip(self) -> Tensor:
        limit = self.max_grad_norm if self.max_grad_norm > 0 else math.inf
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm: Tensor = torch.nn.utils.clip_grad_norm_(parameters, limit)
        return norm

    def _assert_finite(self, draws: list[DrawReport], norm: Tensor) -> None:
        """One look at the device for the whole step. All processes see the same sums, so all stop."""
        if math.isfinite(float(norm)) and all(math.isfinite(float(r.loss)) for r in draws):
            return
        bad = next((r for r in draws if not math.isfinite(float(r.loss))), draws[-1])
        what = "loss" if not math.isfinite(float(bad.loss)) else "gradient"
        files = f" ({', '.join(bad.files)})" if bad.files else ""
        raise NotFinite(
            f"the {what} is not finite in optimizer step {self.step + 1}, bucket {bad.draw.bucket!r} at strength "
            f"{bad.draw.scale:g}{files}. Lower learning_rate, or try mixed_precision no; the last checkpoint "
            "is unharmed"
        )


def _way_back(error: Exception) -> str:
    """Why a pass over both signs failed where separate passes may not; "" if these would fail as well."""
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, NotPerSample):
        return str(error)
    no_memory = isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
    return "both signs do not fit into memory together" if no_memory else ""


def _own(question: Question) -> list[Ask]:
    """The draw's own question, where the frozen model is to answer it whatever the objective asks."""
    return [question.ask] if question.draw.neutral or question.strength != 1.0 else []
