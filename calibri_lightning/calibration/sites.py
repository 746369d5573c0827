"""Where a diffusion transformer can be scaled: the words in which the table of block classes is written.

A *site* is one residual branch of one block whose output is multiplied by a scalar. For each block class the
table (`calibration/tables`) says where a hook reaches the branch (its gate, usually) and how the scale can be
folded into weights afterwards. To support another model, write one function that returns the rows of its block
class and decorate it with `register`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from calibri_lightning.errors import UserError

Layer = Literal["attn", "attn2", "xattn", "mlp", "fused"]
"""Kind of branch: (joint) attention, second attention, cross-attention, feed-forward, or all in one."""
Stream = Literal["image", "text", "joint"]
"""Tokens that the branch writes to; joint: all tokens that the block sees."""
Granularity = Literal["block", "layer", "gate"]
"""How sites share scales: one a block, one a layer of a block, one a site."""
Choice = Literal["always", "cross_attention", "fused", "split"]
"""When a row is used: always; only where `SiteOptions.cross_attention` asks for it; unless, or only where,
`SiteOptions.split_fused` asks for halves."""


@dataclass(frozen=True)
class SiteOptions:
    """What a user may choose about the sites of a model."""

    cross_attention: bool = False
    """Scales cross-attentions that the model itself does not gate, in blocks whose other branches it gates."""
    split_fused: bool = False
    """Scales the attention and the MLP half of a fused block apart. The bias of the projection that both share
    stays as it is."""


DEFAULT_OPTIONS = SiteOptions()
"""The sites that a model gates itself; all branches of a block that has no gates."""


@dataclass(frozen=True)
class TupleElement:
    """Scales element `index` of the tuple or list that `module` (path inside the block) returns."""

    module: str
    index: int


@dataclass(frozen=True)
class Chunk:
    """Scales the `index`-th of `n` equal chunks of the last dimension of `module`'s output tensor."""

    module: str
    n: int
    index: int


@dataclass(frozen=True)
class WholeOutput:
    """Scales the whole output tensor of `module`, whose rows of the batch lie along `batch_dim`."""

    module: str
    batch_dim: int = 0


@dataclass(frozen=True)
class ArgumentChunk:
    """Scales the `index`-th of `n` equal chunks of the last dimension of the block's argument `arg`."""

    arg: str
    n: int
    index: int


@dataclass(frozen=True)
class InputColumns:
    """Scales columns `start` to `stop` of the last dimension of the tensor that goes into `module`."""

    module: str
    start: int
    stop: int


Hook = TupleElement | Chunk | WholeOutput | ArgumentChunk | InputColumns


@dataclass(frozen=True)
class RowChunk:
    """Folds into the `index`-th of `n` equal chunks of the rows of a Linear (weight and bias)."""

    linear: str
    n: int
    index: int


@dataclass(frozen=True)
class OutputProjection:
    """Folds into a whole Linear or convolution (weight and bias): the branch's output projection."""

    linear: str


@dataclass(frozen=True)
class PostNormWeight:
    """Folds into the affine weight (and bias) of the norm that ends the branch."""

    norm: str


@dataclass(frozen=True)
class ColumnBlock:
    """Folds into columns `start` to `stop` of the weight of a Linear, whose bias stays as it is."""

    linear: str
    start: int
    stop: int


Fold = RowChunk | OutputProjection | PostNormWeight | ColumnBlock


@dataclass(frozen=True)
class Row:
    """One row of the table: a site relative to its block."""

    layer: Layer
    stream: Stream
    hook: Hook
    fold: Fold | None
    choice: Choice = "always"


@dataclass(frozen=True)
class Site:
    """One place in a transformer whose output is scaled."""

    block: str
    """Path of the block inside the transformer, e.g. "transformer_blocks.3"."""
    layer: Layer
    stream: Stream
    hook: Hook
    """How a running model is scaled; paths are relative to the block."""
    fold: Fold | None
    """How the scale goes into the weights; None where no weight can carry it."""
    choice: Choice = "always"
    """Which option, if any, put it here."""

    @property
    def name(self) -> str:
        """Full name, e.g. "transformer_blocks.3.attn.image"."""
        return f"{self.block}.{self.layer}.{self.stream}"


RowFunction = Callable[[nn.Module], tuple[Row, ...]]
BLOCKS: dict[str, RowFunction] = {}
"""The table: block class name to the function that lists its rows. Filled by `register`."""
WITHOUT_SITES: dict[str, str] = {}
"""Classes that are passed over, with what is in them, to the reason. Filled by `pass_over`."""


def register(*class_names: str) -> Callable[[RowFunction], RowFunction]:
    """Adds a function to the table.

    Args:
        *class_names: Names of the block classes whose rows the function lists.

    Returns:
        A decorator that leaves the function unchanged.
    """

    def decorate(function: RowFunction) -> RowFunction:
        for name in class_names:
            BLOCKS[name] = function
        return function

    return decorate


def pass_over(reason: str, *class_names: str) -> None:
    """Says that modules have no sites on purpose, so that a list of them is not refused as unknown blocks.

    Args:
        reason: Why nothing in them is scaled.
        *class_names: Names of their classes.
    """
    for name in class_names:
        WITHOUT_SITES[name] = reason


def unwrap(transformer: nn.Module) -> nn.Module:
    """Returns the transformer inside a `PeftModel`, so that names stay the same with and without a LoRA."""
    get_base_model = getattr(transformer, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else transformer


def find_sites(transformer: nn.Module, options: SiteOptions = DEFAULT_OPTIONS) -> tuple[Site, ...]:
    """Lists the sites of a transformer, in the order of its blocks.

    Args:
        transformer: A diffusion transformer; it may live on the meta device.
        options: What is scaled besides, or instead of, what the model gates itself.

    Returns:
        The sites.

    Raises:
        UserError: If the transformer has a block of an unknown class, or no block at all, or an option is set
            that this model has no use for.
    """
    transformer = unwrap(transformer)
    model = type(transformer).__name__
    every = tuple(
        Site(path, row.layer, row.stream, row.hook, row.fold, row.choice)
        for path, block in _blocks(transformer, "", model)
        for row in BLOCKS[type(block).__name__](block)
    )
    if not every:
        raise UserError(
            f"{model} has no transformer block that can be scaled. Known block classes: "
            f"{', '.join(sorted(BLOCKS))}. Pass the diffusion transformer itself (for instance "
            "`pipe.transformer`), or add a row for its block class in calibri_lightning/calibration/tables."
        )
    choices = {site.choice for site in every}
    _check_option(options.cross_attention and "cross_attention" not in choices, "cross_attention", model)
    _check_option(options.split_fused and "split" not in choices, "split_fused", model)
    kept = {"always", "split" if options.split_fused else "fused"}
    kept |= {"cross_attention"} if options.cross_attention else set()
    return tuple(site for site in every if site.choice in kept)


def options_of(sites: tuple[Site, ...]) -> SiteOptions:
    """Tells which options lists of sites were found with.

    Args:
        sites: Sites, from `find_sites`.

    Returns:
        The options that they show.
    """
    choices = {site.choice for site in sites}
    return SiteOptions("cross_attention" in choices, "split" in choices)


def _check_option(idle: bool, name: str, model: str) -> None:
    what = {"cross_attention": "cross-attention without a gate", "split_fused": "block that fuses attention and MLP"}
    if idle:
        raise UserError(
            f"{name}: true was given, and {model} has no {what[name]}. Leave {name} out (or false) for this model."
        )


def _blocks(module: nn.Module, path: str, model: str) -> Iterator[tuple[str, nn.Module]]:
    """Walks down to the known blocks; an unknown class in a list of blocks is refused, never guessed."""
    for name, child in module.named_children():
        class_name = type(child).__name__
        child_path = f"{path}.{name}" if path else name
        if class_name in BLOCKS:
            yield child_path, child
        elif class_name in WITHOUT_SITES:
            continue
        elif isinstance(module, nn.ModuleList) and not _is_torch(child):
            raise UserError(
                f"{model} has a block of class {class_name} at '{child_path}', which calibri_lightning does "
                "not know. Blocks are scaled only where the table says how; known classes: "
                f"{', '.join(sorted(BLOCKS))}. To add it, write a function that returns the block's rows and "
                f"decorate it with @register('{class_name}') from calibri_lightning.calibration.sites (for "
                "an AdaLayerNormZero named norm1, a row is Row('attn', 'image', TupleElement('norm1', 1), "
                "RowChunk('norm1.linear', 6, 2)))."
            )
        else:
            yield from _blocks(child, child_path, model)


def _is_torch(module: nn.Module) -> bool:
    """True for layers of torch itself, such as the entries of a ModuleList of Linears, also under a LoRA."""
    return type(getattr(module, "base_layer", module)).__module__.startswith("torch.nn.")
