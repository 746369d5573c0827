"""The weights that scales were found on, where those are not the published ones: trained, or with an adapter merged."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from calibri_lightning.adapters.full import TRANSFORMER
from calibri_lightning.adapters.lora import plain_name
from calibri_lightning.calibration.fingerprint import sampled_values, weights_digest
from calibri_lightning.calibration.sites import unwrap
from calibri_lightning.errors import UserError

_PRECISIONS = (torch.bfloat16, torch.float16)
"""In which weights are compared: a model trained in one precision is drawn with in another."""


@dataclass(frozen=True)
class WeightsRecord:
    """The weights of a transformer under scales, and under an adapter that is not merged."""

    digests: tuple[str, ...]
    """`base_digests` of them."""
    transformer: str = ""
    """The folder with all weights: "transformer" is the run's own; empty for those of the published model."""
    merged: str = ""
    """The adapter that was added to those weights, as given; empty for none."""

    @property
    def described(self) -> str:
        """What they are, for a message."""
        parts = [f"the weights in {self.transformer}"] if self.transformer else []
        return " and ".join([*parts, *([f"the merged adapter {self.merged}"] if self.merged else [])])


@dataclass(frozen=True)
class FixedWeights:
    """What tells the weights apart that a run does not train; read once, for ranks may hold a part of them each."""

    digest: str
    """`weights_digest` of them, a fixed LoRA counted."""
    base: tuple[str, ...]
    """`base_digests`."""

    @classmethod
    def of(cls, transformer: nn.Module, trained: Collection[str]) -> FixedWeights:
        """Reads the weights.

        Args:
            transformer: The transformer, whole.
            trained: Names of the parameters that the run trains.

        Returns:
            The digests.
        """
        return cls(weights_digest(transformer, with_adapter=True, trained=trained), base_digests(transformer))


def base_digests(transformer: nn.Module, other: Mapping[str, Tensor] | None = None) -> tuple[str, ...]:
    """Tells trained weights apart, at no more than a moment's cost: a few values of each parameter.

    Args:
        transformer: The transformer; a LoRA on it does not count.
        other: Other numbers for its parameters, by name (`Policy.tensors`); the live ones where it has none.

    Returns:
        A sha256 for the values rounded to bfloat16, and one for float16. Two models are the same where one of these
        is: whichever precision each of them is in, rounding twice can spoil the other one.

    Raises:
        UserError: If the weights are not in memory (sequential offloading).
    """
    transformer, other = unwrap(transformer), other or {}
    every = {plain_name(n): other.get(n, p).detach() for n, p in transformer.named_parameters() if ".lora_" not in n}
    away = next((name for name, tensor in every.items() if tensor.is_meta), None)
    if away is not None:
        raise UserError(
            f"The weights of this {type(transformer).__name__} cannot be read: {away} is offloaded. Load a calibration "
            "before enable_sequential_cpu_offload and its like."
        )
    values = {name: [part.cpu() for part in sampled_values(tensor)] for name, tensor in sorted(every.items())}
    return tuple(_digest(values, precision) for precision in _PRECISIONS)


def _digest(values: Mapping[str, list[Tensor]], precision: torch.dtype) -> str:
    found = hashlib.sha256()
    for name, parts in values.items():
        found.update(f"{name}\n".encode())
        for part in parts:
            found.update(part.to(precision).float().numpy().tobytes())
    return found.hexdigest()


def check_weights(record: WeightsRecord | None, transformer: nn.Module, folder: Path) -> None:
    """Checks that a transformer has the weights that a calibration was found on.

    Args:
        record: What the calibration says of them; None if they are those of the published model.
        transformer: The transformer.
        folder: Where the calibration lies; for the message.

    Raises:
        UserError: If it has others.
    """
    if record is None or not set(record.digests).isdisjoint(base_digests(transformer)):
        return
    steps = []
    if record.transformer:
        source = folder / TRANSFORMER if record.transformer == TRANSFORMER else record.transformer
        steps.append(f"load_transformer(pipe.transformer, {str(source)!r})")
    if record.merged:
        beside = folder / record.merged
        merged = str(beside) if beside.is_dir() else record.merged
        steps.append(f"load_adapter(pipe.transformer, {merged!r}, merge=True)")
    raise UserError(
        f"This calibration was found on {record.described}, and the model given has other weights, on which the scales "
        f"are half of the answer. Load the plain model, then call {' and '.join(steps)} of "
        "calibri_lightning.adapters, and then load_calibration. If it has those weights already (quantised, or merged "
        "in another precision or on another device), pass check_adapter=False."
    )
