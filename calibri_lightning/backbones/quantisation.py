"""Quantised transformers: which libraries do it, and what they are told."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from calibri_lightning.errors import UserError

if TYPE_CHECKING:
    import torch

Quantization = Literal["bnb-int8", "bnb-nf4", "torchao-int8"]
"""8 bits (LLM.int8) or 4 bits (NF4) by bitsandbytes, 8-bit weights by torchao."""

_PACKAGES = {"bnb": "bitsandbytes", "torchao": "torchao"}


def quantization_config(kind: Quantization, dtype: torch.dtype) -> Any:
    """Says it in diffusers' words.

    Args:
        kind: How to quantise.
        dtype: Type in which the quantised layers compute.

    Returns:
        A quantisation config of diffusers, for the transformer's `from_pretrained`.

    Raises:
        UserError: If the package that does it is not installed, or refuses.
    """
    package = _PACKAGES[kind.partition("-")[0]]
    if find_spec(package) is None:
        raise UserError(
            f"memory.quantization is {kind}, which needs the package {package}. Install it (pip install {package}), or "
            "leave quantization out."
        )
    from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, TorchAoConfig

    try:
        if kind == "torchao-int8":
            from torchao.quantization import Int8WeightOnlyConfig

            config = TorchAoConfig(Int8WeightOnlyConfig())
        elif kind == "bnb-nf4":
            config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        else:
            config = BitsAndBytesConfig(load_in_8bit=True)
        PipelineQuantizationConfig(quant_mapping={"transformer": config})  # checks it
    # Each library has its own way to say that it is too old.
    except Exception as error:
        raise UserError(
            f"memory.quantization {kind} cannot be used here ({type(error).__name__}: {error}). Update {package}, or "
            "leave quantization out."
        ) from error
    return config
