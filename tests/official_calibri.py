"""The official Calibri code in a few lines, written from its description and not from ours: what vectors do."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from site_models import CASES, Tiny
from torch import Tensor, nn

Tables = list[dict[nn.Module, dict[int, float]]]
"""For each member: the scale of each element of a module's output tuple."""


def tiny(class_name: str) -> Tiny:
    return next(case for case in CASES if type(case.tiny().transformer).__name__ == class_name).tiny()


def tables(transformer: Any, solution: list[float], num_members: int, granularity: str) -> Tables:
    """Takes a vector apart."""
    numbers = iter(solution)
    members: Tables = [{} for _ in range(num_members)]
    name = type(transformer).__name__
    if name == "FluxTransformer2DModel":
        _flux(transformer, members, numbers, granularity)
    elif name == "SD3Transformer2DModel":
        _sd3(transformer, members, numbers)
    else:
        for member in members:
            for block in transformer.transformer_blocks:
                member[block.attn] = {0: next(numbers), 1: next(numbers)}
                member[block.img_mlp] = {0: next(numbers)}
                member[block.txt_mlp] = {0: next(numbers)}
    assert len(list(numbers)) == num_members, "the weights are left"
    return members


def _flux(transformer: Any, members: Tables, numbers: Iterator[float], granularity: str) -> None:
    for member in members:
        for block in transformer.transformer_blocks:
            attn = next(numbers)
            mlp = attn if granularity == "block" else next(numbers)
            member[block.norm1] = {1: attn, 4: mlp}
            member[block.norm1_context] = {1: attn, 4: mlp}
    if granularity == "gate":
        for member in members:
            for block in transformer.transformer_blocks:
                member[block.norm1_context] = {1: next(numbers), 4: next(numbers)}
    for member in members:
        for block in transformer.single_transformer_blocks:
            member[block.norm] = {1: next(numbers)}


def _sd3(transformer: Any, members: Tables, numbers: Iterator[float]) -> None:
    for member in members:
        for block in transformer.transformer_blocks:
            member[block.norm1] = {1: next(numbers), 4: next(numbers)}
    for member in members:
        for block in transformer.transformer_blocks:
            if not block.context_pre_only:
                member[block.norm1_context] = {1: next(numbers), 4: next(numbers)}
    for member in members:
        for block in transformer.transformer_blocks:
            if block.use_dual_attention:
                member[block.norm1][6] = next(numbers)


def run(model: Tiny, members: Tables, weights: list[float]) -> Tensor:
    """F = sum of weight x velocity; of a guided pair the second member sees the negative prompt."""
    guided = type(model.transformer).__name__ != "FluxTransformer2DModel"
    total: Any = 0.0
    for m, (table, weight) in enumerate(zip(members, weights, strict=True)):
        handles = [module.register_forward_hook(_hook(scales)) for module, scales in table.items()]
        try:
            total = total + weight * seeing(model, guided and m == 1)()
        finally:
            for handle in handles:
                handle.remove()
    return total


def seeing(model: Tiny, negative: bool) -> Tiny:
    """The same latents, with another sample's text for the negative prompt."""
    if not negative:
        return model
    text = model.batched["encoder_hidden_states"].roll(1, 0)
    return Tiny(model.transformer, {**model.batched, "encoder_hidden_states": text}, model.shared)


def _hook(scales: dict[int, float]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, tuple | list):  # so Qwen-Image's MLPs are left alone
            return output
        return tuple(part * scales[i] if i in scales else part for i, part in enumerate(output))

    return hook


def vector(num_numbers: int, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [draw.uniform(-1.0, 2.0) for _ in range(num_numbers)]


def document(solution: list[float], shapes: dict[str, int]) -> dict[str, Any]:
    return {
        "step": 400,
        "train_best": 13.371999740600586,
        "train_mean": 12.25,
        "val": 12.9,
        "solution": solution,
        "shapes": shapes,
        "sigma": 0.0812345,
        "timestamp": 1764000000,
    }
