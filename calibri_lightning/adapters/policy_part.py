"""The share of a policy that one of several strategies trains: its own parameters, and copies of its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager

from torch import Tensor, nn

from calibri_lightning.adapters.policy import BASE, LIVE, THETA, Policy, Trains
from calibri_lightning.arrays import Floats


class PolicyPart:
    """What one of several strategies sees of a `Policy`, in the place of one.

    A copy that it keeps is one of the whole policy: what other strategies train is in it as it is at that moment, so
    that a copy brings back the pictures that it was kept for.

    Args:
        whole: The policy.
        trains: What this strategy trains.
        prefix: Goes before the names of its copies.
        shared: Copies that all strategies share under their plain names; once kept, they stay as they are.
    """

    def __init__(self, whole: Policy, trains: Trains, prefix: str, shared: Collection[str] = ()) -> None:
        self.whole, self.trains, self.theta, self.transformer = whole, trains, whole.theta, whole.transformer
        self._prefix, self._shared = prefix, frozenset(shared)
        self._own = frozenset(
            ((THETA,) if self.trains_theta else ()) + (() if trains == "scales" else whole.network_names)
        )

    @property
    def trains_theta(self) -> bool:
        """Whether this strategy trains theta."""
        return self.trains in ("scales", "both")

    @property
    def network_names(self) -> tuple[str, ...]:
        """Names of the parameters of the transformer that it trains, in the transformer's order."""
        return tuple(name for name in self.whole.network_names if name in self._own)

    @property
    def copies(self) -> tuple[str, ...]:
        """Names of its copies, and of those that are shared, as it knows them."""
        own = [name.removeprefix(self._prefix) for name in self.whole.copies if name.startswith(self._prefix)]
        return (*(name for name in self.whole.copies if name in self._shared), *own)

    def name(self, name: str) -> str:
        """What the whole policy calls a copy.

        Args:
            name: What this strategy calls it.

        Returns:
            The name.
        """
        return name if name in (LIVE, BASE) or name in self._shared else f"{self._prefix}{name}"

    def parameters(self) -> dict[str, nn.Parameter]:
        """What this strategy trains.

        Returns:
            Parameters by name, as `Policy.parameters` orders them.
        """
        return {name: tensor for name, tensor in self.whole.parameters().items() if name in self._own}

    def tensors(self, name: str) -> Mapping[str, Tensor]:
        """The numbers of a copy, as far as this strategy trains them.

        Args:
            name: "live" or the name of a copy.

        Returns:
            Tensors by the names of `parameters`, not to be changed.
        """
        return {key: tensor for key, tensor in self.whole.tensors(self.name(name)).items() if key in self._own}

    def keep(self, name: str, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Stores a copy; one of that name is replaced, unless it is shared.

        Args:
            name: What to call it.
            tensors: What to copy, by the names of `parameters`; the live tensors if None. What this strategy does not
                train is copied as it is.
        """
        if not (name in self._shared and name in self.whole.copies):
            self.whole.keep(self.name(name), {**self.whole.tensors(LIVE), **(tensors or {})})

    def forget(self, name: str) -> None:
        """Drops a copy.

        Args:
            name: Its name.
        """
        self.whole.forget(self.name(name))

    def same(self, one: str, other: str) -> bool:
        """Whether two copies make the network the same.

        Args:
            one: "live", "base" or the name of a copy.
            other: Likewise.

        Returns:
            As of `Policy.same`.
        """
        return self.whole.same(self.name(one), self.name(other))

    def theta_of(self, name: str) -> Floats:
        """The scales' parameters that belong to a copy.

        Args:
            name: "live", "base" or the name of a copy.

        Returns:
            float64 [n]; where this strategy does not train theta, the live ones for its own copies.
        """
        own = name not in (LIVE, BASE) and name not in self._shared
        return self.whole.theta_of(LIVE if own and not self.trains_theta else self.name(name))

    def using(self, name: str) -> AbstractContextManager[None]:
        """Makes the network, and theta where it is trained, those of a copy.

        Args:
            name: "live", "base" or the name of a copy.

        Returns:
            As of `Policy.using`.
        """
        return self.whole.using(self.name(name))

    def focus(self) -> None:
        """Lets nothing of the network want gradients but what this strategy trains."""
        for name, parameter in self.whole.parameters().items():
            if name != THETA:
                parameter.requires_grad_(name in self._own)

    def refresh(self, moved: bool, lasting: Collection[str] = ()) -> None:
        """Brings this strategy's copies up to date after others have trained.

        Args:
            moved: Whether others may have moved what this strategy trains; its copies then start over from there.
                Otherwise they follow in what others train.
            lasting: Names of copies that stay as they are.
        """
        for name in self.copies:
            if name not in lasting and name not in self._shared:
                self.keep(name, None if moved else self.tensors(name))
