"""Wan beyond the text-to-video model of 2.1: two denoisers for two parts of the noise, a model that is told the time of every
token, models that begin with an image."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

from slider_hooks import LoadRequest
from slider_plugin.errors import UserError
from slider_plugin.registry import Plugins
from slider_plugin.testing.rules import RULES
from slider_plugin.testing.subject import Subject
from slider_plugin.testing.tiny import seeded
from slider_plugin.training.noise import noise_process

BOUNDARY = 0.875
TOGETHER = "a_saved_slider_answers_the_same_in_a_new_process"  # test_reload.py has it


@pytest.fixture(scope="module")
def one(tiny_folders: Callable[[str], Path]) -> WanPipeline:
    """Wan 2.1, of which the others are made."""
    return WanPipeline.from_pretrained(tiny_folders("wan"))


@pytest.fixture(scope="module")
def two_experts(one: WanPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan22")
    other = copy.deepcopy(one.transformer)
    with torch.no_grad(), seeded(3):
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    WanPipeline(
        vae=one.vae, text_encoder=one.text_encoder, tokenizer=one.tokenizer, transformer=one.transformer,
        transformer_2=other, scheduler=one.scheduler, boundary_ratio=BOUNDARY,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def load(folder: Path, expert: str = "high") -> Subject:
    family = Plugins.discover().load("wan")
    request = LoadRequest(model=str(folder), dtype=torch.float32, options={"wan_expert": expert})
    return Subject(family, family.load_components(request), family.facts.tiny_size, folder)


@pytest.mark.parametrize(
    ("expert", "component", "part"), [("high", "transformer", (BOUNDARY, 1)), ("low", "transformer_2", (0, BOUNDARY))]
)
def test_an_expert_is_trained_on_its_part_of_the_noise(two_experts: Path, expert: str, component: str, part: tuple) -> None:
    subject = load(two_experts, expert)
    assert subject.denoiser is getattr(subject.components.pipeline, component)
    sigmas = noise_process(subject.family.facts, subject.components).draw_time(500, torch.Generator().manual_seed(1))
    assert part[0] <= sigmas.min() and sigmas.max() <= part[1]
    assert sigmas.max() - sigmas.min() > 0.95 * (part[1] - part[0])


# The perfect denoiser of the remaining rule stands in for one of them alone.
@pytest.mark.parametrize("rule", [name for name in RULES if "sampler" not in name and name != TOGETHER])
@pytest.mark.parametrize("expert", ["high", "low"])
def test_rules_hold_for_each_expert(two_experts: Path, expert: str, rule: str) -> None:
    RULES[rule](load(two_experts, expert))


def test_a_model_with_one_denoiser_has_no_low_expert(tiny_folders: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"wan_expert: .* has one denoiser"):
        load(tiny_folders("wan"), "low")


@pytest.mark.parametrize("rule", [name for name in RULES if name != TOGETHER])
def test_rules_hold_where_every_token_is_told_its_time(one: WanPipeline, tmp_path: Path, rule: str) -> None:
    with seeded(0):
        WanPipeline(
            vae=AutoencoderKLWan(
                base_dim=4, decoder_base_dim=8, num_res_blocks=1, z_dim=48, in_channels=12, out_channels=12, patch_size=2,
                is_residual=True, scale_factor_spatial=16, latents_mean=[0.1] * 48, latents_std=[0.7] * 48,
            ),
            text_encoder=one.text_encoder, tokenizer=one.tokenizer, scheduler=one.scheduler, expand_timesteps=True,
            transformer=WanTransformer3DModel(
                num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=32, ffn_dim=48, num_layers=1,
                rope_max_seq_len=32, in_channels=48, out_channels=48,
            ),
        ).save_pretrained(tmp_path)  # fmt: skip
    RULES[rule](load(tmp_path))


# --- Image to video ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["clip", "no clip"])
def from_image(request: pytest.FixtureRequest, tiny_image_to_video: Callable[[bool], Path]) -> Path:
    return tiny_image_to_video(request.param)


@pytest.mark.parametrize("rule", [name for name in RULES if name != TOGETHER])
def test_rules_hold_where_the_first_frame_is_given(from_image: Path, rule: str) -> None:
    RULES[rule](load(from_image))


def test_another_first_frame_is_another_answer(from_image: Path) -> None:
    """Or the rule that training asks what the pipeline asks would hold for a frame that nobody looks at."""
    subject = load(from_image)
    noisy, text = subject.latents(), subject.conditioning()
    right = subject.predict(noisy, text)
    told = subject.family.condition_on_images(subject.components, -subject.media())
    wrong = subject.family.predict(subject.components, noisy, torch.tensor([500.0]), [{**text[0], **told[0]}])
    assert float((right - wrong).abs().max() / right.std()) > 0.1


def test_one_image_teaches_an_image_to_video_model_nothing(from_image: Path) -> None:
    subject = load(from_image)
    with pytest.raises(UserError, match="learns nothing from one image; use videos"):
        subject.family.condition_on_images(subject.components, subject.media()[:, :, :1])


def test_a_control_model_is_refused(one: WanPipeline, tmp_path: Path) -> None:
    """It has as many input channels as Wan 2.2 TI2V, and answers with fewer."""
    with seeded(0):
        control = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=32, ffn_dim=48, num_layers=1, in_channels=48
        )
        WanPipeline(
            vae=one.vae, text_encoder=one.text_encoder, tokenizer=one.tokenizer, scheduler=one.scheduler, transformer=control
        ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="takes 32 channels beside its noise"):
        load(tmp_path)
