"""The key/value cache of sequences being written, and attention over it. Knows nothing of layers or weights.

Axes: N packed tokens, H query heads, K key/value heads, E head size, S sequences, L cache length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from grpo_kernels.attention import masked_attention
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig

from grpo.policy.form import Scores


def kv_bytes_per_token(source: str, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers of the model at `source`; 0 where its layers have no heads."""
    settings = AutoConfig.from_pretrained(source).get_text_config()
    all_heads = getattr(settings, "num_attention_heads", 0) or 0
    heads = getattr(settings, "num_key_value_heads", None) or all_heads
    size = getattr(settings, "head_dim", None) or (settings.hidden_size // all_heads if all_heads else 0)
    return 2 * settings.num_hidden_layers * heads * size * dtype.itemsize


def full_cache_bytes(sequences: int, longest: int, per_token: int) -> int:
    """Of a vLLM cache for all sequences at full length, and a little more: blocks are whole, and one is always kept
    free."""
    return int(1.05 * sequences * longest * per_token + 2**26)


class KeyValueCache:
    """Keys and values of S sequences being written, one slab a layer.

    lengths [S] counts the tokens already there; `append` writes a token for each sequence at its own position.
    """

    def __init__(self, num_layers: int, reach: Mapping[int | None, int]):
        """reach: of each window that its layers have, None among them, how many tokens it is."""
        self.keys: list[Tensor] = [torch.empty(0)] * num_layers  # each [S, K, L, E]
        self.values: list[Tensor] = [torch.empty(0)] * num_layers
        self.lengths: list[int] = []
        self._reach = reach
        self._masks: dict[int | None, Tensor] = {}  # added to scores
        self._place = torch.empty(0)

    def fill(
        self, layer: int, k: Tensor, v: Tensor, prompts: tuple[int, ...], copies: list[int], max_tokens: int
    ) -> None:
        """Start from packed prompts: k and v [N, K, E]; each prompt is there `copies` times."""
        times = torch.tensor(copies, device=k.device)
        for slabs, packed in ((self.keys, k), (self.values, v)):
            padded = pad_sequence(list(packed.split(prompts)), batch_first=True).transpose(1, 2)
            padded = padded.repeat_interleave(times, dim=0)
            slab = padded.new_zeros(*padded.shape[:2], max(prompts) + max_tokens, padded.shape[3])
            slab[:, :, : padded.shape[2]] = padded
            slabs[layer] = slab
        self.lengths = [length for length, count in zip(prompts, copies, strict=True) for _ in range(count)]

    def advance(self) -> None:
        """Allow for one more token of each sequence; call once before the layers append."""
        device = self.keys[0].device
        self._place = torch.tensor(self.lengths, device=device)
        self.lengths = [length + 1 for length in self.lengths]
        back = self._place[:, None] - torch.arange(max(self.lengths), device=device)[None]  # how far a key lies back
        nothing = torch.zeros(back.shape, dtype=self.keys[0].dtype, device=device)
        hidden = nothing.masked_fill(back < 0, -math.inf)
        self._masks = {w: hidden.masked_fill(back >= reach, -math.inf) for w, reach in self._reach.items()}

    def append(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        """Attention of one new token a sequence: q [S, H, E], k and v [S, K, E] -> [S, H, E]."""
        rows = torch.arange(len(self.lengths), device=q.device)
        self.keys[layer][rows, :, self._place] = k
        self.values[layer][rows, :, self._place] = v
        mask = self._masks[scores.window][:, None, None]
        longest = mask.shape[-1]
        keys, values = self.keys[layer][:, :, :longest], self.values[layer][:, :, :longest]
        # The query heads that share a key/value head become rows of one product instead of copies of the keys.
        grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[2])
        return masked_attention(grouped, keys, values, mask, scores.scale, scores.softcap).reshape(q.shape)

    def keep(self, rows: list[int]) -> None:
        """Drop all sequences but these."""
        index = torch.tensor(rows, device=self.keys[0].device)
        self.keys = [slab[index] for slab in self.keys]
        self.values = [slab[index] for slab in self.values]
        self.lengths = [self.lengths[row] for row in rows]
