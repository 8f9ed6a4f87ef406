"""The table of families in README, made from the code: `python -m slider_plugin.family_table`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slider_hooks import Diffusion, Family
from slider_plugin.family import LoadedFamily
from slider_plugin.reference import reference_targets
from slider_plugin.registry import Plugins

HEAD = ("family", "models", "targets", "of these joint", "predicts", "makes", "LoRA loader in diffusers", "ControlNet")
BY_HAND = "none, loaded by `slider`"


@dataclass(frozen=True, slots=True)
class Row:
    """One family."""

    name: str
    title: str
    matched: int
    joint: int
    prediction: str
    modalities: str
    loader: str
    controlnet: str
    limits: str

    def cells(self) -> tuple[str, ...]:
        return (
            f"`{self.name}`", self.title, str(self.matched), str(self.joint),
            self.prediction, self.modalities, self.loader, self.controlnet,
        )  # fmt: skip


def row_of(family: LoadedFamily) -> Row:
    """The facts of one family, with the targets of its default version counted on the real class."""
    facts, plan = family.facts, reference_targets(family)
    return Row(
        name=facts.name,
        title=facts.title,
        matched=len(plan.modules),
        joint=plan.joint,
        prediction=prediction(facts),
        modalities=", ".join(facts.modalities),
        loader="yes" if lora_loader(facts) else BY_HAND,
        controlnet=facts.controlnet_class or "none",
        limits=facts.limits,
    )


def prediction(facts: Family) -> str:
    """What the denoiser predicts, in words."""
    what = (facts.noise.prediction or "epsilon or v, as the scheduler says") if isinstance(facts.noise, Diffusion) else "flow"
    return what if facts.noise.sign == 1 else f"{what}, negated"


def lora_loader(facts: Family) -> str | None:
    """The name of the mixin by which the family's pipeline loads LoRA files, or None if it has none."""
    import diffusers

    # A family that leaves the choice of the pipeline to the folder has several, named after its denoiser.
    name = facts.pipeline_class or facts.denoiser_class.replace("Transformer2DModel", "Pipeline")
    pipeline: Any = getattr(diffusers, name, None)
    mixins = [base.__name__ for base in getattr(pipeline, "__mro__", ()) if base.__name__.endswith("LoraLoaderMixin")]
    return mixins[0] if mixins else None


def markdown(rows: list[Row]) -> str:
    """The table, and below it what single families cannot do."""
    lines = [" | ".join(HEAD), " | ".join("---" for _ in HEAD), *(" | ".join(row.cells()) for row in rows)]
    limits = [f"* `{row.name}`: {row.limits}" for row in rows if row.limits]
    return "\n".join(f"| {line} |" for line in lines) + ("\n\n" + "\n".join(limits) if limits else "") + "\n"


def all_rows() -> list[Row]:
    """The rows of all families that come with this distribution, by name."""
    plugins = Plugins.discover()
    return [row_of(plugins.load(name)) for name in sorted(plugins.families())]


if __name__ == "__main__":
    print(markdown(all_rows()))
