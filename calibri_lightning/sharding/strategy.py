"""The trainer's strategy for models that do not fit one GPU: which ranks hold a copy of the model together."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.distributed.constants import default_pg_timeout

from calibri_lightning.errors import UserError
from calibri_lightning.resume import own_parameters

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

SHARDS = "tensor_parallel"
"""What Lightning calls the dimension of its mesh along which ours cuts up the weights."""


class Sharded(ModelParallelStrategy):
    """Cuts the frozen transformer up among ranks (FSDP2); theta and a LoRA stay whole on each of them.

    Lightning's own ModelParallelStrategy leaves the cutting to the module, gathers the whole frozen model on rank 0 for
    every checkpoint, and by default takes all GPUs of a node for tensor parallelism. This one holds a replica on
    `ranks_per_replica` ranks, which share its pictures as all ranks do, and saves what is trained.

    Args:
        ranks_per_replica: Ranks that hold one copy of the transformer together; all ranks by default. The number of
            ranks must be a multiple. Ranks of one copy are consecutive, so up to the GPUs of a machine they are on one.
        process_group_backend: nccl or gloo; by default what suits the device.
        timeout: How long a rank waits for another one.

    Raises:
        UserError: If ranks_per_replica is below 1.
    """

    def __init__(
        self,
        ranks_per_replica: int | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        check_ranks_per_replica(ranks_per_replica)
        super().__init__(
            save_distributed_checkpoint=False, process_group_backend=process_group_backend, timeout=timeout
        )
        self.ranks_per_replica = ranks_per_replica

    def setup_environment(self) -> None:
        """Lays the ranks out, replica by replica; refused before any of them waits for another.

        Raises:
            UserError: If the number of ranks is no multiple of ranks_per_replica.
        """
        num_ranks = self.num_nodes * self.num_processes
        self._tensor_parallel_size = shards_of(num_ranks, self.ranks_per_replica)
        self._data_parallel_size = num_ranks // self._tensor_parallel_size
        super().setup_environment()

    @property
    def shard_mesh(self) -> DeviceMesh:
        """The ranks that hold one copy of the transformer with this one."""
        return self.device_mesh[SHARDS]

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """No: a checkpoint holds nothing that is cut up, and is restored when it is with any other strategy."""
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gives what is trained; the parent would gather the whole frozen model on rank 0 at each save."""
        assert self.lightning_module is not None
        return {name: parameter.detach() for name, parameter in own_parameters(self.lightning_module)}

    # Nothing that is saved is cut up, so that files are those of any other strategy, and either reads the other's. The
    # parent gathers and scatters states, and fails on the stand-in for an optimiser of a search (lightning 2.6.6).
    save_checkpoint = Strategy.save_checkpoint
    load_checkpoint = Strategy.load_checkpoint
    load_model_state_dict = Strategy.load_model_state_dict
    optimizer_state = Strategy.optimizer_state
    load_optimizer_state_dict = Strategy.load_optimizer_state_dict


def check_ranks_per_replica(ranks_per_replica: int | None) -> None:
    """Refuses numbers that are none of ranks.

    Args:
        ranks_per_replica: As configured.

    Raises:
        UserError: If it is below 1.
    """
    if ranks_per_replica is not None and ranks_per_replica < 1:
        raise UserError(
            f"ranks_per_replica is {ranks_per_replica}; it is the number of ranks that hold one copy of the model, at "
            "least 1. Leave it out to hold one copy on all ranks."
        )


def shards_of(num_ranks: int, ranks_per_replica: int | None) -> int:
    """Settles how many pieces the transformer is cut into.

    Args:
        num_ranks: All ranks of the run.
        ranks_per_replica: As configured; None for all ranks.

    Returns:
        The number.

    Raises:
        UserError: If the ranks cannot be divided so.
    """
    shards = num_ranks if ranks_per_replica is None else ranks_per_replica
    if num_ranks % shards:
        raise UserError(
            f"ranks_per_replica is {shards}, and the run has {num_ranks} rank(s), no multiple of it: some would hold a "
            "part of a model without its rest. Set --trainer.strategy.ranks_per_replica to a divisor of "
            f"{num_ranks}, or change --trainer.devices and --trainer.num_nodes."
        )
    return shards
