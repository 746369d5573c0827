"""What a user may choose about the memory and the kernels of a backbone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from calibri_lightning.backbones.quantisation import Quantization
from calibri_lightning.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

TextEncoders = Literal["offload", "keep", "cpu", "drop"]


@dataclass(frozen=True)
class MemoryOptions:
    """How a backbone uses memory.

    Attributes:
        text_encoders: Where the text encoders are. offload: on the device while a new text is encoded, else on the
            CPU. keep: on the device. cpu: on the CPU, also to encode, where they do not fit beside the transformer.
            drop: as offload, but all texts of the run are encoded when it starts, and then the encoders are removed.
        embedding_cache: Folder in which embeddings are kept from run to run; none by default, for ten thousand
            prompts of a large model fill 30 GB.
        vae_slicing: Decode one picture at a time; otherwise 4 million pixels at once.
        vae_tiling: Decode pictures that are larger than the autoencoder's training size in overlapping tiles; seams
            are blended, so pictures change a little.
        vae_channels_last: Store the autoencoder's weights with channels last, which many GPUs convolve faster.
        attention_backend: One of diffusers' attention back ends, such as _native_cudnn or flash; by default torch's
            own choice.
        quantization: Quantise the transformer when it is loaded, with bitsandbytes or torchao. Scales act as before;
            such a model cannot be folded.
    """

    text_encoders: TextEncoders = "offload"
    embedding_cache: str | None = None
    vae_slicing: bool = False
    vae_tiling: bool = False
    vae_channels_last: bool = False
    attention_backend: str | None = None
    quantization: Quantization | None = None


def set_up_vae(pipe: DiffusionPipeline, options: MemoryOptions) -> None:
    """Applies what concerns the autoencoder.

    Args:
        pipe: The pipeline, changed in place.
        options: The choices.

    Raises:
        UserError: If the autoencoder cannot do what is asked.
    """
    vae: Any = pipe.vae
    for wanted, name in ((options.vae_slicing, "slicing"), (options.vae_tiling, "tiling")):
        if not wanted:
            continue
        if not hasattr(vae, f"use_{name}"):
            raise UserError(
                f"memory.vae_{name} is true, but {type(vae).__name__}, this model's autoencoder, knows no {name}. "
                f"Leave vae_{name} out."
            )
        getattr(vae, f"enable_{name}")()
    if options.vae_channels_last:
        if any(parameter.dim() == 5 for parameter in vae.parameters()):
            raise UserError(
                f"memory.vae_channels_last is true, but {type(vae).__name__}, this model's autoencoder, convolves "
                "videos, not pictures. Leave vae_channels_last out."
            )
        vae.to(memory_format=torch.channels_last)


def check_attention_backend(transformer: nn.Module, backend: str) -> None:
    """Refuses an attention back end that is unknown, not installed, or would have no effect.

    Args:
        transformer: The transformer.
        backend: The name.

    Raises:
        UserError: If it cannot be used.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements

    known = [name.value for name in AttentionBackendName]
    if backend not in known:
        raise UserError(
            f"memory.attention_backend is {backend!r}; diffusers has {', '.join(sorted(known))}. Choose one of these."
        )
    if not any(hasattr(getattr(module, "processor", None), "_attention_backend") for module in transformer.modules()):
        raise UserError(
            f"memory.attention_backend is {backend!r}, but the attention of {type(transformer).__name__} calls torch's "
            "own kernels directly, whatever back end is set. Leave attention_backend out for this model."
        )
    try:
        _check_attention_backend_requirements(AttentionBackendName(backend))
    except RuntimeError as error:
        raise UserError(f"memory.attention_backend {backend!r} cannot be used here: {error}") from error


def use_attention_backend(transformer: Any, backend: str, forward: Callable[[], object]) -> None:
    """Makes a transformer attend with another back end; diffusers may fetch a kernel from the Hub for it.

    Args:
        transformer: The transformer, on the device where it will run.
        backend: The name, checked.
        forward: Runs the transformer once, which shows whether the back end takes its device, types and masks.

    Raises:
        UserError: If it does not.
    """
    from diffusers.utils import logging

    # It warns at every call that back ends are experimental.
    logger = logging.get_logger("diffusers.models.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        transformer.set_attention_backend(backend)
        forward()
    # Kernels refuse devices, types, masks and head sizes, each with an exception of its own choice.
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise UserError(
            f"memory.attention_backend is {backend!r}, which {type(transformer).__name__} cannot use here "
            f"({type(error).__name__}: {reason}). Choose another, or leave it out."
        ) from error
    finally:
        logger.setLevel(level)
