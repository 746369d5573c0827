"""What a run trains, and named copies of it: the policy, its reference, its average, its best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from calibri_lightning.adapters.lora import lora_parameters, without_lora
from calibri_lightning.adapters.swap import overwrite, swapped
from calibri_lightning.arrays import Floats
from calibri_lightning.errors import UserError

Trains = Literal["scales", "lora", "both", "full"]
"""What a run changes: theta, a LoRA, theta and a LoRA, or all weights of the transformer."""

LIVE = "live"
"""The tensors as they are."""
BASE = "base"
"""The model as it was before this run trained anything: no LoRA, no scales. Weights from init_from are part of it."""
THETA = "theta"
"""What theta is called among the trained parameters."""


class Policy:
    """The tensors that a run trains, and copies of them by name.

    Two names are given: "live" (the tensors as they are) and "base", the model before any training: the LoRA switched
    off, also a fixed one, or, where all weights are trained, a copy of what they are when this object is made. Theta
    is written into by `using` only where it is trained; callers that hand theta on by themselves (the rows of scales of
    a candidate) read it from `theta_of`.
    """

    def __init__(self, theta: nn.Parameter, transformer: nn.Module, trains: Trains, base_theta: Tensor) -> None:
        """Lets exactly what is trained want gradients; theta always does, since checkpoints and DDP want a parameter.

        Args:
            theta: The scales' parameters, float64 [n].
            transformer: The transformer, with its LoRA if it has one.
            trains: What is trained.
            base_theta: Parameters of the untouched model, [n].

        Raises:
            UserError: If there is no LoRA to train, or all weights are trained under a LoRA or are quantised.
        """
        if trains not in get_args(Trains):
            raise UserError(f"trains is {trains!r}. It is one of {', '.join(get_args(Trains))}.")
        self.trains, self.theta, self.transformer = trains, theta, transformer
        self._base_theta = base_theta.detach().to("cpu", torch.float64, copy=True)
        self._network = _network(transformer, trains)
        transformer.requires_grad_(False)
        for parameter in self._network.values():
            parameter.requires_grad_(True)
        self._copies: dict[str, dict[str, Tensor]] = {}
        self._used: str | None = None
        self._before: Mapping[str, Tensor] = {}
        if trains == "full":
            self.keep(BASE)

    @property
    def trains_theta(self) -> bool:
        """Whether theta is trained."""
        return self.trains in ("scales", "both")

    @property
    def network_names(self) -> tuple[str, ...]:
        """Names of the trained parameters of the transformer, in its order."""
        return tuple(self._network)

    @property
    def copies(self) -> tuple[str, ...]:
        """Names of the copies, in the order in which they were first kept."""
        return tuple(self._copies)

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained.

        Returns:
            Parameters by name, always in the same order: "theta" where it is trained, then the network's.
        """
        return {THETA: self.theta, **self._network} if self.trains_theta else dict(self._network)

    def tensors(self, name: str) -> Mapping[str, Tensor]:
        """The numbers of a copy, or the live ones.

        Args:
            name: "live" or the name of a copy.

        Returns:
            Tensors by the names of `parameters`, not to be changed. Inside `using`, "live" is what was there before.

        Raises:
            UserError: If there is no such copy.
        """
        if name == LIVE:
            return self._before if self._used is not None else _detached(self.parameters())
        if name not in self._copies:
            raise UserError(_unknown(name, self._copies))
        return self._copies[name]

    def keep(self, name: str, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Stores a copy; one of that name is replaced.

        Args:
            name: What to call it.
            tensors: What to copy, by the names of `parameters`; the live tensors if None.

        Raises:
            UserError: If the name is taken for good, or the tensors are not those that are trained.
        """
        if name == LIVE or (name == BASE and BASE in self._copies) or (name == BASE and self.trains != "full"):
            raise UserError(f"A copy cannot be called '{name}', which has a meaning of its own. Choose another name.")
        source = self.tensors(LIVE) if tensors is None else tensors
        self._copies[name] = self._fitting(source, f"The copy '{name}'")

    def forget(self, name: str) -> None:
        """Drops a copy.

        Args:
            name: Its name.

        Raises:
            UserError: If there is no such copy.
        """
        if name == BASE or name not in self._copies:
            raise UserError(_unknown(name, [copy for copy in self._copies if copy != BASE]))
        del self._copies[name]

    def same(self, one: str, other: str) -> bool:
        """Whether two copies make the network the same; theta is not looked at.

        Args:
            one: "live", "base" or the name of a copy.
            other: Likewise.

        Returns:
            True where they do. A LoRA that is there differs from none, whatever its numbers are.
        """
        if one == other:
            return True
        if BASE in (one, other) and self.trains != "full":
            return not lora_parameters(self.transformer)
        ours, theirs = self.tensors(one), self.tensors(other)
        return all(torch.equal(ours[name], theirs[name]) for name in self._network)

    def theta_of(self, name: str) -> Floats:
        """The scales' parameters that belong to a copy.

        Args:
            name: "live", "base" or the name of a copy.

        Returns:
            float64 [n]: for "base" those of the untouched model, whether theta is trained or not; for a copy its own
            where theta is trained, and elsewhere the live ones.
        """
        if name == BASE:
            return self._base_theta.numpy().copy()
        held = self.tensors(name).get(THETA, self.theta)
        return held.detach().to("cpu", torch.float64, copy=True).numpy()

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Makes the network, and theta where it is trained, those of a copy, in place; afterwards all is as it was.

        What a copy was made of can be used for forwards while graphs of the live tensors wait for their backward pass;
        run that afterwards, not inside.

        Args:
            name: "live", which changes nothing; "base"; or the name of a copy. Inside itself it changes nothing.

        Yields:
            Nothing.

        Raises:
            UserError: If there is no such copy.
            RuntimeError: If another copy is in use.
        """
        if name == self._used or (name == LIVE and self._used is None):
            yield
            return
        if self._used is not None:
            raise RuntimeError(
                f"The copy '{self._used}' is in use, so '{name}' cannot be. Leave the first one's block."
            )
        live = _detached(self.parameters())
        other = dict(live) | self._base() if name == BASE else self.tensors(name)
        base = without_lora(self.transformer) if name == BASE else nullcontext()
        with swapped(live, other) as before, base:
            self._used, self._before = name, before
            try:
                yield
            finally:
                self._used, self._before = None, {}

    def _base(self) -> dict[str, Tensor]:
        """What "base" writes: the untouched theta, the initial weights; a LoRA is switched off instead."""
        theta = {THETA: self._base_theta} if self.trains_theta else {}
        return theta | self._copies.get(BASE, {})

    def state_dict(self) -> dict[str, Any]:
        """The live network and all copies; theta is the module's own to save.

        Returns:
            Tensors and plain values: `torch.load(..., weights_only=True)` reads them.
        """
        network = {name: tensor for name, tensor in self.tensors(LIVE).items() if name != THETA}
        copies = {name: _stored(tensors) for name, tensors in self._copies.items()}
        return {"trains": self.trains, "network": _stored(network), "copies": copies}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave; copies that it does not have are dropped.

        Args:
            state: The state.

        Raises:
            UserError: If it is of a run that trains something else, or of other tensors; nothing has changed then.
        """
        if self._used is not None:
            raise RuntimeError(f"The copy '{self._used}' is in use: restore a policy outside of it.")
        self.require_trains(state)
        network = self._fitting(state["network"], "The checkpoint", self._network)
        copies = {
            name: self._fitting(tensors, f"The copy '{name}' of the checkpoint")
            for name, tensors in state["copies"].items()
        }
        overwrite(_detached(self._network), network)
        self._copies = copies

    def require_trains(self, state: Mapping[str, Any]) -> None:
        """Checks that a state is of a run that trains the same.

        Args:
            state: What `state_dict` gave.

        Raises:
            UserError: If it is not.
        """
        if state["trains"] != self.trains:
            raise UserError(
                f"The checkpoint is of a run with trains: {state['trains']}, and this one has trains: {self.trains}. "
                "Restore its config.yaml, or start a new run with --model.init_from."
            )

    def _fitting(
        self, tensors: Mapping[str, Tensor], what: str, live: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Copies tensors in the order, type and place of the live ones, which they must match."""
        live = self.parameters() if live is None else live
        odd = sorted(live.keys() ^ tensors.keys()) or [n for n in live if live[n].shape != tensors[n].shape]
        if odd:
            raise UserError(
                f"{what} does not fit what this run trains ({len(live)} tensors): {odd[0]} is absent on one side or "
                "of another shape. It is of another model, or of other lora.targets or another rank: restore its "
                "config.yaml, or start a new run with --model.init_from."
            )
        return {name: tensors[name].detach().to(live[name], copy=True) for name in live}


def _network(transformer: nn.Module, trains: Trains) -> dict[str, nn.Parameter]:
    """The transformer's parameters that are trained."""
    lora = lora_parameters(transformer)
    if trains == "scales":
        return {}
    if trains in ("lora", "both"):
        if not lora:
            raise UserError(
                f"trains is {trains}, but this {type(transformer).__name__} has no LoRA. Add one with add_lora, or "
                "load one with load_adapter."
            )
        return lora
    if lora:
        raise UserError(
            "trains is full, but the transformer has a LoRA. Merge it into the weights first "
            "(load_adapter(..., merge=True)), or train the LoRA with trains: lora."
        )
    if getattr(transformer, "hf_quantizer", None) is not None:
        raise UserError("trains is full, but the transformer is quantised. Train a LoRA, or leave quantization out.")
    return dict(transformer.named_parameters())


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _unknown(name: str, copies: Any) -> str:
    return f"There is no copy '{name}' of the weights. There are: {', '.join(copies) or 'none'}."
