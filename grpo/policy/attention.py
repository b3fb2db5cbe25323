"""Attention of packed groups and of cached decoding. Knows nothing of layers or weights.

Axes: N packed tokens, H query heads, K key/value heads, E head size, S sequences, L cache length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from grpo.types import Layout


@dataclass(frozen=True)
class PackedAttention:
    """Causal attention over packed groups: a completion sees its group's prompt and its own past.

    Exact: no token sees another completion. Each group takes two calls, its prompt and its completions side by side.
    """

    layout: Layout

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [N, H, E], k and v [N, K, E] -> [N, H, E]."""
        outputs = []
        start = 0
        for prompt, lengths in zip(self.layout.prompts, self.layout.completions, strict=True):
            middle, end = start + prompt, start + prompt + sum(lengths)
            outputs.append(_causal(q[start:middle], k[start:middle], v[start:middle], scale))
            if lengths:
                prefix = (k[start:middle], v[start:middle])
                outputs.append(
                    _after_prefix(q[middle:end], k[middle:end], v[middle:end], prefix, lengths, scale)
                )
            start = end
        return torch.cat(outputs)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One sequence: q [T, H, E], k and v [T, K, E] -> [T, H, E]."""
    heads = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*heads, is_causal=True, scale=scale, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


def _after_prefix(
    q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor], lengths: tuple[int, ...], scale: float
) -> Tensor:
    """Sequences of these lengths, end to end, after one shared prefix: [sum T, H, E] -> [sum T, H, E]."""
    longest, prompt = max(lengths), prefix[0].shape[0]
    # Padding stands at the end, where no real token looks.
    q, k, v = (pad_sequence(list(x.split(lengths)), batch_first=True).transpose(1, 2) for x in (q, k, v))
    k, v = (
        torch.cat([shared.transpose(0, 1).expand(len(lengths), -1, -1, -1), own], dim=2)
        for shared, own in zip(prefix, (k, v), strict=True)
    )
    visible = torch.ones(longest, prompt + longest, dtype=torch.bool, device=q.device).tril(diagonal=prompt)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=True)
    out = out.transpose(1, 2)  # [S, T, H, E]
    return torch.cat([row[:length] for row, length in zip(out, lengths, strict=True)])


class KeyValueCache:
    """Keys and values of S sequences being written, one slab a layer.

    lengths [S] counts the tokens already there; `append` writes a token for each sequence at its own place.
    """

    def __init__(self, num_layers: int):
        self.keys: list[Tensor] = [torch.empty(0)] * num_layers  # each [S, K, L, E]
        self.values: list[Tensor] = [torch.empty(0)] * num_layers
        self.lengths: list[int] = []
        self._mask = torch.empty(0)
        self._place = torch.empty(0)

    def fill(
        self, layer: int, k: Tensor, v: Tensor, prompts: tuple[int, ...], copies: int, room: int
    ) -> None:
        """Start from packed prompts: k and v [N, K, E]; each prompt is copied for its `copies` completions."""
        for slabs, packed in ((self.keys, k), (self.values, v)):
            padded = pad_sequence(list(packed.split(prompts)), batch_first=True).transpose(1, 2)
            padded = padded.repeat_interleave(copies, dim=0)
            slab = padded.new_zeros(*padded.shape[:2], max(prompts) + room, padded.shape[3])
            slab[:, :, : padded.shape[2]] = padded
            slabs[layer] = slab
        self.lengths = [length for length in prompts for _ in range(copies)]

    def advance(self) -> None:
        """Make place for one more token of each sequence; call once before the layers append."""
        device = self.keys[0].device
        self._place = torch.tensor(self.lengths, device=device)
        self.lengths = [length + 1 for length in self.lengths]
        seen = torch.arange(max(self.lengths), device=device)[None] <= self._place[:, None]
        self._mask = torch.zeros(seen.shape, dtype=self.keys[0].dtype, device=device).masked_fill(
            ~seen, -math.inf
        )

    def append(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of one new token a sequence: q [S, H, E], k and v [S, K, E] -> [S, H, E]."""
        rows = torch.arange(len(self.lengths), device=q.device)
        self.keys[layer][rows, :, self._place] = k
        self.values[layer][rows, :, self._place] = v
        longest = self._mask.shape[1]
        keys, values = self.keys[layer][:, :, :longest], self.values[layer][:, :, :longest]
        # The query heads that share a key/value head become rows of one product instead of copies of the keys.
        grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[2])
        out = F.scaled_dot_product_attention(
            grouped, keys, values, attn_mask=self._mask[:, None, None], scale=scale
        )
        return out.reshape(q.shape)

    def keep(self, rows: list[int]) -> None:
        """Drop all sequences but these."""
        index = torch.tensor(rows, device=self.keys[0].device)
        self.keys = [slab[index] for slab in self.keys]
        self.values = [slab[index] for slab in self.values]
        self.lengths = [self.lengths[row] for row in rows]
