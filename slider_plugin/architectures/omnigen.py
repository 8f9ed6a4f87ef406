"""OmniGen: a language model that reads the prompt's tokens itself and denoises the image behind them by flow matching.

It predicts `x0 - noise` and its time runs from 0 (noise) to 1 (image): its scheduler inverts sigmas. Text attends causally and
the image to everything. Conventions: diffusers pipelines/omnigen/pipeline_omnigen.py:410-479, processor_omnigen.py:124-250,
scripts/convert_omnigen_to_diffusers.py:177.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slider_hooks import (
    Components,
    Conditioning,
    Family,
    Flavour,
    Flow,
    LoadRequest,
    Targets,
    UserError,
    hookimpl,
    one_minus_sigma,
)

if TYPE_CHECKING:
    from torch import Tensor


def text_to_image() -> Any:
    """The class of the pipeline without what it does to given images, which alone needs torchvision."""
    from diffusers import DiffusionPipeline, OmniGenPipeline
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.pipelines.omnigen.processor_omnigen import OmniGenCollator, OmniGenMultiModalProcessor

    class TextProcessor(OmniGenMultiModalProcessor):
        def __init__(self, text_tokenizer: Any) -> None:
            self.text_tokenizer, self.max_image_size, self.collator = text_tokenizer, 1024, OmniGenCollator()

    class OmniGenTextToImagePipeline(OmniGenPipeline):
        def __init__(self, transformer: Any, scheduler: Any, vae: Any, tokenizer: Any) -> None:
            DiffusionPipeline.__init__(self)
            self.register_modules(vae=vae, tokenizer=tokenizer, transformer=transformer, scheduler=scheduler)
            self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
            self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor * 2)
            self.multimodal_processor = TextProcessor(tokenizer)
            self.default_sample_size = 128

    return OmniGenTextToImagePipeline


def tiny(folder: Path) -> None:
    """Write a random pipeline of real classes: 4x4 latents, 4 tokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler, OmniGenTransformer2DModel
    from transformers import LlamaTokenizer

    from slider_plugin.testing import tiny as parts

    with parts.seeded(0):
        tokenizer = parts.trained_tokenizer(LlamaTokenizer)
        transformer = OmniGenTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=32,
            num_layers=2,
            pad_token_id=0,
            vocab_size=len(tokenizer),
            rope_scaling={"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
            pos_embed_max_size=16,
            time_step_dim=16,
        )
        text_to_image()(
            # The processor counts on 8 pixels to a latent.
            vae=parts.autoencoder(latent_channels=4, shift_factor=None, blocks=4),
            tokenizer=tokenizer,
            transformer=parts.redraw_zeros(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1),
        ).save_pretrained(folder)


FAMILY = Family(
    name="omnigen",
    title="OmniGen",
    denoiser="transformer",
    denoiser_class="OmniGenTransformer2DModel",
    pipeline_class="OmniGenPipeline",
    noise=Flow(sign=-1, time=one_minus_sigma),
    targets=Targets(
        joint_attention=r"layers\.\d+\.self_attn\.(to_q|to_k|to_v|to_out\.0)",
        io=r"patch_embedding\.output_image_proj|proj_out",
        time=r"(time_token|t_embedder)\.linear_[12]",
        standard=r"layers\.\d+\.self_attn\.(to_q|to_k|to_v|to_out\.0)",
    ),
    reference={"rope_scaling": {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48}},  # sizes; the values are no geometry
    guidance_scale=2.5,
    flavours={
        "v1": Flavour(model="Shitao/OmniGen-v1-diffusers", source="diffusers source: pipelines/omnigen/pipeline_omnigen.py")
    },
    default_flavour="v1",
    tiny=tiny,
    limits="text to image only: given images reach no training step",
)


@hookimpl
def load_components(family: Family, request: LoadRequest) -> Components:
    """The pipeline's parts, around them the pipeline that needs no torchvision."""
    from slider_plugin.loading import check_folder, model_folder, refuse_without_weights

    refuse_without_weights(family)
    folder = model_folder(family, request.model)
    if folder is not None:
        check_folder(family, folder)
    try:
        pipeline = text_to_image().from_pretrained(
            request.model, dtype=request.dtype, use_safetensors=True, revision=request.revision, variant=request.variant
        )
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{request.model} could not be loaded as a {family.title} pipeline: {reason}") from error
    for part in (pipeline.transformer, pipeline.vae):
        part.requires_grad_(False).eval()
    return Components(
        denoiser=pipeline.transformer,
        pipeline=pipeline,
        scheduler=pipeline.scheduler,
        prediction="flow",
        options=request.options,
    )


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """Token numbers of the instruction around each prompt, `(T, 1)`: the denoiser embeds them itself."""
    import torch

    processor, device = components.pipeline.multimodal_processor, components.denoiser.device
    rows = [processor.process_multi_modal_prompt(prompt, None)["input_ids"] for prompt in prompts]
    return [{"input_ids": torch.tensor(row, device=device).unsqueeze(1)} for row in rows]


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """The sequence is text, time, image. One call for each length of text: all in a call are turned by one's positions."""
    import torch

    from slider_plugin.common.conditioning import by_length, stacked

    patch = components.denoiser.config.patch_size
    N = noisy.shape[-2] * noisy.shape[-1] // patch**2

    def call(places: list[int]) -> Tensor:
        ids_BT = stacked([conditioning[i] for i in places], "input_ids").squeeze(2)
        B, T = ids_BT.shape
        row_S = torch.arange(T + 1 + N, device=noisy.device)
        sees_SS = (row_S[None, :] <= row_S[:, None]) | (row_S[:, None] > T)
        answer: Tensor = components.denoiser(
            hidden_states=noisy[places],
            timestep=time[places],
            input_ids=ids_BT,
            input_img_latents=[],
            input_image_sizes={},
            attention_mask=sees_SS.long().expand(B, -1, -1),
            position_ids=row_S.expand(B, -1),
            return_dict=False,
        )[0]
        return answer

    return by_length(conditioning, "input_ids", call)
