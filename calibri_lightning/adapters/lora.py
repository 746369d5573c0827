"""A LoRA on a diffusers transformer, by peft: the transformer keeps its class, and gains parameters.

Low-rank adaptation (Hu et al., arXiv 2106.09685, section 4.1): W x becomes W x + (alpha / r) B A x. A is drawn from a
normal distribution of deviation 1 / r, as Flow-GRPO does it (peft's `init_lora_weights="gaussian"`), and B is 0, so
that the model starts as it was, bit for bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from calibri_lightning.adapters.targets import default_targets, expand, matches
from calibri_lightning.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig

NAME = "default"
"""What the one adapter of a transformer is called inside peft."""


@dataclass
class LoraOptions:
    """The LoRA that is trained.

    Attributes:
        rank: Rank of each update; more can learn more, and costs more memory.
        alpha: Strength: updates are multiplied by alpha / rank. None is twice the rank, as in Flow-GRPO.
        targets: Layers to train, by the ends of their names, such as attn.to_q; * stands for anything. None is what
            Flow-GRPO trains in this family, and all attention projections elsewhere.
    """

    rank: int = 32
    alpha: float | None = None
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            UserError: If one is out of its range.
        """
        if self.rank < 1 or not (math.isfinite(self.strength) and self.strength > 0):
            raise UserError(
                f"lora.rank is {self.rank} and lora.alpha {self.alpha}. The rank is at least 1, and alpha a positive "
                "number, or left out for twice the rank."
            )

    @property
    def strength(self) -> float:
        """Alpha, whoever chose it."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


def add_lora(transformer: nn.Module, options: LoraOptions, seed: int) -> None:
    """Puts a new LoRA onto a transformer, in place; the outputs stay what they were, bit for bit.

    The LoRA is float32 whatever the transformer is, and what it starts from depends on the seed and the layers' names
    alone. Its parameters want gradients, all others of the transformer do not. It has no dropout. Add it before the
    calibration's hooks are attached.

    Args:
        transformer: A diffusers transformer.
        options: The LoRA.
        seed: Where its numbers come from.

    Raises:
        UserError: If a target matches nothing, or the transformer has a LoRA already.
    """
    from peft import LoraConfig

    refuse_second(transformer)
    patterns = default_targets(transformer) if options.targets is None else tuple(options.targets)
    layers = expand(transformer, patterns)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.strength,
        lora_dropout=0.0,
        init_lora_weights="gaussian",
        target_modules=_as_peft_says_it(transformer, patterns, layers),
    )
    inject(transformer, config)
    for name, parameter in lora_parameters(transformer).items():
        parameter.requires_grad_(True)
        if ".lora_A." in name:
            key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / options.rank)
        else:
            parameter.data.zero_()


def inject(transformer: nn.Module, config: LoraConfig) -> None:
    """Puts LoRA layers in place, frozen and float32, in the mode (train or eval) of the transformer.

    Args:
        transformer: The transformer; changed in place.
        config: peft's configuration, whose targets all exist.
    """
    from peft import inject_adapter_in_model

    wants = {name: parameter.requires_grad for name, parameter in transformer.named_parameters()}
    # peft draws what is overwritten afterwards, and nobody's random numbers shall move by it.
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, transformer, NAME)
    for name, parameter in transformer.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(False)
        else:
            parameter.requires_grad_(wants[plain_name(name)])
    for layer in lora_layers(transformer).values():
        layer.train(transformer.training)
    _tell_diffusers(transformer, True)


def refuse_second(transformer: nn.Module) -> None:
    """Refuses a transformer that has an adapter.

    Args:
        transformer: The transformer.

    Raises:
        UserError: If it has.
    """
    if lora_layers(transformer):
        raise UserError(
            f"This {type(transformer).__name__} has a LoRA already, and one acts at a time. Train the one it has, "
            "merge it into the weights (load_adapter(..., merge=True)), or load the model anew."
        )


def lora_layers(transformer: nn.Module) -> dict[str, Any]:
    """Finds the layers that carry a LoRA.

    Args:
        transformer: The transformer.

    Returns:
        peft's layers by name; none for a transformer without a LoRA.
    """
    # Whoever has none needs no peft.
    if not any(hasattr(module, "base_layer") for module in transformer.modules()):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}


def lora_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """Finds the numbers of a LoRA.

    Args:
        transformer: The transformer.

    Returns:
        Parameters by name, in the transformer's order.
    """
    return {name: parameter for name, parameter in transformer.named_parameters() if ".lora_" in name}


def plain_name(name: str) -> str:
    """Names a parameter of a model as it is called without a LoRA.

    Args:
        name: Its name, with or without.

    Returns:
        The name without.
    """
    return name.replace(".base_layer.", ".")


@contextmanager
def without_lora(transformer: nn.Module) -> Iterator[None]:
    """Switches a LoRA off, trained or fixed: inside the `with`, the model is the one it was put on, bit for bit.

    Args:
        transformer: The transformer; one without a LoRA stays as it is.

    Yields:
        Nothing.
    """
    layers = [layer for layer in lora_layers(transformer).values() if not layer.disable_adapters]
    wants = {parameter: parameter.requires_grad for parameter in lora_parameters(transformer).values()}
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        # peft lets every adapter that it switches on want gradients, also a fixed one.
        for parameter, wanted in wants.items():
            parameter.requires_grad_(wanted)


def remove_lora(transformer: nn.Module, merge: bool = False) -> None:
    """Takes a LoRA off, in place: the names of the parameters are again those of the plain model.

    Args:
        transformer: The transformer; one without a LoRA stays as it is.
        merge: Add it to the weights first, so that the outputs stay (up to rounding).
    """
    for name, layer in lora_layers(transformer).items():
        if merge:
            layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(transformer.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(transformer, "peft_config"):
        del transformer.peft_config
    _tell_diffusers(transformer, False)


def _tell_diffusers(transformer: Any, has_adapter: bool) -> None:
    """Sets what diffusers asks to know whether a model has an adapter."""
    if hasattr(transformer, "_hf_peft_config_loaded"):
        transformer._hf_peft_config_loaded = has_adapter


def _as_peft_says_it(transformer: nn.Module, patterns: tuple[str, ...], layers: tuple[str, ...]) -> list[str]:
    """Ends of names as they are, where peft takes them to mean the same layers; else the layers one by one."""
    ends = any("*" in pattern or "?" in pattern or "[" in pattern for pattern in patterns)
    modules = (name for name, _ in transformer.named_modules())
    same = not ends and {name for name in modules if any(matches(name, p) for p in patterns)} == set(layers)
    return list(patterns if same else layers)
