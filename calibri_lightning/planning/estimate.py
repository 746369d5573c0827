"""Estimates the memory of a run: weights exactly, activations by following one forward without numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from calibri_lightning.adapters.lora import LoraOptions
from calibri_lightning.backbones.native import Native
from calibri_lightning.calibration import Layout, attach
from calibri_lightning.calibration.scales import Rows
from calibri_lightning.planning.live import FusedAttention, LiveBytes
from calibri_lightning.planning.shards import ShardPlan, plan_shards
from calibri_lightning.planning.training import TrainingNeeds, TrainingPlan, plan_training, sketch_policy
from calibri_lightning.sampling.rows import MOST_ROWS, check_rows, rows_by_rule

if TYPE_CHECKING:
    from calibri_lightning.backbones.conditioning import Conditioning

_USABLE = 0.8
"""Share of the memory left by the weights that rows_per_forward: auto fills."""
_HELD_COPIES = 2
"""Pictures of the unit that is scored while the next is sampled: as they are, and without NaN."""


@dataclass(frozen=True)
class NetworkSize:
    """One network of a pipeline."""

    name: str
    parameters: int
    bytes: int
    """Parameters and buffers, in the types in which they are loaded."""


@dataclass(frozen=True)
class Situation:
    """What a plan is made for, besides the model."""

    layout: Layout
    rows_per_forward: int | None
    """None for auto."""
    num_texts: int
    """Different texts that are encoded, negative prompts included."""
    on_cpu: bool = False
    """Whether the run is on a CPU, where text encoders and embeddings are in the same memory."""
    device_bytes: int | None = None
    """Memory of the device; rows_per_forward: auto is then estimated for it."""
    num_scoring: int = 1
    """Units whose pictures are scored while the next is sampled."""
    training: TrainingNeeds | None = None
    """What is trained; None for a search without gradients."""
    lora: LoraOptions | None = None
    """The LoRA that is trained, as configured."""
    starts_from_adapter: bool = False
    """Whether the run starts from an adapter, of which nothing is known before it is loaded."""
    ranks_per_replica: int = 1
    """Ranks that hold one copy of the transformer together."""


@dataclass(frozen=True)
class MemoryPlan:
    """What one process needs, in bytes; rewards and their models come on top."""

    networks: tuple[NetworkSize, ...]
    rows_per_forward: int
    pictures_per_unit: int
    tokens_per_row: int
    embedding_bytes: int
    """One text's."""
    num_texts: int
    sampling_bytes: int | None
    """Peak of one step beyond the weights; None where the model cannot be followed without numbers."""
    decoding_bytes: int | None
    """Peak of decoding a unit beyond the weights."""
    phases: dict[str, int] = field(default_factory=dict)
    """Peak of the device while texts are encoded, while pictures are sampled, while they are decoded, and in training
    with gradients while the policy is trained on them."""
    training: TrainingPlan | None = None
    """What training with gradients takes on top; None for a search without."""
    shards: ShardPlan | None = None
    """What this process holds and gathers of the transformer; None where it has a whole one."""
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """Expected peak of the device."""
        return max(self.phases.values())

    @property
    def embeddings(self) -> int:
        """All embeddings of the run, in the memory of the host, for each process."""
        return self.embedding_bytes * self.num_texts


def network_sizes(networks: dict[str, nn.Module]) -> tuple[NetworkSize, ...]:
    """Counts networks.

    Args:
        networks: By name.

    Returns:
        Their sizes; shared parameters count once.
    """
    return tuple(
        NetworkSize(
            name, sum(p.numel() for p in network.parameters()), _bytes([*network.parameters(), *network.buffers()])
        )
        for name, network in networks.items()
    )


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def make_plan(backbone: Native, situation: Situation) -> MemoryPlan:
    """Estimates what one process needs.

    Args:
        backbone: The model; best a sketch on the meta device.
        situation: What it is used for.

    Returns:
        The plan.
    """
    choice, num_members = backbone.memory.text_encoders, len(situation.layout.members)
    components = {n: part for n, part in backbone.pipeline.components.items() if isinstance(part, nn.Module)}
    networks = network_sizes(components)
    encoders = {id(encoder) for encoder in backbone.text_encoders()}
    encoder_bytes = sum(size.bytes for size in networks if id(components[size.name]) in encoders)
    embedding_bytes = _bytes(list(backbone.example().tensors.values()))
    keeps = situation.on_cpu or choice == "keep"
    resident = sum(size.bytes for size in networks) - (0 if keeps else encoder_bytes)
    if situation.on_cpu:
        resident += embedding_bytes * situation.num_texts
    shards = _shards(backbone, situation)
    gathered = in_training = 0
    if shards is not None:
        resident -= _bytes(list(backbone.transformer.parameters())) - shards.share_bytes
        gathered, in_training = shards.gathered_bytes, shards.backward_bytes
    training = _training(backbone, situation)
    resident += training.resident if training is not None else 0
    rows = _rows(backbone, situation, resident + gathered)
    check_rows(rows, num_members)
    pictures = rows // num_members
    notes = _notes(backbone, situation)
    if training is not None and training.backward_bytes is None:
        notes.append("Activations while training are not counted: this model decides by numbers, which a plan has not.")
    sampling = _followed(lambda: _sampling_peak(backbone, situation.layout, pictures), "sampling", notes)
    decoding = _followed(lambda: _decoding_peak(backbone, pictures), "decoding", notes)
    height, width = backbone.image_size
    held = situation.num_scoring * _HELD_COPIES * pictures * 3 * height * width * 4
    return MemoryPlan(
        networks=networks,
        rows_per_forward=rows,
        pictures_per_unit=pictures,
        tokens_per_row=backbone.tokens_per_row,
        embedding_bytes=embedding_bytes,
        num_texts=situation.num_texts,
        sampling_bytes=sampling,
        decoding_bytes=decoding,
        phases={
            "encoding": resident + (0 if keeps or choice == "cpu" else encoder_bytes),
            "sampling": resident + held + gathered + (sampling or 0),
            "decoding": resident + held + (decoding or 0),
            **({} if training is None else {"training": resident + in_training + (training.backward_bytes or 0)}),
        },
        training=training,
        shards=shards,
        notes=tuple(notes),
    )


def _shards(backbone: Native, situation: Situation) -> ShardPlan | None:
    ranks = situation.ranks_per_replica
    return None if ranks == 1 else plan_shards(backbone.transformer, ranks)


def _training(backbone: Native, situation: Situation) -> TrainingPlan | None:
    needs, layout = situation.training, situation.layout
    if needs is None:
        return None
    policy = sketch_policy(backbone, layout, needs.trains, situation.lora)
    return plan_training(backbone, layout, policy, needs)


def _notes(backbone: Native, situation: Situation) -> list[str]:
    """What the numbers leave out or take for granted."""
    notes = ["Rewards and their models are not counted."]
    if situation.starts_from_adapter:
        notes.append("The adapter of init_from is not counted; one that is trained is taken to be as model.lora says.")
    if situation.on_cpu or backbone.memory.text_encoders != "cpu":
        notes.append("Activations of the text encoders, one text at a time, are not counted.")
    if backbone.memory.quantization is not None:
        notes.append("The transformer is counted as it is before quantisation.")
    if "mask" in backbone.text_shapes():
        notes.append("Prompts are taken to be of middling length.")
    if situation.rows_per_forward is None and not situation.on_cpu and situation.device_bytes is None:
        notes.append(
            "rows_per_forward: auto is measured on the device; --device_memory estimates it, here it is a guess."
        )
    return notes


def _rows(backbone: Native, situation: Situation, resident: int) -> int:
    """Rows of a forward: as configured, as the rule of the CPU has it, or as many as the device will hold."""
    layout = situation.layout
    if situation.rows_per_forward is not None:
        return situation.rows_per_forward
    if situation.on_cpu or situation.device_bytes is None:
        return rows_by_rule(backbone.tokens_per_row, len(layout.members))
    free = _USABLE * (situation.device_bytes - resident)
    pictures = max(1, MOST_ROWS // len(layout.members))
    pictures = 1 << (pictures.bit_length() - 1)
    while pictures > 1 and (_quietly(lambda: _sampling_peak(backbone, layout, pictures)) or 0) > free:  # noqa: B023
        pictures //= 2
    return pictures * len(layout.members)


def _quietly(follow: Callable[[], int]) -> int | None:
    try:
        return follow()
    # What a sketch answers where a model asks for numbers.
    except (RuntimeError, NotImplementedError):
        return None


def _followed(follow: Callable[[], int], what: str, notes: list[str]) -> int | None:
    found = _quietly(follow)
    if found is None:
        notes.append(f"Activations while {what} are not counted: this model decides by numbers, which a plan has not.")
    return found


def _sampling_peak(backbone: Native, layout: Layout, pictures: int) -> int:
    """Peak of one step of the sampler beyond the weights, for a unit of some pictures."""
    attachment = attach(backbone.transformer, layout.sites)
    rows = layout.rows(torch.tensor(layout.start)[None])
    place = [0] * pictures
    guided = any(member.prompt == "negative" for member in layout.members)
    try:
        with torch.no_grad(), LiveBytes(backbone.device) as live, FusedAttention():
            text: Conditioning = backbone.example().take(place)
            negative = backbone.example().take(place) if guided else None
            noise = backbone.noise(range(pictures))
            scales = Rows(rows.scales[place], rows.weights[place])
            backbone.sample(attachment, scales, layout.members, text, negative, noise, 1)
    finally:
        attachment.detach()
    return live.peak


def _decoding_peak(backbone: Native, pictures: int) -> int:
    """Peak of decoding a unit beyond the weights."""
    with torch.no_grad(), LiveBytes(backbone.device) as live, FusedAttention():
        backbone.decode(torch.zeros(pictures, *backbone.latent_shape(), device=backbone.device))
    return live.peak
