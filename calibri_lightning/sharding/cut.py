"""Cuts a frozen transformer up among the ranks of a mesh, block by block (FSDP2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from calibri_lightning.adapters.lora import lora_parameters
from calibri_lightning.calibration.sites import find_sites, unwrap
from calibri_lightning.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def blocks_of(transformer: nn.Module) -> dict[str, nn.Module]:
    """Finds what is gathered as one piece: every module of a class that has sites, scaled or not.

    Args:
        transformer: The transformer.

    Returns:
        Blocks by path, in the order of the transformer.
    """
    transformer = unwrap(transformer)
    kinds = {type(transformer.get_submodule(site.block)) for site in find_sites(transformer)}
    return {name: module for name, module in transformer.named_modules() if type(module) in kinds}


def check_can_be_cut(transformer: nn.Module, is_native: bool, trains: str, compiles: bool) -> None:
    """Refuses a run whose model cannot be cut up.

    Args:
        transformer: The transformer.
        is_native: Whether the backbone samples by itself, so that all ranks run the same forwards.
        trains: What the run trains.
        compiles: Whether blocks are to be compiled.

    Raises:
        UserError: If the run needs the weights whole.
    """
    quantised = getattr(transformer, "hf_quantizer", None) is not None
    reasons = (
        (not is_native, "the backbone runs its pipeline's own call. Use the native backbone of the family"),
        (trains == "full", "the strategy trains all weights (train: full). Train a LoRA, scales or both"),
        (quantised, "the transformer is quantised, in packed weights. Leave memory.quantization out"),
        (compiles, "model.compile is true, which was never tried on gathered weights. Leave it out"),
    )
    for holds, reason in reasons:
        if holds:
            raise UserError(
                f"trainer.strategy cuts the frozen model up among ranks, but {reason}; or set ranks_per_replica to 1, "
                "where the model fits one device."
            )


def cut_up(transformer: nn.Module, mesh: DeviceMesh) -> None:
    """Leaves this rank its share of the frozen weights; each forward gathers a block, uses it and frees it again.

    A LoRA, trained or fixed, stays whole on every rank (torch's `ignored_params`): copies, averages, checkpoints and
    the sum of its gradients then are what they are without cutting. So does theta, which is no part of the transformer.
    Nothing of the base wants gradients, so nothing is ever reduced or scattered.

    Blocks are freed after the forward, and gathered once more for its backward. To keep them would spare an eighth to a
    quarter of the traffic of a training step, and none of sampling, at the price of the whole model in memory, which is
    what all this is to avoid. What is outside of the blocks (embeddings, the last layer) is freed too, where torch by
    default keeps it: so between forwards a rank holds its share and no more.

    Args:
        transformer: The transformer, frozen, with its hooks and its LoRA; changed in place. Parameters that are
            elsewhere move to the mesh's device, block by block.
        mesh: The ranks that share it, one dimension.
    """
    from torch.distributed.fsdp import fully_shard

    whole = set(lora_parameters(transformer).values())
    inner: Any = unwrap(transformer)
    # The inner ones first: what is cut up already is left alone by those around it.
    for module in (*reversed(blocks_of(inner).values()), inner):
        name = type(module).__name__
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        # torch puts a class of its own in front, "FSDP" and the name; ours are found in tables by name.
        type(module).__name__ = name
