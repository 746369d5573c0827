"""Any diffusers pipeline as it is: its own call samples, hooks scale.

Slower than a native backbone (one picture a call) and for strategies without gradients alone; in return the pictures
are the stock pipeline's by construction, guidance formula and all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
from torch import Tensor, nn

from calibri_lightning.backbones.base import Backbone
from calibri_lightning.backbones.conditioning import Conditioning
from calibri_lightning.backbones.loading import DType, freeze, load_pipeline
from calibri_lightning.backbones.memory import MemoryOptions
from calibri_lightning.backbones.stock_call import Argument, StockCall, remember_embeddings
from calibri_lightning.backbones.stock_checks import check_arguments, check_pipeline, side
from calibri_lightning.backbones.stock_passes import Passes, Role, find_passes, steered
from calibri_lightning.calibration.conventions import convention_of
from calibri_lightning.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from calibri_lightning.calibration.attach import Attachment
    from calibri_lightning.calibration.scales import Member, MemberSpec, Rows, WeightMode
    from calibri_lightning.sampling.rollout import Samples

Captured = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and keyword arguments of a forward."""

_PROBE_SIDE = 64
"""Pixels of a probe's picture: few tokens, and a size that nearly all pipelines take."""


class _FirstForwardError(Exception):
    """Ends a pipeline's call before its transformer runs."""


class Stock(Backbone):
    """Runs the call of a text-to-image or text-to-video pipeline of diffusers, one picture at a time."""

    def __init__(
        self,
        pretrained: str,
        dtype: DType = "bfloat16",
        revision: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        arguments: dict[str, Argument] | None = None,
        memory: MemoryOptions = MemoryOptions(text_encoders="keep"),  # noqa: B008 - read, never changed
    ) -> None:
        """Loads a pipeline.

        Args:
            pretrained: A diffusers folder, or a Hub id "owner/name".
            dtype: Type of weights and activations.
            revision: Branch, tag or commit of a Hub repository.
            height: Height of the pictures, pixels; by default the pipeline's own.
            width: Width of the pictures, pixels; by default the pipeline's own.
            num_frames: Frames of a video; by default the pipeline's own.
            arguments: Further arguments of the pipeline's call, for instance {max_sequence_length: 256}.
            memory: How the autoencoder and attention run; text encoders are kept, and embeddings stay in memory.

        Raises:
            UserError: If the model cannot be loaded, is not one that Stock can steer, or cannot keep to `memory`.
        """
        pipe = load_pipeline((), pretrained, dtype, revision, memory.quantization)
        self._adopt(pipe, height, width, num_frames, arguments)
        self.use_memory(memory)
        self.name = pretrained

    @classmethod
    def of(
        cls,
        pipe: DiffusionPipeline,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        arguments: dict[str, Argument] | None = None,
    ) -> Self:
        """Wraps a pipeline that is loaded already; it is frozen in place, and remembers its embeddings.

        Args:
            pipe: The pipeline.
            height: Height of the pictures, pixels; by default the pipeline's own.
            width: Width of the pictures, pixels; by default the pipeline's own.
            num_frames: Frames of a video; by default the pipeline's own.
            arguments: Further arguments of the pipeline's call.

        Returns:
            The backbone.

        Raises:
            UserError: If the pipeline is not one that Stock can steer.
        """
        backbone = cls.__new__(cls)
        freeze(pipe)
        backbone._adopt(pipe, height, width, num_frames, arguments)
        return backbone

    def _adopt(
        self,
        pipe: DiffusionPipeline,
        height: int | None,
        width: int | None,
        num_frames: int | None,
        arguments: dict[str, Argument] | None,
    ) -> None:
        Backbone.__init__(self)
        check_pipeline(pipe)
        check_arguments(pipe, arguments or {}, num_frames)
        self.image_size = (side(pipe, "height", height), side(pipe, "width", width))
        self._call = StockCall(pipe, self.image_size, num_frames, arguments or {})
        self.name = str(pipe.config.get("_name_or_path") or "")
        self.pipeline, self.transformer, self.dtype = pipe, pipe.transformer, pipe.transformer.dtype
        self._texts: list[str] = []
        self._passes: dict[float | None, Passes] = {}
        self._captured: Captured | None = None
        self._captured_on: torch.device | None = None
        remember_embeddings(pipe)

    def modules(self) -> nn.ModuleList:
        """All networks of the pipeline: frozen, in evaluation mode."""
        parts = self.pipeline.components.values()
        return nn.ModuleList([part for part in parts if isinstance(part, nn.Module)])

    def text_encoders(self) -> nn.ModuleList:
        """None to be moved apart: a stock pipeline wants all its networks on one device."""
        return nn.ModuleList()

    def use_memory(self, options: MemoryOptions) -> None:
        """Applies what does not concern text encoders, which the pipeline keeps to itself.

        Args:
            options: The choices.

        Raises:
            UserError: If text encoders or embeddings are to be anywhere else.
        """
        if options.text_encoders != "keep" or options.embedding_cache is not None:
            raise UserError(
                f"memory.text_encoders is {options.text_encoders} and embedding_cache {options.embedding_cache}, but "
                "Stock leaves encoding to the pipeline. Use text_encoders: keep without an embedding_cache."
            )
        super().use_memory(options)

    def check_members(self, members: MemberSpec, weight_mode: WeightMode) -> None:
        """Refuses what needs another formula than the pipeline's own.

        Args:
            members: What the configuration says of the members.
            weight_mode: What is learned about their weights.

        Raises:
            UserError: If members is a number, weights are learned, or the pipeline takes no guidance scale.
        """
        if members not in ("single", "cfg") or weight_mode != "fixed":
            raise UserError(
                f"members: {members}, weight_mode: {weight_mode} was given, but Stock leaves the combination of "
                "velocities to the pipeline. Use members: single or cfg with weight_mode: fixed, or a native backbone."
            )
        if members == "cfg" and self._call.guidance_argument is None:
            raise UserError(
                f"members is cfg, but {type(self.pipeline).__name__} takes no guidance scale in its call. "
                "Use members: single."
            )

    def plain_guidance(self, guidance_scale: float) -> float:
        """Translates the pipeline's guidance scale where its formula is known; elsewhere the number stays.

        Args:
            guidance_scale: The number as users of the pipeline know it.

        Returns:
            g of u + g (c - u), with c and u the velocities of prompt and negative prompt.
        """
        convention = convention_of(type(self.pipeline))
        return guidance_scale if convention is None else convention.plain_guidance(guidance_scale)

    def encode_text(self, text: str) -> Conditioning:
        """Gives a text a number; the pipeline itself encodes it, and its embeddings are remembered.

        Args:
            text: A prompt or negative prompt.

        Returns:
            "text" [1].
        """
        self._texts.append(text)
        return Conditioning({"text": torch.tensor([len(self._texts) - 1])})

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Keeps the seeds, from which the pipeline draws its noise itself.

        Args:
            seeds: One seed a row.

        Returns:
            The seeds, int64 [B].
        """
        return torch.tensor(list(seeds), dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def sample(
        self,
        attachment: Attachment,
        rows: Rows,
        members: Sequence[Member],
        prompts: Conditioning,
        negatives: Conditioning | None,
        noise: Tensor,
        num_steps: int,
    ) -> Samples:
        """Draws pictures, one call of the pipeline each.

        Args:
            attachment: The transformer's hooks.
            rows: Each picture's scales [B, M, sites]; the weights are the pipeline's.
            members: The prompt, alone or with the negative prompt; the first weight is plain guidance.
            prompts: B rows of `encode`.
            negatives: B rows; None without guidance.
            noise: Seeds [B].
            num_steps: Number of steps.

        Returns:
            Pictures in the place of latents: float32 [B, 3, H, W] in 0..1, or [B, F, 3, H, W].

        Raises:
            UserError: If the pipeline refuses the call, or runs other forwards than the members stand for.
        """
        from calibri_lightning.sampling.rollout import Samples

        roles: list[Role] = [member.prompt for member in members]
        convention = convention_of(type(self.pipeline))
        guidance = members[0].weight if "negative" in roles else None
        if guidance is not None and convention is not None:
            guidance = convention.own_guidance(guidance)
        passes = self._find_passes(guidance)
        texts = [self._texts[i] for i in prompts.tensors["text"].tolist()]
        others = [self._texts[i] for i in negatives.tensors["text"].tolist()] if negatives is not None else texts
        pictures, num_forwards = [], 0
        for row, (text, other, seed) in enumerate(zip(texts, others, noise.tolist(), strict=True)):
            scales = dict(zip(roles, rows.scales[row].float(), strict=True))
            with steered(self.transformer, attachment, passes, scales) as count:
                pictures.append(self._call.picture(text, other, seed, num_steps, guidance))
            if count.forwards != num_steps * len(passes):
                raise UserError(
                    f"{type(self.pipeline).__name__} ran {count.forwards} forwards in {num_steps} steps, not "
                    f"{len(passes)} in each. Stock needs the same forwards in every step; use a native backbone."
                )
            num_forwards += count.rows
        return Samples(torch.cat(pictures), num_forwards)

    def _find_passes(self, guidance: float | None) -> Passes:
        if guidance not in self._passes:
            passes = find_passes(self.transformer, lambda text, n: self._call.run(text, "", 0, n, guidance))
            guided = "negative" in (role for call in passes for role in call)
            if guided != (guidance is not None):
                name = self._call.guidance_argument
                raise UserError(
                    "members is single, but the pipeline runs a negative prompt beside each prompt. Use members: cfg, "
                    f"or switch its guidance off under arguments, {{{name}: 1.0}} for most pipelines."
                    if guided
                    else f"members is cfg, but the pipeline runs no negative prompt at {name} {guidance:g}: guidance "
                    "is off at that value, or the model was distilled to do without. Raise guidance_scale, or use "
                    "members: single."
                )
            self._passes[guidance] = passes
        return self._passes[guidance]

    @torch.no_grad()
    def probe_forward(self, num_rows: int) -> Tensor:
        """Repeats the first forward of the pipeline's own call, for a small picture or a single frame.

        Args:
            num_rows: Not used; the pipeline decides how many rows its forward has.

        Returns:
            The output, a tensor of as many rows as the transformer saw.
        """
        if self._captured is None or self._captured_on != self.device:
            self._captured_on = self.device
            height, width = (min(side, _PROBE_SIDE) for side in self.image_size)
            few = None if self._call.num_frames is None else 1
            small = replace(self._call, image_size=(height, width), num_frames=few)
            try:
                self._captured = self._first_forward(small)
            except UserError:  # not a size that this pipeline takes
                self._captured = self._first_forward(self._call)
        args, kwargs = self._captured
        output = self.transformer(*args, **kwargs)[0]
        return torch.stack(output) if isinstance(output, list) else output

    def _first_forward(self, call: StockCall) -> Captured:
        """What a call gives its transformer first; the transformer itself does not run."""
        seen: list[Captured] = []

        def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((args, kwargs))
            raise _FirstForwardError

        handle = self.transformer.register_forward_pre_hook(capture, with_kwargs=True)
        try:
            call.run("", "", 0, 1, None)
        except _FirstForwardError:
            pass
        finally:
            handle.remove()
        return seen[0]

    def decode(self, x: Tensor) -> Tensor:
        """Returns the pictures [B, 3, H, W] or videos [B, F, 3, H, W], which `sample` has decoded already."""
        return x

    def schedule(self, num_steps: int) -> Tensor:
        """Refuses: the pipeline keeps its noise levels to itself."""
        self._refuse()

    def latent_shape(self) -> tuple[int, ...]:
        """Refuses: the pipeline keeps its latents to itself."""
        self._refuse()

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Refuses: the pipeline keeps its velocities to itself."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UserError(
            "Stock runs a pipeline's call as a whole, so only strategies that need pictures alone can use it: CMAES "
            "and PairES. Use a native backbone for others."
        )
