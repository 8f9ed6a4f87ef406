"""Cosmos 3: a language model and a generator side by side, whose tokens share their attention, by flow matching.

The language model reads the prompt's tokens itself. Its projections have the plain names; those that diffusers calls `add_*`
are the generator's, which sees images (models/transformers/transformer_cosmos3.py:50-122). Conventions:
pipelines/cosmos/pipeline_cosmos3_omni.py:507-619, 1132-1222, 1730-1915. The sentences that the pipeline can add about size and
length are left out, in training and in drawing: a prompt is encoded before its images' sizes are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slider_hooks import Components, Conditioning, Family, Flavour, Flow, Targets, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

FPS = 24.0  # the pipeline's default, which counts for the positions of frames
PLAIN = {"add_resolution_template": False, "add_duration_template": False}


def tiny(folder: Path) -> None:
    """Write a random pipeline of real classes: 4x4 latents, 8 tokens in two latent frames."""
    from diffusers import AutoencoderKLWan, Cosmos3OmniPipeline, Cosmos3OmniTransformer, UniPCMultistepScheduler

    from slider_plugin.testing import tiny as parts

    with parts.seeded(0):
        tokenizer = parts.qwen_tokenizer(extra=["<|vision_start|>"])
        transformer = Cosmos3OmniTransformer(
            head_dim=16,
            hidden_size=32,
            intermediate_size=32,
            latent_channel=16,
            patch_latent_dim=64,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_hidden_layers=2,
            vocab_size=len(tokenizer),
            rope_axes_dim=[4, 2, 2],
        )
        Cosmos3OmniPipeline(
            transformer=parts.redraw_zeros(transformer),
            text_tokenizer=tokenizer,
            vae=AutoencoderKLWan(base_dim=4, num_res_blocks=1),
            scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
            enable_safety_checker=False,
        ).save_pretrained(folder)


FAMILY = Family(
    name="cosmos3",
    title="Cosmos 3",
    denoiser="transformer",
    denoiser_class="Cosmos3OmniTransformer",
    pipeline_class="Cosmos3OmniPipeline",
    # Sound is not trained, and the checker would need a package of its own.
    load_kwargs={"sound_tokenizer": None, "safety_checker": None, "enable_safety_checker": False},
    noise=Flow(),
    targets=Targets(
        self_attention=r"layers\.\d+\.self_attn\.(add_[qkv]_proj|to_add_out)",
        io=r"proj_in|proj_out",
        time=r"time_embedder\.linear_[12]",
        weight_read=r"time_embedder\.linear_[12]",
        forbidden=r"layers\.\d+\.(self_attn\.to_(q|k|v|out)|mlp\..+)|lm_head",
        standard=r"layers\.\d+\.self_attn\.(add_[qkv]_proj|to_add_out)",
    ),
    modalities=("image", "video"),
    guidance_scale=6.0,
    flavours={"nano": Flavour(model="nvidia/Cosmos3-Nano", source="diffusers docs: api/pipelines/cosmos3.md")},
    default_flavour="nano",
    tiny=tiny,
    limits="image and video only: sound and actions are neither trained nor drawn",
)


@hookimpl
def encode_prompts(components: Components, prompts: Sequence[str]) -> Sequence[Conditioning]:
    """Token numbers `(T, 1)`, which the denoiser embeds itself, behind the instruction for an image and that for a video."""
    import torch

    def ids(prompt: str, num_frames: int) -> Tensor:
        row, _ = components.pipeline.tokenize_prompt(prompt, num_frames=num_frames, **PLAIN)
        return torch.tensor(row, device=components.denoiser.device).unsqueeze(1)

    return [{"image_ids": ids(prompt, 1), "video_ids": ids(prompt, 2)} for prompt in prompts]


@hookimpl
def encode_images(components: Components, images: Tensor) -> Tensor:
    """`(B, 3, F, H, W)` to `(B, C, f, h, w)`, normalised by the statistics of each channel."""
    from slider_plugin.common.latents import normalised_by_channel

    return normalised_by_channel(components.pipeline.vae, images)


@hookimpl
def predict(components: Components, noisy: Tensor, time: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
    """One call for each sample: the denoiser takes one sequence, text in front."""
    import torch

    name = "image_ids" if noisy.shape[2] == 1 else "video_ids"
    rows = zip(noisy.split(1), time, conditioning, strict=True)
    return torch.cat([_answer(components, noisy_1Cfhw, t, c[name].squeeze(1)) for noisy_1Cfhw, t, c in rows])


def _answer(components: Components, noisy_1Cfhw: Tensor, time: Tensor, ids_T: Tensor) -> Tensor:
    import torch

    pipeline, device = components.pipeline, noisy_1Cfhw.device
    text = pipeline._prepare_text_segment(ids_T.tolist(), device)
    vision = pipeline._prepare_vision_segment(
        noisy_1Cfhw,
        has_image_condition=False,
        mrope_offset=text["vision_start_temporal_offset"],
        vision_fps=FPS,
        curr=text["und_len"],
        device=device,
    )
    predictions, _, _ = components.denoiser(
        input_ids=text["input_ids"],
        text_indexes=text["text_indexes"],
        position_ids=torch.cat([text["text_mrope_ids"], vision["vision_mrope_ids"]], dim=1),
        und_len=text["und_len"],
        sequence_length=text["und_len"] + vision["num_vision_tokens"],
        vision_tokens=[noisy_1Cfhw.to(components.denoiser.dtype)],
        vision_token_shapes=vision["vision_token_shapes"],
        vision_sequence_indexes=vision["vision_sequence_indexes"],
        vision_mse_loss_indexes=vision["vision_mse_loss_indexes"],
        vision_timesteps=time.expand(vision["num_noisy_vision_tokens"]),
        vision_noisy_frame_indexes=vision["vision_noisy_frame_indexes"],
        return_dict=False,
    )
    answer: Tensor = predictions[0]
    return answer


@hookimpl
def build_pipeline(components: Components) -> Any:
    """The pipeline, which draws one prompt at a time, called for each."""
    from types import SimpleNamespace

    from slider_plugin.common.calls import PipelineCall

    class OneByOne(PipelineCall):
        def __call__(
            self, prompt: list[str], generator: list[Any], negative_prompt: list[str] | None = None, **arguments: Any
        ) -> Any:
            rows = zip(prompt, negative_prompt or [""] * len(prompt), generator, strict=True)  # None means "" there, too
            drawn = [self.pipeline(p, n, generator=g, **PLAIN, **arguments) for p, n, g in rows]
            return SimpleNamespace(frames=[one.video for one in drawn])

    return OneByOne(components.pipeline)
