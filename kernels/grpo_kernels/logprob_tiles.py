"""The "tiles" route of `linear_logprob`, for Hopper and later: one kernel multiplies by the head and writes exp(z - r)
s' as its epilogue. Axes and notation are those of logprob.py, but that logits, references and sums are in bits, not
nats: exp2 is the instruction, exp a product more.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_kernels.dispatch import (
    TensorDescriptor,
    cdiv,
    has_descriptors,
    interpreting,
    next_power_of_2,
    num_multiprocessors,
    tl,
    triton,
)
from grpo_kernels.logprob_head import LIMIT, ROUTE_CHUNK_BYTES, allocate, chunks_of, round_up, scaled_logit

# Of the "tiles" route: rows of a chunk that stores nothing, and of a program that finishes a chunk.
LARGEST_TILES_CHUNK = 8192
FINISHED_ROWS = 32

LN_2 = tl.constexpr(math.log(2))


def fits_tiles(hidden: Tensor, weight: Tensor, form: str) -> bool:
    """Whether this route can run. Tensor descriptors need Hopper or later, and rows of whole, aligned 16 bytes."""
    D = hidden.shape[1]
    is_able = has_descriptors(hidden.device) and hidden.dtype == torch.bfloat16
    if interpreting():
        is_able = hidden.dtype == torch.float32
    is_laid_out = all(tensor.stride() == (D, 1) and tensor.data_ptr() % 16 == 0 for tensor in (hidden, weight))
    return is_able and is_laid_out and D % 8 == 0 and form != "unit_entropy"


# How the head's product is cut up: what ran fastest on an H100 (LOG.md, "2026-11-21 LM head, exponentials in the
# epilogue: works, 2.03x, 2.26x"). 32 KiB tiles of exponentials are staged in shared memory beside the pipeline's
# stages, hence two to a tile.
TILE_ROWS, TILE_COLUMNS, TILE_DEPTH = 128, 256, 64
TILE_OPTIONS = {"num_warps": 8, "num_stages": 3}


def tiles_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, softcap: float, form: str, chunk_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = allocate(hidden, form)
    logprobs, entropy, unit, unit_scale, _ = outputs
    if len(hidden) == 0:
        return outputs
    V = len(weight)
    chunk_rows = min(chunk_rows or _tiles_chunk_rows(weight, form), len(hidden))
    scaling = _Scaling(1.0 / (temperature * math.log(2)), softcap)
    target_logits = _target_logits(hidden, weight, targets, scaling)
    references = target_logits.clone()
    exponentials = weight.new_empty(min(chunk_rows, len(unit)), round_up(V, 8))
    sums = references.new_empty(3, cdiv(V, TILE_COLUMNS), chunk_rows)
    for rows in chunks_of(len(hidden), chunk_rows):
        chunk = _Chunk(
            hidden[rows], weight, targets[rows], target_logits[rows], references[rows],
            exponentials[: rows.stop - rows.start] if len(unit) > 0 else None, sums, scaling,
        )  # fmt: skip
        out_of_range = torch.zeros(cdiv(len(chunk.hidden), TILE_ROWS), dtype=torch.int32, device=hidden.device)
        for only_out_of_range in (False, True):
            _multiply(chunk, out_of_range, only_out_of_range)
            _finish(chunk, out_of_range, only_out_of_range, logprobs[rows], entropy[rows], unit_scale[rows])
        if len(unit) > 0:
            torch.mm(chunk.exponentials[:, :V], weight, out=unit[rows])
    return outputs


def _tiles_chunk_rows(weight: Tensor, form: str) -> int:
    """A power of 2 of rows: hidden states that stay in the L2 cache, exponentials of at most ROUTE_CHUNK_BYTES."""
    V, D = weight.shape
    rows = 2**24 // (D * weight.element_size())
    if form == "unit":
        rows = min(max(rows, 2048), ROUTE_CHUNK_BYTES // (V * weight.element_size()))
    return max(TILE_ROWS, 1 << (min(rows, LARGEST_TILES_CHUNK).bit_length() - 1))


@dataclass(frozen=True)
class _Scaling:
    inverse_temperature: float  # bits, not nats
    softcap: float


@dataclass(frozen=True)
class _Chunk:
    hidden: Tensor  # [C, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [C]
    target_logits: Tensor  # [C] z_y
    references: Tensor  # [C] r
    exponentials: Tensor | None  # [C, V padded] exp(z - r) s', and -R s'_y at the target
    sums: Tensor  # [3, tiles of V, C or more]: of exp(z - r), of exp(z - r) (z - r), and the largest z - r
    scaling: _Scaling


def _target_logits(hidden: Tensor, weight: Tensor, targets: Tensor, scaling: _Scaling) -> Tensor:
    M, D = hidden.shape
    logits = torch.empty(M, dtype=torch.float32, device=hidden.device)
    _target_logits_kernel[(M,)](
        hidden, weight, targets, logits, D, scaling.inverse_temperature, scaling.softcap,
        SOFTCAP=scaling.softcap > 0, BLOCK=min(4096, next_power_of_2(D)), num_warps=4,
    )  # fmt: skip
    return logits


def _multiply(chunk: _Chunk, out_of_range: Tensor, only_out_of_range: bool) -> None:
    """Fill `sums` and `exponentials`: of every row, or of the blocks of rows marked in `out_of_range`."""
    (C, D), V = chunk.hidden.shape, len(chunk.weight)
    # What is not stored still has to be described.
    stored = chunk.hidden if chunk.exponentials is None else chunk.exponentials[:, :V]
    num_tiles = cdiv(C, TILE_ROWS) * cdiv(V, TILE_COLUMNS)
    programs = min(num_tiles, num_multiprocessors(chunk.hidden.device))
    _multiply_kernel[(programs,)](
        TensorDescriptor.from_tensor(chunk.hidden, [TILE_ROWS, TILE_DEPTH]),
        TensorDescriptor.from_tensor(chunk.weight, [TILE_COLUMNS, TILE_DEPTH]),
        TensorDescriptor.from_tensor(stored, [TILE_ROWS, TILE_COLUMNS // 2]),
        chunk.targets, chunk.references, chunk.sums, out_of_range,
        C, V, D, chunk.sums.stride(0), chunk.sums.stride(1),
        chunk.scaling.inverse_temperature, chunk.scaling.softcap, programs,
        ONLY_OUT_OF_RANGE=only_out_of_range, SOFTCAP=chunk.scaling.softcap > 0, STORE=chunk.exponentials is not None,
        ROWS=TILE_ROWS, COLUMNS=TILE_COLUMNS, DEPTH=TILE_DEPTH, **TILE_OPTIONS,
    )  # fmt: skip


def _finish(
    chunk: _Chunk, out_of_range: Tensor, only_out_of_range: bool, logprobs: Tensor, entropy: Tensor, unit_scale: Tensor
) -> None:
    """Sums to values, and the target's own coefficient.

    Marks the blocks of rows that left the range of exp, and gives those rows a reference with which they do not.
    """
    C, store = len(chunk.hidden), chunk.exponentials is not None
    _finish_kernel[(cdiv(C, FINISHED_ROWS),)](
        chunk.sums, chunk.targets, chunk.target_logits, chunk.references,
        chunk.exponentials if store else chunk.hidden, out_of_range, logprobs, entropy, unit_scale,
        C, cdiv(len(chunk.weight), TILE_COLUMNS), chunk.sums.stride(0), chunk.sums.stride(1),
        chunk.exponentials.stride(0) if store else 0, 1.0 / chunk.scaling.inverse_temperature, chunk.scaling.softcap,
        LIMIT=LIMIT / math.log(2), ONLY_OUT_OF_RANGE=only_out_of_range, SOFTCAP=chunk.scaling.softcap > 0, STORE=store,
        ROWS=FINISHED_ROWS, BLOCK_ROWS=TILE_ROWS, TILES=32, num_warps=4,
    )  # fmt: skip


@triton.jit
def _target_logits_kernel(
    hidden, weight, targets, logits, D, inverse_temperature, softcap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """z_y of one row, in float32."""
    row = tl.program_id(0)
    hidden += row.to(tl.int64) * D
    weight += tl.load(targets + row) * D
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        h = tl.load(hidden + columns, mask=columns < D, other=0.0).to(tl.float32)
        w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
        products += h * w
    z, _ = scaled_logit(tl.sum(products, 0), inverse_temperature, softcap, SOFTCAP)
    tl.store(logits + row, z)


@triton.jit(do_not_specialize=["C", "sum_stride", "tile_stride", "num_programs"])
def _multiply_kernel(
    hidden, weight, exponentials, targets, references, sums, out_of_range,
    C, V, D, sum_stride, tile_stride, inverse_temperature, softcap, num_programs,
    ONLY_OUT_OF_RANGE: tl.constexpr, SOFTCAP: tl.constexpr, STORE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Tiles of hidden @ weight.T, one after the other; blocks of rows vary fastest, so the head is read once."""
    num_row_blocks = tl.cdiv(C, ROWS)
    num_tiles = num_row_blocks * tl.cdiv(V, COLUMNS)
    if ONLY_OUT_OF_RANGE:
        marked = 0
        for block in range(num_row_blocks):
            marked += tl.load(out_of_range + block)
        num_tiles = tl.where(marked > 0, num_tiles, 0)
    for tile in tl.range(tl.program_id(0), num_tiles, num_programs, flatten=not ONLY_OUT_OF_RANGE):
        row_block = tile % num_row_blocks
        column_block = tile // num_row_blocks
        wanted = True
        if ONLY_OUT_OF_RANGE:
            wanted = tl.load(out_of_range + row_block) > 0
        if wanted:
            accumulator = tl.zeros([ROWS, COLUMNS], tl.float32)
            for depth in range(0, D, DEPTH):
                h = hidden.load([row_block * ROWS, depth])
                w = weight.load([column_block * COLUMNS, depth])
                accumulator = tl.dot(h, w.T, accumulator, input_precision="ieee")
            rows = row_block * ROWS + tl.arange(0, ROWS)
            columns = column_block * COLUMNS + tl.arange(0, COLUMNS)
            target = tl.load(targets + rows, mask=rows < C, other=-1).to(tl.int32)
            reference = tl.load(references + rows, mask=rows < C, other=0.0)
            z, slope = scaled_logit(accumulator, inverse_temperature, softcap, SOFTCAP)
            others = (columns[None, :] != target[:, None]) & (columns < V)[None, :]
            shifted = z - reference[:, None]
            largest = tl.max(tl.where(others, shifted, -float("inf")), 1)
            exponential = tl.where(others, tl.exp2(shifted), 0.0)
            sum_offsets = column_block.to(tl.int64) * tile_stride + rows
            tl.store(sums + sum_offsets, tl.sum(exponential, 1), mask=rows < C)
            tl.store(sums + sum_stride + sum_offsets, tl.sum(exponential * shifted, 1), mask=rows < C)
            tl.store(sums + 2 * sum_stride + sum_offsets, largest, mask=rows < C)
            if STORE:
                coefficients = exponential
                if SOFTCAP:
                    coefficients = exponential * slope
                left, right = tl.split(tl.permute(tl.reshape(coefficients, [ROWS, 2, COLUMNS // 2]), (0, 2, 1)))
                column = column_block * COLUMNS
                exponentials.store([row_block * ROWS, column], left.to(exponentials.dtype))
                exponentials.store([row_block * ROWS, column + COLUMNS // 2], right.to(exponentials.dtype))


@triton.jit(do_not_specialize=["C", "sum_stride", "tile_stride"])
def _finish_kernel(
    sums, targets, target_logits, references, exponentials, out_of_range, logprobs, entropy, unit_scale,
    C, num_column_blocks, sum_stride, tile_stride, exponential_stride, temperature, softcap,
    LIMIT: tl.constexpr, ONLY_OUT_OF_RANGE: tl.constexpr, SOFTCAP: tl.constexpr, STORE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row_block = tl.program_id(0) * ROWS // BLOCK_ROWS
    if ONLY_OUT_OF_RANGE:
        if tl.load(out_of_range + row_block) == 0:
            return
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < C
    rest = tl.zeros([TILES, ROWS], tl.float32)
    weighted = tl.zeros([TILES, ROWS], tl.float32)
    largest = tl.full([TILES, ROWS], -float("inf"), tl.float32)
    for start in range(0, num_column_blocks, TILES):
        tiles = start + tl.arange(0, TILES)
        mask = (tiles < num_column_blocks)[:, None] & inside[None, :]
        offsets = sums + tiles.to(tl.int64)[:, None] * tile_stride + rows[None, :]
        rest += tl.load(offsets, mask=mask, other=0.0)
        weighted += tl.load(offsets + sum_stride, mask=mask, other=0.0)
        largest = tl.maximum(largest, tl.load(offsets + 2 * sum_stride, mask=mask, other=-float("inf")))
    rest = tl.sum(rest, 0)
    weighted = tl.sum(weighted, 0)
    largest = tl.max(largest, 0)

    target_logit = tl.load(target_logits + rows, mask=inside, other=0.0)
    reference = tl.load(references + rows, mask=inside, other=0.0)
    shifted = target_logit - reference
    target_exponential = tl.exp2(shifted)
    total = target_exponential + rest
    log_total = tl.log2(total)
    row_entropy = log_total - (weighted + target_exponential * shifted) / total
    tl.store(logprobs + rows, (shifted - log_total) * LN_2, mask=inside)
    tl.store(entropy + rows, row_entropy * LN_2, mask=inside)
    if STORE:
        target = tl.load(targets + rows, mask=inside, other=0)
        coefficient = -rest
        if SOFTCAP:
            bent = target_logit * temperature / softcap
            coefficient = -rest * (1.0 - bent * bent)
        offsets = rows.to(tl.int64) * exponential_stride + target
        tl.store(exponentials + offsets, coefficient.to(exponentials.dtype.element_ty), mask=inside)
        tl.store(unit_scale + rows, -1.0 / total, mask=inside)
    if not ONLY_OUT_OF_RANGE:
        left_range = inside & (largest > LIMIT)
        tl.store(references + rows, reference + largest, mask=left_range)
        if tl.max(left_range.to(tl.int32), 0) > 0:
            tl.atomic_max(out_of_range + row_block, 1)
