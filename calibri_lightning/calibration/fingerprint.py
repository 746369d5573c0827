"""Tells whether two transformers are the same model as far as a calibration is concerned."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from calibri_lightning.adapters.files import adapter_digest
from calibri_lightning.adapters.lora import plain_name
from calibri_lightning.calibration.sites import find_sites, unwrap

_HEADS = (
    "num_attention_heads",
    "attention_head_dim",
    "num_heads",
    "n_heads",
    "n_kv_heads",
    "num_kv_heads",
    "num_key_value_heads",
    "num_cross_attention_heads",
    "cross_attention_head_dim",
    "text_num_attention_heads",
    "text_num_key_value_heads",
)
"""What of an architecture its weights do not show: how attention divides their columns among heads.

A fixed list, because defaults that diffusers adds to a configuration from release to release must not turn an old file
away; nor do sizes of pictures matter.
"""
_SAMPLED = 32
"""Values of each parameter that a digest looks at."""


@dataclass(frozen=True)
class ModelFingerprint:
    """The model that a calibration belongs to."""

    transformer_class: str
    num_parameters: int
    """Parameters of the transformer, LoRA not counted."""
    sites_hash: str
    """sha256 over class, site names, shapes of all weights and division into heads."""
    name: str
    """Folder or hub id that the model came from; for people, not compared."""


def fingerprint(transformer: nn.Module, name: str = "") -> ModelFingerprint:
    """Describes a transformer well enough to tell whether a calibration fits it.

    Args:
        transformer: The transformer.
        name: Folder or hub id that it came from.

    Returns:
        The fingerprint.

    Raises:
        UserError: If the transformer has no known sites.
    """
    sites = [site.name for site in find_sites(transformer)]
    transformer = unwrap(transformer)
    config, shapes = dict(getattr(transformer, "config", {})), _shapes(transformer)
    heads = {key: config[key] for key in _HEADS if config.get(key) is not None}
    described = json.dumps([type(transformer).__name__, sites, heads, shapes], sort_keys=True)
    num_parameters = sum(math.prod(shape) for shape in shapes)
    return ModelFingerprint(
        type(transformer).__name__, num_parameters, hashlib.sha256(described.encode()).hexdigest(), name
    )


def _shapes(transformer: nn.Module) -> list[list[int]]:
    """Shapes of all weights, those of a LoRA not counted, sorted: their names change from release to release.

    Quantised weights are packed, so the shapes are those of a model without numbers, built from the configuration.
    """
    if getattr(transformer, "hf_quantizer", None) is not None:
        known = inspect.signature(type(transformer).__init__).parameters
        config: Any = transformer.config
        with torch.device("meta"):
            transformer = type(transformer)(**{key: value for key, value in config.items() if key in known})
    return sorted(list(p.shape) for name, p in transformer.named_parameters() if ".lora_" not in name)


def weights_digest(transformer: nn.Module, with_adapter: bool = False, trained: Collection[str] = ()) -> str:
    """Tells fine-tunes of one model apart, at no more than a moment's cost: a few values of each fixed parameter.

    Args:
        transformer: The transformer.
        with_adapter: Count a fixed LoRA, too: all its numbers, and how strongly it acts. By default the digest is that
            of the model under it.
        trained: Names of parameters that do not count, since training changes them. Whether they want gradients does
            not tell: where strategies take turns, they do so in some turns alone.

    Returns:
        16 hexadecimal digits of a sha256.

    Raises:
        UserError: If a LoRA is to be counted and there are several.
    """
    transformer = unwrap(transformer)
    left_out = frozenset(trained)
    every = [(plain_name(name), p.detach()) for name, p in transformer.named_parameters() if name not in left_out]
    frozen = [(name, parameter) for name, parameter in every if ".lora_" not in name]
    # One transfer from the device, not one a parameter.
    sampled = [part for _, p in frozen for part in sampled_values(p)]
    content = "\n".join(name for name, _ in frozen).encode()
    # None is left where all weights are trained.
    content += torch.cat(sampled).cpu().numpy().tobytes() if sampled else b""
    if with_adapter and len(every) > len(frozen):
        content += adapter_digest(transformer).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def sampled_values(parameter: Tensor) -> list[Tensor]:
    """Looks at a few values of a parameter, evenly spread.

    Args:
        parameter: The parameter.

    Returns:
        At most 32 values, float32, on its device; of a quantised one, as many of each part.
    """
    plain = _plain_tensors(parameter)
    return [t.flatten()[:: max(1, t.numel() // _SAMPLED)][:_SAMPLED].float() for t in plain]


def _plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """What a tensor is made of: itself, or the parts of a quantised one (torchao), which can do little by itself."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain_tensors(getattr(tensor, name))
