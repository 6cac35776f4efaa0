"""Inference with the tokens that are on, and no others: sequences of different lengths in one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchshaping.mixed_scale.attention import AttentionSettings, run_with_attention

__all__ = ["PACKINGS", "Sequences", "through"]


@dataclass(frozen=True)
class Sequences:
    """Where the tokens of each example are in the packed batch: the shortest sequence first.

    Attributes:
        lengths: the lengths of the sequences, in the order in which they are packed.
        place: where each token is that is on, of shape (N, tokens of both scales); others mean nothing.
    """

    lengths: Sequence[int]
    place: Tensor

    @staticmethod
    def of(on: Tensor) -> Sequences:
        """Where the tokens are that are on, booleans of shape (N, tokens)."""
        lengths = on.sum(dim=1)
        ordered, order = lengths.sort(stable=True)
        start = torch.empty_like(lengths)
        start[order] = ordered.cumsum(0) - ordered
        return Sequences(ordered.tolist(), start[:, None] + on.cumsum(dim=1) - 1)

    @property
    def total(self) -> int:
        """The number of tokens in the batch."""
        return sum(self.lengths)

    @property
    def groups(self) -> list[tuple[int, int]]:
        """Pairs of a length and the number of sequences that have it, the number first."""
        return [(len([*group]), length) for length, group in groupby(self.lengths)]


Blocks = Iterable[nn.Module]


def through(blocks: Blocks, tokens: Tensor) -> Tensor:
    """Sequences of the same length, of shape (N, tokens, width), go through the blocks as they always do."""
    for block in blocks:
        tokens = block(tokens)
    return tokens


def _together(tokens: Tensor, number: int, length: int, blocks: Blocks) -> Tensor:
    return through(blocks, tokens.unflatten(0, (number, length))).flatten(0, 1)


def _buckets(tokens: Tensor, sequences: Sequences, blocks: Blocks) -> Tensor:
    sizes = [number * length for number, length in sequences.groups]
    parts = zip(tokens.split(sizes), sequences.groups, strict=True)
    return torch.cat([_together(part, *group, blocks) for part, group in parts])


def _flat(tokens: Tensor, sequences: Sequences, blocks: Blocks) -> Tensor:
    groups = sequences.groups
    if len(groups) == 1:
        return _together(tokens, *groups[0], blocks)
    variable = _variable_length_attention(tokens.device)
    starts = torch.tensor([0, *sequences.lengths], device=tokens.device).cumsum(0).int()

    def attend(query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        if variable is not None and query.dtype in (torch.float16, torch.bfloat16):
            packed = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
            longest = sequences.lengths[-1]
            attended = variable(*packed, starts, starts, longest, longest, scale=settings["scale"])
            return attended.transpose(0, 1)[None]
        sizes = [number * length for number, length in groups]
        parts = []
        for (number, _), *part in zip(
            groups, *(x[0].split(sizes, dim=1) for x in (query, key, value)), strict=True
        ):
            q, k, v = (x.unflatten(1, (number, -1)).transpose(0, 1) for x in part)
            attended = F.scaled_dot_product_attention(q, k, v, **settings)
            parts.append(attended.transpose(0, 1).flatten(1, 2))
        return torch.cat(parts, dim=1)[None]

    batch = tokens[None]
    for block in blocks:
        batch = run_with_attention(block, batch, attend)
    return batch[0]


def _padded(tokens: Tensor, sequences: Sequences, blocks: Blocks) -> Tensor:
    groups = sequences.groups
    if len(groups) == 1:
        return _together(tokens, *groups[0], blocks)
    lengths = torch.tensor(sequences.lengths, device=tokens.device)
    is_token = torch.arange(sequences.lengths[-1], device=tokens.device) < lengths[:, None]
    batch = tokens.new_zeros(*is_token.shape, tokens.shape[1])
    batch[is_token] = tokens
    mask = is_token[:, None, None, :]

    def attend(query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **settings)

    for block in blocks:
        batch = run_with_attention(block, batch, attend)
    return batch[is_token]


PACKINGS: dict[str, Callable[[Tensor, Sequences, Blocks], Tensor]] = {
    "flat": _flat,
    "buckets": _buckets,
    "padded": _padded,
}
"""How packed tokens of shape (total, width) go through the blocks, by name."""


def _variable_length_attention(device: torch.device) -> Callable[..., Tensor] | None:
    """Torch's attention for packed sequences, where there is one: on CUDA devices in half precision."""
    if device.type != "cuda":
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return cast("Callable[..., Tensor]", varlen_attn)
