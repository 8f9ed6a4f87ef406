"""HiDream-I1: double and single blocks with mixtures of experts for flow matching, conditioned on two CLIPs, T5 and Llama 3.1.

Its output is the negated velocity: diffusers pipelines/hidream_image/pipeline_hidream_image.py:905-949,
examples/dreambooth/train_dreambooth_lora_hidream.py:1603-1618.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slider_hooks import (
    Components,
    Conditioning,
    Family,
    Flavour,
    Flow,
    LoadRequest,
    Option,
    Targets,
    UserError,
    hookimpl,
)

if TYPE_CHECKING:
    from torch import Tensor

LLAMA = Option(
    name="hidream_llama",
    type=str,
    default="meta-llama/Meta-Llama-3.1-8B-Instruct",
    help="folder or hub id of Llama 3.1 8B Instruct, for a model that comes without it, as the published ones do",
)
DOCS = "diffusers docs: api/pipelines/hidream.md"


def tiny(folder: Path) -> None:
    """Write a random pipeline of real classes: 8x8 latents, 16 tokens, Llama included."""
    from diffusers import FlowMatchEulerDiscreteScheduler, HiDreamImagePipeline, HiDreamImageTransformer2DModel
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

    from slider_plugin.testing import tiny as parts

    with parts.seeded(0):
        text_encoder, tokenizer = parts.clip(hidden_size=16, length=128, projection=True)
        text_encoder_2, tokenizer_2 = parts.clip(hidden_size=24, length=128, projection=True)
        text_encoder_3, tokenizer_3 = parts.t5(hidden_size=32)
        tokenizer_4 = parts.trained_tokenizer(LlamaTokenizer)
        transformer = HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_channels=[32, 16],
            text_emb_dim=40,
            axes_dims_rope=(8, 4, 4),
            max_resolution=(16, 16),
            llama_layers=[0, 2],
        )
        HiDreamImagePipeline(
            vae=parts.autoencoder(latent_channels=4),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
            text_encoder_4=LlamaForCausalLM(LlamaConfig(**parts.decoder_sizes(16, len(tokenizer_4)))),
            tokenizer_4=tokenizer_4,
            transformer=parts.redraw_zeros(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        ).save_pretrained(folder)


FAMILY = Family(
    name="hidream",
    title="HiDream-I1",
    denoiser="transformer",
    denoiser_class="HiDreamImageTransformer2DModel",
    pipeline_class="HiDreamImagePipeline",
    noise=Flow(sign=-1, shift=3.0),  # the shift of Full, whose scheduler (UniPC) names it `flow_shift`
    targets=Targets(
        self_attention=r"double_stream_blocks\.\d+\.block\.attn1\.(to_q|to_k|to_v|to_out)",
        joint_attention=r"single_stream_blocks\.\d+\.block\.attn1\.(to_q|to_k|to_v|to_out)",
        io=r"x_embedder\.proj|final_layer\.linear",
        time=r"t_embedder\.timestep_embedder\.linear_[12]",
        forbidden=r".*\.to_(q|k|v|out)_t|.*\.ff_t\..+|caption_projection\..+|p_embedder\..+",
        standard=r"(double|single)_stream_blocks\.\d+\.block\.attn1\.(to_q|to_k|to_v|to_out)",
    ),
    reference={
        "patch_size": 2,
        "in_channels": 16,
        "caption_channels": [4096, 4096],
        "llama_layers": [*range(32), *[31] * 16],
    },
    expects={"force_inference_output": (False, None)},  # the experts would pass no gradient on
    guidance_scale=5.0,
    flavours={
        "full": Flavour(model="HiDream-ai/HiDream-I1-Full", source=DOCS),
        "dev": Flavour(model="HiDream-ai/HiDream-I1-Dev", source=DOCS),
        "fast": Flavour(model="HiDream-ai/HiDream-I1-Fast", source=DOCS),
    },
    default_flavour="full",
    options=(LLAMA,),
    aliases=("hidream_i1",),
    tiny=tiny,
)


@hookimpl
def load_components(family: Family, request: LoadRequest) -> Components:
    """The published models lack their fourth text encoder, which has a licence of its own."""
    from slider_plugin.loading import check_folder, load_pipeline_components, model_folder

    folder = model_folder(family, request.model)
    if folder is not None:
        check_folder(family, folder)  # before Llama is loaded for a wrong model
    if folder is None or not (folder / "text_encoder_4").is_dir():
        family = replace(family, load_kwargs=_llama(request))
    return load_pipeline_components(family, request)


def _llama(request: LoadRequest) -> dict[str, Any]:
    """Llama and its tokenizer, as the pipeline's parts."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    place = request.options[LLAMA.name]
    try:
        encoder = LlamaForCausalLM.from_pretrained(place, dtype=request.dtype, use_safetensors=True)
        return {"text_encoder_4": encoder, "tokenizer_4": AutoTokenizer.from_pretrained(place)}
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UserError(
            f"{LLAMA.name}: Llama could not be loaded from {place}: {reason}. "
            "Give the folder of Llama 3.1 8B Instruct, or get access to it on the hub"
        ) from error


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """T5's tokens `(T, D)`, all layers of Llama's `(T, L, D)` and the pooled embeddings of both CLIPs `(P,)`."""
    from slider_plugin.common.conditioning import per_prompt

    t5_BTD, _, llama_LBTD, _, pooled_BP, _ = components.pipeline.encode_prompt(
        list(prompts), device=components.denoiser.device, do_classifier_free_guidance=False
    )
    return per_prompt(t5=t5_BTD, llama=llama_LBTD.permute(1, 2, 0, 3), pooled=pooled_BP)


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """In evaluation mode diffusers runs the routed experts under `no_grad` (transformer_hidream_image.py:385).

    So their layers alone are told that they are training: they compute the same, and the gradient goes through them.
    """
    from slider_plugin.common.conditioning import stacked

    for holder in (*components.denoiser.double_stream_blocks, *components.denoiser.single_stream_blocks):
        holder.block.ff_i.training = True
    output: Tensor = components.denoiser(
        hidden_states=noisy,
        timesteps=time,
        encoder_hidden_states_t5=stacked(conditioning, "t5"),
        encoder_hidden_states_llama3=stacked(conditioning, "llama").permute(2, 0, 1, 3),
        pooled_embeds=stacked(conditioning, "pooled"),
        return_dict=False,
    )[0]
    return output


@hookimpl
def build_pipeline(components: Components) -> Any:
    """The pipeline, drawing at the size that is asked for: by itself it brings every size to an area of 1024x1024."""
    from diffusers import HiDreamImagePipeline

    class AtTheAskedSize(HiDreamImagePipeline):
        def __call__(self, height: int, width: int, **arguments: Any) -> Any:
            side = (height * width) ** 0.5 / self.vae_scale_factor
            self.default_sample_size = side * (1 + 1e-6)  # what it scales the area to; a hair more, since it rounds down
            return super().__call__(height=height, width=width, **arguments)

    return AtTheAskedSize(**components.pipeline.components)
