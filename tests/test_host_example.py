"""Other trainers as hosts: a plain LoRA loop, and the same loop for a slider in a few lines more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from slider_plugin import BucketInfo, UserError, attach_slider, load_family

ROOT = Path(__file__).parents[1]
EXAMPLE, SD1, SIZE = (
    ROOT / "fixtures" / "host-example",
    ROOT / "fixtures" / "tiny" / "sd1",
    ROOT / "fixtures" / "buckets" / "size",
)


def code(name: str) -> list[str]:
    """The lines of a script below its docstring, without their indentation, since a `with` changes that alone."""
    text = (EXAMPLE / name).read_text().split('"""', 2)[2]
    return [line.strip() for line in text.splitlines() if line.strip()]


def test_the_slider_s_loop_has_few_lines_that_the_plain_one_has_not() -> None:
    added = [line for line in code("slider_lora.py") if line not in code("plain_lora.py")]
    assert 5 < len(added) < 15, added


@pytest.mark.parametrize(("script", "images"), [("plain_lora.py", SIZE / "more"), ("slider_lora.py", SIZE)])
def test_both_loops_run(script: str, images: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE / script), str(SD1), str(images), str(tmp_path / "out"), "--steps", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "out").glob("*.safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained(SD1, dtype=torch.float32, safety_checker=None)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="loaded")
    if script == "slider_lora.py":
        with safe_open(file, "pt") as opened:
            facts = opened.metadata()
        assert facts["slider.family"] == "sd1" and facts["slider.strengths"] == "[-1.0, 1.0]"
        assert not [key for key in pipeline.get_list_adapters()["unet"] if key != "loaded"]


def unet() -> Any:
    return StableDiffusionPipeline.from_pretrained(SD1, dtype=torch.float32, safety_checker=None).unet


def test_a_slider_in_somebody_s_denoiser_is_mirrored_and_saved_as_it_answers(tmp_path: Path) -> None:
    denoiser = unet()
    inputs = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([500])
    text = torch.randn(1, 8, denoiser.config.cross_attention_dim, generator=torch.Generator().manual_seed(2))

    def answer() -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = denoiser(*inputs, encoder_hidden_states=text).sample
        return result

    base = answer()
    slider = attach_slider(load_family("sd1"), denoiser, rank=2, alpha=4.0)
    assert torch.equal(answer(), base), "a new slider changes nothing"
    assert not any(p.requires_grad for n, p in denoiser.named_parameters() if "lora" not in n)
    assert slider.targets.source == "slider" and len(slider.parameters()) == 2 * len(slider.targets.modules)
    with torch.no_grad():
        for parameter in slider.parameters():
            parameter.add_(0.02)
    with slider.scaled(-0.5):
        minus = answer()
    with slider.scaled(0.0):
        assert torch.equal(answer(), base)
    assert not torch.equal(minus, base)

    slider.save(tmp_path / "new" / "slider.safetensors", strengths=[1, -1], metadata={"my.note": "x"})
    pipeline = StableDiffusionPipeline.from_pretrained(SD1, dtype=torch.float32, safety_checker=None)
    pipeline.load_lora_weights(str(tmp_path / "new"), weight_name="slider.safetensors", adapter_name="it")
    pipeline.set_adapters("it", -0.5)
    denoiser = pipeline.unet
    assert torch.allclose(answer(), minus, atol=1e-5)


def test_own_targets_win_and_wrong_ones_are_told() -> None:
    family = load_family("sd1")
    assert all(name.endswith("attn2.to_v") for name in attach_slider(family, unet(), targets=["attn2.to_v"]).targets.modules)
    with pytest.raises(UserError, match="match no module of UNet2DConditionModel"):
        attach_slider(family, unet(), targets=["no_such_layer"])


def test_the_sampler_is_the_family_s() -> None:
    buckets = [BucketInfo(name=name, strength=s, batches=2, samples=2) for name, s in (("more", 1.0), ("less", -1.0))]
    sampler = load_family("sd1").build_sampler(buckets, seed=0)
    assert [next(sampler).scale for _ in range(4)] == [1.0, -1.0, 1.0, -1.0]


def test_the_package_exports_what_it_says_and_needs_no_torch_for_it() -> None:
    look = "import sys, slider_plugin; assert 'torch' not in sys.modules; print(*slider_plugin.__all__)"
    names = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True).stdout.split()
    import slider_plugin

    assert names and all(getattr(slider_plugin, name) is not None for name in names)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        slider_plugin.nothing  # noqa: B018
