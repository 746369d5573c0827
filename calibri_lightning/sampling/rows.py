"""Finds out how many rows one forward of the transformer should have.

The number fixes the composition of units and with it the last bits of every reward. So it is found once, in steps of
two, so that a little more or less of free memory gives the same number; it is agreed among all ranks and kept in
checkpoints (`CalibriModule`).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from calibri_lightning.calibration.scales import Rows
from calibri_lightning.errors import UserError

if TYPE_CHECKING:
    from calibri_lightning.backbones.base import Backbone
    from calibri_lightning.calibration.attach import Attachment
    from calibri_lightning.calibration.scales import Layout
    from calibri_lightning.prompts import Prompt

_log = logging.getLogger(__name__)

MOST_ROWS = 128
"""More rows make a forward no faster on any device, and leave less to share among ranks."""
TOKENS_PER_FORWARD = 2**15
"""Where nothing is measured: rows x tokens of one forward."""
PICTURES_PER_UNIT = 16
"""Where a pipeline's own call makes one picture at a time, so that units only share out the work."""
_USABLE = 0.8
"""Share of the free memory that a forward may take; the rest is for decoding, rewards and fragmentation."""
_MEASURED = (1, 3)
"""Pictures of the two forwards that are measured; memory grows linearly with them."""


def check_rows(rows: int, num_members: int) -> None:
    """Refuses forwards that would not hold one picture.

    Args:
        rows: Most rows of a forward.
        num_members: Rows of a picture.

    Raises:
        UserError: If rows is the smaller.
    """
    if rows < num_members:
        raise UserError(
            f"rows_per_forward is {rows}; one picture takes a row for each of its {num_members} member(s). "
            f"Set rows_per_forward to {num_members} or more."
        )


def rows_by_rule(tokens: int | None, num_members: int) -> int:
    """The rows of a forward where nothing is measured, a function of the model alone.

    Args:
        tokens: Tokens that the transformer sees for one row; None where a pipeline's own call makes one picture.
        num_members: Rows of a picture.

    Returns:
        Rows of the largest power of two of pictures with at most 128 rows and 32,768 tokens.
    """
    most = MOST_ROWS // num_members
    by_tokens = PICTURES_PER_UNIT if tokens is None else TOKENS_PER_FORWARD // (tokens * num_members)
    return _power_of_two(min(most, by_tokens)) * num_members


def automatic_rows(backbone: Backbone, attachment: Attachment, layout: Layout, prompt: Prompt) -> int:
    """Finds the rows of a forward: on a GPU by measuring, elsewhere by rule.

    The memory of a CPU is shared with whatever else runs there, so measuring it would not give the same number twice.

    Args:
        backbone: The model, on its device.
        attachment: Its hooks.
        layout: The meaning of theta; each picture takes a row a member.
        prompt: The longest prompt of the run.

    Returns:
        Rows, a power of two times the number of members.
    """
    num_members, tokens = len(layout.members), backbone.tokens_per_row
    if tokens is None or backbone.device.type != "cuda":
        return rows_by_rule(tokens, num_members)
    most = max(1, MOST_ROWS // num_members)
    pictures = _measured_pictures(backbone, attachment, layout, prompt, most)
    _log.info("rows_per_forward: auto found %d.", pictures * num_members)
    return pictures * num_members


def _power_of_two(bound: float) -> int:
    """The largest power of two up to a bound; 1 where that is less."""
    return 1 << (max(1, int(bound)).bit_length() - 1)


def _measured_pictures(backbone: Backbone, attachment: Attachment, layout: Layout, prompt: Prompt, most: int) -> int:
    """Pictures that fit into the memory of a GPU, and were sampled there for one step."""
    try:
        one, more = (_peak(backbone, attachment, layout, prompt, count) for count in _MEASURED)
        each = (more - one) / (_MEASURED[1] - _MEASURED[0])
        pictures = _power_of_two(min(most, 1 + (_USABLE * _free_memory(backbone.device) - one) / max(each, 1.0)))
    except torch.OutOfMemoryError:
        pictures = 2
    while pictures > 1:
        torch.cuda.empty_cache()
        try:
            _peak(backbone, attachment, layout, prompt, pictures)
        except torch.OutOfMemoryError:
            pictures //= 2
        else:
            break
    torch.cuda.empty_cache()
    return pictures


def _free_memory(device: torch.device) -> int:
    """Bytes that this process can still get: free on the device, or set aside by torch and unused."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _peak(backbone: Backbone, attachment: Attachment, layout: Layout, prompt: Prompt, pictures: int) -> int:
    """Bytes that sampling one step takes at its height, beyond what was there before."""
    torch.cuda.reset_peak_memory_stats(backbone.device)
    before = torch.cuda.memory_allocated(backbone.device)
    sample_once(backbone, attachment, layout, prompt, pictures)
    return torch.cuda.max_memory_allocated(backbone.device) - before


def sample_once(backbone: Backbone, attachment: Attachment, layout: Layout, prompt: Prompt, pictures: int) -> None:
    """Samples one step of some pictures, as a unit of the evaluation is sampled.

    Args:
        backbone: The model.
        attachment: Its hooks.
        layout: The meaning of theta.
        prompt: The prompt of all pictures.
        pictures: How many.
    """
    rows = layout.rows(torch.tensor(layout.start)[None])
    guided = any(member.prompt == "negative" for member in layout.members)
    place = [0] * pictures
    backbone.sample(
        attachment,
        Rows(rows.scales[place], rows.weights[place]),
        layout.members,
        backbone.encode([prompt.text]).take(place),
        backbone.encode([prompt.negative], negative=True).take(place) if guided else None,
        backbone.noise(range(pictures)),
        1,
    )
