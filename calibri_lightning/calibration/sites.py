"""Where a diffusion transformer can be scaled: a table from block class to sites.

A *site* is one residual branch of one block whose output is multiplied by a scalar. The table says, for each
block class, where a hook reaches the branch (its gate, usually) and how the scale can be folded into weights
afterwards. To support another model, write one function that returns the rows of its block class and decorate
it with `register`.
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
"""Tokens that the branch writes to."""
Granularity = Literal["block", "layer", "gate"]
"""How sites share scales: one a block, one a layer of a block, one a site."""


@dataclass(frozen=True)
class TupleElement:
    """Scales element `index` of the tuple that `module` (path inside the block) returns."""

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
    """Scales the whole output tensor of `module`."""

    module: str


@dataclass(frozen=True)
class ArgumentChunk:
    """Scales the `index`-th of `n` equal chunks of the last dimension of the block's argument `arg`."""

    arg: str
    n: int
    index: int


Hook = TupleElement | Chunk | WholeOutput | ArgumentChunk


@dataclass(frozen=True)
class RowChunk:
    """Folds into the `index`-th of `n` equal chunks of the rows of a Linear (weight and bias)."""

    linear: str
    n: int
    index: int


@dataclass(frozen=True)
class OutputProjection:
    """Folds into a whole Linear (weight and bias): the branch's output projection."""

    linear: str


@dataclass(frozen=True)
class PostNormWeight:
    """Folds into the affine weight (and bias) of the norm that ends the branch."""

    norm: str


Fold = RowChunk | OutputProjection | PostNormWeight


@dataclass(frozen=True)
class Row:
    """One row of the table: a site relative to its block."""

    layer: Layer
    stream: Stream
    hook: Hook
    fold: Fold | None


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

    @property
    def name(self) -> str:
        """Full name, e.g. "transformer_blocks.3.attn.image"."""
        return f"{self.block}.{self.layer}.{self.stream}"


RowFunction = Callable[[nn.Module], tuple[Row, ...]]
BLOCKS: dict[str, RowFunction] = {}
"""The table: block class name to the function that lists its rows. Filled by `register`."""

# Hung off a transformer by IP-adapters, in lists of their own; no residual branches of the model.
_NOT_BLOCKS = frozenset({"IPAdapterTimeImageProjectionBlock", "IPAdapterTimeImageProjection", "ImageProjection"})


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


def _ada_zero(norm: str, stream: Stream, chunks: int = 6) -> tuple[Row, ...]:
    """Rows of an `AdaLayerNormZero`: its tuple holds the attention gate at 1 and the MLP gate at 4."""
    linear = f"{norm}.linear"
    return (
        Row("attn", stream, TupleElement(norm, 1), RowChunk(linear, chunks, 2)),
        Row("mlp", stream, TupleElement(norm, 4), RowChunk(linear, chunks, 5)),
    )


@register("JointTransformerBlock")
def _sd3(block: nn.Module) -> tuple[Row, ...]:
    """SD3 and SD3.5: dual attention adds a gate; the last block has no text branch."""
    if block.use_dual_attention:
        rows = (
            *_ada_zero("norm1", "image", 9),
            Row("attn2", "image", TupleElement("norm1", 6), RowChunk("norm1.linear", 9, 8)),
        )
    else:
        rows = _ada_zero("norm1", "image")
    return rows if block.context_pre_only else (*rows, *_ada_zero("norm1_context", "text"))


@register("FluxTransformerBlock")
def _flux_double(block: nn.Module) -> tuple[Row, ...]:
    return (*_ada_zero("norm1", "image"), *_ada_zero("norm1_context", "text"))


@register("FluxSingleTransformerBlock")
def _flux_single(block: nn.Module) -> tuple[Row, ...]:
    """One gate scales attention and MLP of both streams together."""
    return (Row("fused", "joint", TupleElement("norm", 1), RowChunk("norm.linear", 3, 2)),)


def unwrap(transformer: nn.Module) -> nn.Module:
    """Returns the transformer inside a `PeftModel`, so that names stay the same with and without a LoRA."""
    get_base_model = getattr(transformer, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else transformer


def find_sites(transformer: nn.Module) -> tuple[Site, ...]:
    """Lists all sites of a transformer, in the order of its blocks.

    Args:
        transformer: A diffusion transformer; it may live on the meta device.

    Returns:
        The sites.

    Raises:
        UserError: If the transformer has a block of an unknown class, or no block at all.
    """
    transformer = unwrap(transformer)
    sites = tuple(
        Site(path, row.layer, row.stream, row.hook, row.fold)
        for path, block in _blocks(transformer, "", type(transformer).__name__)
        for row in BLOCKS[type(block).__name__](block)
    )
    if not sites:
        raise UserError(
            f"{type(transformer).__name__} has no transformer block that can be scaled. Known block classes: "
            f"{', '.join(sorted(BLOCKS))}. Pass the diffusion transformer itself (for instance "
            "`pipe.transformer`), or add a row for its block class in calibri_lightning/calibration/sites.py."
        )
    return sites


def _blocks(module: nn.Module, path: str, model: str) -> Iterator[tuple[str, nn.Module]]:
    """Walks down to the known blocks; an unknown class in a list of blocks is refused, never guessed."""
    for name, child in module.named_children():
        class_name = type(child).__name__
        child_path = f"{path}.{name}" if path else name
        if class_name in BLOCKS:
            yield child_path, child
        elif isinstance(module, nn.ModuleList) and class_name not in _NOT_BLOCKS and not _is_torch(child):
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
    """True for layers of torch itself, such as the entries of a ModuleList of Linears."""
    return type(module).__module__.startswith("torch.nn.")
