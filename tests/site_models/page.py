"""Writes docs/models.md from the table itself: PYTHONPATH=tests python -m site_models.page."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from calibri_lightning.calibration import Site, find_sites
from calibri_lightning.calibration.sites import (
    WITHOUT_SITES,
    ArgumentChunk,
    Chunk,
    ColumnBlock,
    InputColumns,
    OutputProjection,
    PostNormWeight,
    RowChunk,
    TupleElement,
    WholeOutput,
)
from site_models import CASES
from site_models.released import FULL_SIZES, Counts

PAGE = Path(__file__).parents[2] / "docs" / "models.md"

HOOKS = {
    TupleElement: "tuple",
    Chunk: "chunk",
    WholeOutput: "output",
    ArgumentChunk: "argument",
    InputColumns: "input",
}
FOLDS = {
    RowChunk: "gate rows",
    OutputProjection: "output projection",
    PostNormWeight: "norm weight",
    ColumnBlock: "input columns",
    type(None): "**keep the hook**",
}
OPTIONS = {
    "always": "",
    "fused": "",
    "cross_attention": "with `cross_attention`",
    "split": "with `split_fused`, instead",
}
NOTES = {
    "JointTransformerBlock": "`attn2` where attention is dual; no text sites in the last block",
    "FluxSingleTransformerBlock": "one gate for attention and MLP",
    "HunyuanVideoTokenReplaceTransformerBlock": "the first frame has gates of its own, so the branch is scaled",
    "QwenImageTransformerBlock": "with `zero_cond_t` the picture's branches are scaled (output, tuple)",
    "QwenImage21TransformerBlock": "one row of modulation more than samples",
    "Flux3SingleTransformerBlock": "attention and MLP are shared by the streams",
    "CogView4TransformerBlock": "attention and MLP are shared by the streams: no other fold",
    "CogView3PlusTransformerBlock": "attention and MLP are shared by the streams: no other fold",
    "CogVideoXBlock": "attention and MLP are shared by the streams: no other fold",
    "HiDreamBlock": "experts run under `no_grad` in eval mode: no gradients through them, use CMA-ES",
    "MochiTransformerBlock": "norms without weights; no text sites in the last block",
    "NucleusMoEImageTransformerBlock": "folds in dense blocks; a mixture of experts keeps the hook",
    "ZImageTransformerBlock": "`context_refiner` has no gates, and sites all the same",
    "Lumina2TransformerBlock": "`context_refiner` has no gates, and sites all the same",
    "LuminaNextDiTBlock": "self- and cross-attention are one branch",
    "BriaFibo2TransformerBlock": "cross-attention in a few blocks, with a learned gate",
    "Kandinsky5TransformerDecoderBlock": "the cross-attention has a gate",
    "ErnieImageSharedAdaLNBlock": "the MLP runs on [S, B, H]",
    "AuraFlowJointTransformerBlock": "the attention acts through the MLP alone",
    "BasicTransformerBlock": "`norm_type` decides: PixArt by output, DiT by tuple; UNets are refused",
    "HunyuanDiTBlock": "no gates at all",
    "OmniGenBlock": "no gates at all",
}

HEAD = """# Models and their sites

Which branches of which models can be scaled, how, and what a calibration folds into. Written by
`PYTHONPATH=tests python -m site_models.page` from the table in `calibri_lightning/calibration/tables`; a test compares
the two, and others try every row on a tiny model with random weights (diffusers 0.42.1): each site changes the output,
rows of a batch have their own scales, folded equals hooked within 1e-5, scales of 1 change no bit. **That is evidence
of structure, on a CPU; no full-size model was run.** A model whose blocks are not listed is refused.

**Sites.** A block that gates its branches has a site for each gate; a block without gates, one for each branch. Two
options of `model.calibration` (and `SiteOptions` of `find_sites`) change that:

* `cross_attention: true` adds the cross-attentions that have no gate beside branches that have one. They are left out
  by default: the model never learned to turn them up or down, and they add half as many parameters again.
* `split_fused: true` scales the attention and the MLP half of single-stream blocks apart, at the input columns of their
  common projection, whose bias stays as it is.

A calibration file says which options it was made with, so that `load_calibration` needs none.

**Hooks.** *tuple*: an element of a module's output tuple, the gate as a rule; *chunk*: a part of a modulation's output;
*argument*: a part of a modulation that the block is given; *output*: what the branch adds, before its gate; *input*:
columns of what goes into a projection. The first three touch [B, D], the others [B, S, D].

**Folds.** *gate rows*: rows of the Linear that makes the gate; *output projection*: the Linear or convolution that ends
the branch; *norm weight*: the affine weight of the norm that ends it; *input columns*: columns of the projection.
Where no weight carries the scale alone, `fold` refuses and the hooks stay, at the same pictures. Quantised, sharded and
LoRA weights are refused too.

## Blocks

| model | block | sites | hook | fold | notes |
|---|---|---|---|---|---|
"""
COUNTS = """
## Scales of full-size models

Scales with `granularity` block / layer / gate, counted on the meta device. Where a size is given, the transformer that
was counted has it within 3 %, as the released weights do; a class default was not checked against a released
configuration. Sites that reach no output count here; a run finds them with its probe and drops them (Qwen-Image: 238 of
240 remain).

| model | class | parameters | block / layer / gate | with options | without effect |
|---|---|---|---|---|---|
"""
PASSED = """
## Passed over on purpose

| class | reason |
|---|---|
"""


def render() -> str:
    """The text of the page."""
    blocks = "\n".join(line for model, found in _blocks().items() for line in _block_lines(model, found))
    passed = "\n".join(f"| `{name}` | {reason} |" for name, reason in WITHOUT_SITES.items())
    return HEAD + blocks + "\n" + COUNTS + "\n".join(_count_lines()) + "\n" + PASSED + passed + "\n"


def _blocks() -> dict[str, dict[tuple[str, str], list[Site]]]:
    """Sites by model class, and by block class and option in it."""
    found: dict[str, dict[tuple[str, str], list[Site]]] = {}
    for case in CASES:
        transformer: nn.Module = case.tiny().transformer
        sites = dict.fromkeys(find_sites(transformer) + find_sites(transformer, case.options))
        for site in sites:
            block = type(transformer.get_submodule(site.block)).__name__
            of_model = found.setdefault(type(transformer).__name__, {})
            of_model.setdefault((block, OPTIONS[site.choice]), []).append(site)
    return found


def _block_lines(model: str, found: dict[tuple[str, str], list[Site]]) -> list[str]:
    lines = []
    for (block, option), sites in found.items():
        names = dict.fromkeys(f"{site.layer}.{site.stream}" for site in sites)
        hooks = dict.fromkeys(HOOKS[type(site.hook)] for site in sites)
        folds = dict.fromkeys(FOLDS[type(site.fold)] for site in sites)
        cells = (f"`{model}`", f"`{block}`", ", ".join(names), ", ".join(hooks), ", ".join(folds))
        lines.append(f"| {' | '.join(cells)} | {option or NOTES.get(block, '')} |")
    return lines


def _count_lines() -> list[str]:
    dead = {type(case.tiny().transformer).__name__: case.dead for case in CASES}
    lines = []
    for size in FULL_SIZES:
        billions = f"{size.billions:g} B" if size.billions else ""
        text = "text of the last block" if dead[size.model] else ""
        options = _counts(size.optional) if size.optional else ""
        lines.append(f"| {size.name} | `{size.model}` | {billions} | {_counts(size.counts)} | {options} | {text} |")
    return lines


def _counts(counts: Counts) -> str:
    return " / ".join(map(str, counts))


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
