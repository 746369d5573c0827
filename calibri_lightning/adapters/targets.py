"""Which layers of a transformer get a LoRA: patterns, and what each family trains by default."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from calibri_lightning.errors import UserError

_ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
_JOINT = (*_ATTENTION, "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
_FAMILIES: Mapping[str, tuple[str, ...]] = {
    "SD3Transformer2DModel": _JOINT,
    "FluxTransformer2DModel": (*_JOINT, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    # net.2 is a Linear itself: the pattern img_mlp.net.2.proj would leave the MLPs' outputs out, silently.
    "QwenImageTransformer2DModel": (
        *_JOINT,
        "img_mlp.net.0.proj",
        "img_mlp.net.2",
        "txt_mlp.net.0.proj",
        "txt_mlp.net.2",
    ),
}
"""What Flow-GRPO trains (arXiv 2505.05470, its official training scripts), by class of transformer."""


def default_targets(transformer: nn.Module) -> tuple[str, ...]:
    """What is trained where the user names nothing.

    Args:
        transformer: The transformer.

    Returns:
        Patterns: Flow-GRPO's own for SD3, FLUX.1 and Qwen-Image, as far as the model has such layers (a model of one
        block may lack the text's output projection); elsewhere all projections of all attentions, by full names.

    Raises:
        UserError: If the transformer has no attention.
    """
    names = linear_names(transformer)
    known = _FAMILIES.get(type(transformer).__name__, ())
    found = tuple(pattern for pattern in known if any(matches(name, pattern) for name in names))
    found = found or tuple(_attention_projections(transformer))
    if not found:
        raise UserError(
            f"No attention was found in {type(transformer).__name__}, so there is no default for lora.targets. Name "
            f"the layers to train; among its layers are {', '.join(names[:5])}."
        )
    return found


def expand(transformer: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """Finds the layers that patterns name.

    Args:
        transformer: The transformer.
        patterns: Ends of layers' names from a dot on, such as "attn.to_q"; * stands for anything.

    Returns:
        Names of Linear layers and convolutions, in the transformer's order.

    Raises:
        UserError: If there is no pattern, or one of them matches no layer.
    """
    names = linear_names(transformer)
    if not patterns:
        raise UserError("lora.targets is an empty list. Name the layers to train, or leave it out for the default.")
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise UserError(_no_match(transformer, pattern, names))
    return tuple(name for name in names if any(matches(name, pattern) for pattern in patterns))


def matches(name: str, pattern: str) -> bool:
    """Says whether a pattern names a layer.

    Args:
        name: Full name of a layer.
        pattern: The end of a name from a dot on, or a whole one; * stands for anything.

    Returns:
        Whether it does.
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def linear_names(transformer: nn.Module) -> list[str]:
    """Lists the layers that can take a LoRA.

    Args:
        transformer: The transformer, without a LoRA.

    Returns:
        Full names of its Linear layers (quantised ones are such, too) and convolutions.
    """
    return [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def _attention_projections(transformer: nn.Module) -> Iterator[str]:
    """Linear layers of modules whose class is an attention: the classes differ by family, their names do not."""
    inside: tuple[str, ...] = ()
    for name, module in transformer.named_modules():
        if type(module).__name__.endswith("Attention"):
            inside = (*inside, f"{name}.")
        elif isinstance(module, nn.Linear) and name.startswith(inside):
            yield name


def _no_match(transformer: nn.Module, pattern: str, names: Sequence[str]) -> str:
    depth = pattern.count(".") + 1
    ends = {".".join(name.split(".")[-count:]) for name in names for count in (depth - 1, depth, depth + 1) if count}
    # What does not distinguish layers comes last: a name as long as a bare number would match much and say little.
    near = get_close_matches(pattern, sorted(end for end in ends if not end.isdigit()), n=4, cutoff=0.5)
    inside = [name for name in names if fnmatchcase(name, f"*.{pattern}.*") or fnmatchcase(name, f"{pattern}.*")]
    if inside:
        hint = f"It names a module that holds layers, among them {', '.join(inside[:3])}; name the layers."
    elif near:
        hint = f"Near names: {', '.join(near)}."
    else:
        hint = f"Among its layers are {', '.join(list(names)[:5])}."
    return (
        f"lora.targets has '{pattern}', which matches no Linear layer or convolution of {type(transformer).__name__}. "
        f"A pattern is the end of a layer's name from a dot on, * standing for anything. {hint}"
    )
