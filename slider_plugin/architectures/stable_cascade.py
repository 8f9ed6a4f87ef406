"""Stable Cascade, stage C: a UNet that predicts noise over continuous time, in latents 42 times smaller than the image.

It is told r, 0 (image) to 1 (noise), of a cosine schedule (diffusers schedulers/scheduling_ddpm_wuerstchen.py:117-129), the
prompt by CLIP-G, and zeros in place of an image: pipelines/stable_cascade/pipeline_stable_cascade_prior.py:480-605. Its
attention takes image and text tokens together as keys and values: models/unets/unet_stable_cascade.py:93-109. Stages B and A,
which make the picture, are another pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slider_hooks import (
    Components,
    Conditioning,
    Diffusion,
    Family,
    Flavour,
    LoadRequest,
    Option,
    Targets,
    UserError,
    hookimpl,
)

if TYPE_CHECKING:
    from torch import Tensor

PUBLISHED_DECODER = "stabilityai/stable-cascade"  # diffusers pipelines/stable_cascade/pipeline_stable_cascade.py:50
DECODER = Option(
    name="stable_cascade_decoder",
    type=str,
    default=None,
    help=f"folder or hub id of the decoder pipeline that draws validation images; {PUBLISHED_DECODER} if there is none",
)
SCHEDULE = {"s": 0.008, "scaler": 1.0}


def cosine(r_B: Tensor) -> Tensor:
    """The cumulative alpha `(B,)` at r `(B,)`, with the bounds that the sampler keeps."""
    s = SCHEDULE["s"]
    quarter = math.pi / 2 / (1 + s)
    return (((r_B + s) * quarter).cos() / math.cos(s * quarter)).square().clamp(0.0001, 0.9999)


def tiny(folder: Path) -> None:
    """Write a random pipeline, and in `decoder` the one that draws: real classes, real tokenizers, 4x4 latents."""
    from diffusers import (
        DDPMWuerstchenScheduler,
        StableCascadeDecoderPipeline,
        StableCascadePriorPipeline,
        StableCascadeUNet,
    )
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    from slider_plugin.testing import tiny as parts

    sizes = {
        "conditioning_dim": 16,
        "block_out_channels": (16, 32),
        "num_attention_heads": (2, 2),
        "down_num_layers_per_block": (1, 1),
        "up_num_layers_per_block": (1, 1),
        "clip_text_pooled_in_channels": 16,
    }
    with parts.seeded(0):
        text_encoder, tokenizer = parts.clip(hidden_size=16, projection=True)
        prior = StableCascadeUNet(**sizes, clip_text_in_channels=16, clip_image_in_channels=12, switch_level=(False,))
        decoder = StableCascadeUNet(**sizes, in_channels=4, out_channels=4, patch_size=2, effnet_in_channels=16)
        shared = {"text_encoder": text_encoder, "tokenizer": tokenizer, "scheduler": DDPMWuerstchenScheduler()}
        StableCascadePriorPipeline(prior=parts.redraw_zeros(prior), resolution_multiple=8, **shared).save_pretrained(folder)
        StableCascadeDecoderPipeline(
            decoder=parts.redraw_zeros(decoder),
            vqgan=PaellaVQModel(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=32),
            latent_dim_scale=2,
            **shared,
        ).save_pretrained(folder / "decoder")


FAMILY = Family(
    name="stable_cascade",
    title="Stable Cascade, stage C",
    denoiser="prior",
    denoiser_class="StableCascadeUNet",
    pipeline_class="StableCascadePriorPipeline",
    load_kwargs={"image_encoder": None, "feature_extractor": None},  # prompts are text alone
    noise=Diffusion(prediction="epsilon", alpha_bar=cosine),
    targets=Targets(
        self_attention=r"(down|up)_blocks\.\d+\.\d+\.attention\.(to_q|to_out\.0)",
        joint_attention=r"(down|up)_blocks\.\d+\.\d+\.attention\.(to_k|to_v)",
        io=r"embedding\.1|clf\.1",
        forbidden=r".*\.kv_mapper\..*|clip_(txt|txt_pooled|img)_mapper",
        standard=r"(down|up)_blocks\.\d+\.\d+\.attention\.(to_q|to_k|to_v|to_out\.0)",
    ),
    reference={"clip_image_in_channels": 768, "clip_text_in_channels": 1280, "switch_level": (False,)},
    expects={"in_channels": (16,), "effnet_in_channels": (None,)},  # stage B has 4, and is told the latents of stage C
    guidance_scale=4.0,
    flavours={
        "stage-c": Flavour(
            model="stabilityai/stable-cascade-prior",
            source="diffusers pipelines/stable_cascade/pipeline_stable_cascade_prior.py",
        )
    },
    default_flavour="stage-c",
    options=(DECODER,),
    aliases=("cascade",),
    tiny_latents=(16, 4, 4),
    limits="cannot train on images: diffusers has no EfficientNet-V2-S, which encodes them",
    tiny=tiny,
)


@hookimpl
def load_components(family: Family, request: LoadRequest) -> Components:
    """The prior; the decoder waits for the first validation."""
    from slider_plugin.loading import load_pipeline_components

    components = load_pipeline_components(family, request)
    found = {name: components.scheduler.config.get(name) for name in SCHEDULE}
    if found != SCHEDULE:
        raise UserError(f"{request.model}: the scheduler has {found}, and {family.title} is trained with {SCHEDULE}")
    components.extras["decoder_from"] = _decoder_of(request)
    return components


def _decoder_of(request: LoadRequest) -> str:
    """The user's decoder, or else one inside the prior's folder, or else the published one."""
    chosen: str | None = request.options[DECODER.name]
    inside = Path(request.model).expanduser() / "decoder"
    if chosen is None:
        return str(inside) if (inside / "model_index.json").is_file() else PUBLISHED_DECODER
    folder = Path(chosen).expanduser()
    is_path = folder.is_absolute() or chosen.startswith(".") or chosen.count("/") != 1
    if is_path and not folder.is_dir():
        raise UserError(f"{DECODER.name}: {chosen} does not exist; give the folder of a StableCascadeDecoderPipeline")
    return str(folder) if folder.is_dir() else chosen


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """CLIP-G's last hidden state `(T, D)` and its pooled embedding `(P,)`."""
    from slider_plugin.common.conditioning import per_prompt

    embeds_BTD, pooled_B1P, _, _ = components.pipeline.encode_prompt(
        device=components.denoiser.device,
        batch_size=len(prompts),
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
        prompt=list(prompts),
    )
    return per_prompt(prompt_embeds=embeds_BTD, pooled=pooled_B1P[:, 0])


@hookimpl
def encode_images(family: Family) -> Tensor:
    """Not in this version."""
    raise UserError(f"{family.title} {family.limits}. What needs no images, targets, validation and training on prompts, works")


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """Without an image as a prompt, which is zeros."""
    from slider_plugin.common.conditioning import stacked

    output: Tensor = components.denoiser(
        sample=noisy,
        timestep_ratio=time,
        clip_text_pooled=stacked(conditioning, "pooled")[:, None],
        clip_text=stacked(conditioning, "prompt_embeds"),
        clip_img=noisy.new_zeros(len(noisy), 1, components.denoiser.config.clip_image_in_channels),
        return_dict=False,
    )[0]
    return output


@hookimpl
def build_pipeline(components: Components) -> PriorAndDecoder:
    """Stage C and then the others, which are loaded once."""
    if "decoder" not in components.extras:
        components.extras["decoder"] = _load_decoder(components)
    return PriorAndDecoder(components.pipeline, components.extras["decoder"].to(components.denoiser.device))


def _load_decoder(components: Components) -> Any:
    """The decoder pipeline in the prior's dtype. Raises UserError where it cannot be loaded.

    Part by part: the class of `vqgan` has moved inside diffusers, and the pipeline's own loading does not find it any more.
    """
    from diffusers import DDPMWuerstchenScheduler, StableCascadeDecoderPipeline, StableCascadeUNet
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    source, how = components.extras["decoder_from"], {"dtype": components.denoiser.dtype, "use_safetensors": True}
    models = {"decoder": StableCascadeUNet, "vqgan": PaellaVQModel, "text_encoder": CLIPTextModelWithProjection}
    try:
        return StableCascadeDecoderPipeline(
            **{part: kind.from_pretrained(source, subfolder=part, **how).eval() for part, kind in models.items()},
            tokenizer=CLIPTokenizer.from_pretrained(source, subfolder="tokenizer"),
            scheduler=DDPMWuerstchenScheduler.from_pretrained(source, subfolder="scheduler"),
            latent_dim_scale=StableCascadeDecoderPipeline.load_config(source).get("latent_dim_scale", 10.67),
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{DECODER.name}: {source} could not be loaded as a StableCascadeDecoderPipeline: {reason}") from error


class PriorAndDecoder:
    """The two pipelines behind one call: the prior takes steps and guidance, the decoder has its own defaults for both."""

    def __init__(self, prior: Any, decoder: Any) -> None:
        self.prior = prior
        self.decoder = decoder

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Of both."""
        self.prior.set_progress_bar_config(**settings)
        self.decoder.set_progress_bar_config(**settings)

    def __call__(
        self,
        prompt: Sequence[str],
        generator: Sequence[Any],
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float,
        negative_prompt: Sequence[str] | None = None,
    ) -> Any:
        """Draw; the result has `images`."""
        drawn = self.prior(
            prompt=list(prompt),
            negative_prompt=negative_prompt and list(negative_prompt),
            generator=list(generator),
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        return self.decode(drawn.image_embeddings, prompt=list(prompt), generator=list(generator))

    def decode(self, latents: Tensor, **arguments: Any) -> Any:
        """Images of stage C's latents `(B, C, h, w)`."""
        return self.decoder(latents, **arguments)
