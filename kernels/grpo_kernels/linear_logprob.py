"""Log-probability of the target, and entropy, of a linear head, without the [M, V] logits ever existing at once.
Knows nothing of losses: it returns both with the gradients that any loss on them needs.

Axes: M rows, D hidden size, V vocabulary, C rows of a chunk.

For a row h [D] with target y, head W [V, D], soft cap k and temperature t:

    x_v = W_v . h        s_v = k tanh(x_v / k)  (or x_v)        z_v = s_v / t           soft cap first, then temperature
    logprob = z_y - lse(z)                                      p = softmax(z)
    entropy = lse(z) - sum_v p_v z_v

The head being frozen, a loss reaches h only through those two numbers, so with c = dL/dlogprob and e = dL/dentropy

    dL/dh = c u + e w
    u = sum_v (1[v = y] - p_v) s'_v W_v / t        w = -sum_v p_v (log p_v + entropy) s'_v W_v / t

u does not depend on the loss: the forward builds it while a chunk of logits is alive ("unit gradient") and the backward
is a scaling. That is two products with the head, where recomputing the logits takes three. w needs one more.

The sums run over exp(z - r), r a reference of the row, and leave out the target, which is added in closed form:

    a = exp(z_y - r)    R = sum_{v != y} exp(z_v - r)    Z = a + R    1 - p_y = R / Z
    t u = (R s'_y W_y - sum_{v != y} exp(z_v - r) s'_v W_v) / Z

so that nothing cancels when p_y is close to 1, and r may be any number that keeps exp in range. r = z_y does, unless
the target is more than 60 nats below the largest logit, and it is known before the logits are: one pass suffices.

Two routes compute it on a GPU:
    "tiles"  Hopper and later, bfloat16: one kernel multiplies and writes exp(z - r) s' in bfloat16 as its epilogue, so
             the float32 logits never leave the registers. cuBLAS multiplies that with the head. A row outside the
             range of exp is found from the tiles' maxima and its block of rows is multiplied again with a better r.
    "rows"   everything else: cuBLAS writes float32 logits, one program a row turns them into coefficients.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from grpo_kernels.dispatch import (
    Impl,
    Operator,
    TensorDescriptor,
    cdiv,
    choose,
    has_descriptors,
    interpreting,
    isolated,
    next_power_of_2,
    num_multiprocessors,
    tl,
    triton,
)

# "values" keeps nothing for a backward, "unit" builds u, "unit_entropy" u and w, "recompute" serves a trained head.
Form = Literal["values", "unit", "unit_entropy", "recompute"]

# Logits alive at once in the twin: 4 MiB of float32 stays in a CPU's caches, 512 MiB keeps a GPU's products efficient.
TORCH_CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**27}
SMALLEST_TORCH_CHUNK = 64

# What a chunk of a Triton route may hold at once, unless `chunk_rows` says otherwise.
ROUTE_CHUNK_BYTES = 3 * 2**28

# Of the "tiles" route: rows of a chunk that stores nothing, and of a program that finishes a chunk.
LARGEST_TILES_CHUNK = 8192
FINISHED_ROWS = 32

# Nats: exp of it, summed over any vocabulary and weighted by it, is within float32 and bfloat16.
LIMIT = 60.0

# Probabilities of a large vocabulary are subnormal in float16: scaled before a float16 product, and back after it.
FLOAT16_SCALE = 4096.0


@isolated
def linear_logprob(
    hidden: Tensor,  # [M, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [M] int64
    temperature: float = 1.0,
    softcap: float | None = None,
    *,
    impl: Impl = "auto",
    differentiable_entropy: bool = False,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:  # [M], [M]
    """log p(targets) and entropy, in nats, of softmax(softcap(hidden @ weight.T) / temperature).

    Both are float32 (float64 for float64 inputs), from logits accumulated in float32. Gradients flow to `hidden`, and
    to `weight` where it requires them; through the entropy only with `differentiable_entropy`, which costs one more
    product, and else the entropy is returned detached. `chunk_rows` trades speed for memory: 2 to 8 bytes of V a row.

    Raises ValueError for shapes that do not belong together, a temperature or soft cap that is not positive, and
    impl="triton" where no kernel can run. A target outside [0, V) is undefined behaviour on a GPU.
    """
    _check(hidden, weight, targets, temperature, softcap, chunk_rows)
    form = _form(hidden, weight, differentiable_entropy)
    chosen = choose("linear_logprob", impl, hidden, weight)
    logprobs, entropy, _, _, _ = _forward_op(
        hidden, weight, targets.contiguous(), temperature, softcap or 0.0, form, differentiable_entropy, chosen,
        chunk_rows or 0,
    )  # fmt: skip
    return logprobs, entropy if differentiable_entropy else entropy.detach()


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, softcap: float | None, chunk_rows: int | None
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden is {list(hidden.shape)} and weight {list(weight.shape)}; give [M, D] and [V, D].")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets is {list(targets.shape)}; give one target for each of {hidden.shape[0]} rows.")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets is {targets.dtype}; give int64, as torch.gather takes.")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}; give both the same dtype.")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it divides the logits, so give a positive number.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; give a positive number, or None for no cap.")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}; give 1 or more, or None to have it chosen.")


def _form(hidden: Tensor, weight: Tensor, differentiable_entropy: bool) -> Form:
    if not torch.is_grad_enabled():
        return "values"
    if weight.requires_grad:
        return "recompute"
    if hidden.requires_grad:
        return "unit_entropy" if differentiable_entropy else "unit"
    return "values"


# The two operators, as torch.compile and autograd see them. `softcap` 0 means none, `chunk_rows` 0 means "choose".


def _launch_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float,
    form: str,
    differentiable_entropy: bool,
    chosen: str,
    chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities [M], entropy [M], and what the backward needs, empty in forms that do not need it:
    t u [M, D] up to a factor of its row, that factor [M], and t w [M, D].
    """
    if chosen == "torch":
        forward = _torch_forward
    else:
        forward = _tiles_forward if _fits_tiles(hidden, weight, form) else _rows_forward
    return forward(hidden, weight, targets, temperature, softcap, form, chunk_rows)


def _fake_forward(hidden, weight, targets, temperature, softcap, form, differentiable_entropy, chosen, chunk_rows):
    return _allocate(hidden, form)


def _allocate(hidden: Tensor, form: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    M, D = hidden.shape
    logprobs = torch.empty(M, dtype=_value_dtype(hidden), device=hidden.device)
    unit = hidden.new_empty(M if form in ("unit", "unit_entropy") else 0, D)
    unit_scale = logprobs.new_empty(len(unit))
    unit_entropy = hidden.new_empty(M if form == "unit_entropy" else 0, D)
    return logprobs, torch.empty_like(logprobs), unit, unit_scale, unit_entropy


def _value_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _launch_recompute(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    temperature: float,
    softcap: float,
    chunk_rows: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of `hidden` [M, D] and of `weight` [V, D] for a trained head, from logits computed again."""
    return _torch_recompute(hidden, weight, targets, grad_logprobs, grad_entropy, temperature, softcap, chunk_rows)


def _fake_recompute(hidden, weight, targets, grad_logprobs, grad_entropy, temperature, softcap, chunk_rows):
    return torch.empty_like(hidden), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, targets, temperature, softcap, form, differentiable_entropy, _, chunk_rows = inputs
    _, _, unit, unit_scale, unit_entropy = output
    ctx.mark_non_differentiable(unit, unit_scale, unit_entropy)
    ctx.set_materialize_grads(False)
    ctx.form, ctx.temperature, ctx.softcap, ctx.chunk_rows = form, temperature, softcap, chunk_rows
    ctx.differentiable_entropy = differentiable_entropy
    if form == "recompute":
        ctx.save_for_backward(hidden, weight, targets)
    else:
        ctx.save_for_backward(unit, unit_scale, unit_entropy)


def _backward(ctx, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_not_differentiable):
    grad_hidden = grad_weight = None
    if ctx.form == "recompute":
        hidden, weight, targets = ctx.saved_tensors
        zero = torch.zeros(len(hidden), dtype=_value_dtype(hidden), device=hidden.device)
        grad_logprobs = zero if grad_logprobs is None else grad_logprobs
        if grad_entropy is None or not ctx.differentiable_entropy:
            grad_entropy = zero
        grad_hidden, grad_weight = _recompute_op(
            hidden, weight, targets, grad_logprobs, grad_entropy, ctx.temperature, ctx.softcap, ctx.chunk_rows
        )
    else:
        unit, unit_scale, unit_entropy = ctx.saved_tensors
        if grad_logprobs is not None:
            grad_hidden = _scale_rows(unit, grad_logprobs * unit_scale / ctx.temperature)
        if grad_entropy is not None and ctx.form == "unit_entropy":
            through_entropy = _scale_rows(unit_entropy, grad_entropy / ctx.temperature)
            grad_hidden = through_entropy if grad_hidden is None else grad_hidden + through_entropy
    return grad_hidden, grad_weight, None, None, None, None, None, None, None


_forward_op = Operator("linear_logprob", _launch_forward, _fake_forward)
_recompute_op = Operator("linear_logprob_recompute", _launch_recompute, _fake_recompute)
_forward_op.differentiate(_setup_context, _backward)


def _scale_rows(rows: Tensor, scale: Tensor) -> Tensor:
    """rows [M, D] times scale [M], multiplied in the type of `scale` and rounded once."""
    return torch.mul(rows, scale[:, None], out=torch.empty_like(rows))


# The torch twin.


def _torch_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, softcap: float, form: str, chunk_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logprobs, entropy, unit, unit_scale, unit_entropy = _allocate(hidden, form)
    unit_scale.fill_(1.0)
    head = _Head(weight)
    for rows in _chunks(len(hidden), chunk_rows or _torch_chunk_rows(weight)):
        logits = head.logits(hidden[rows])
        chunk = _Rows(logits, targets[rows], temperature, softcap)
        logprobs[rows], entropy[rows] = chunk.logprob, chunk.entropy
        if form in ("unit", "unit_entropy"):
            unit[rows] = head.combine(chunk.unit_coefficients())
        if form == "unit_entropy":
            unit_entropy[rows] = head.combine(chunk.entropy_coefficients())
    return logprobs, entropy, unit, unit_scale, unit_entropy


def _torch_recompute(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    temperature: float,
    softcap: float,
    chunk_rows: int,
) -> tuple[Tensor, Tensor]:
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros(weight.shape, dtype=_value_dtype(hidden), device=weight.device)
    head = _Head(weight)
    for rows in _chunks(len(hidden), chunk_rows or _torch_chunk_rows(weight)):
        chunk = _Rows(head.logits(hidden[rows]), targets[rows], temperature, softcap)
        grad_logits = chunk.unit_coefficients().mul_((grad_logprobs[rows] / temperature)[:, None])
        grad_logits += chunk.entropy_coefficients().mul_((grad_entropy[rows] / temperature)[:, None])
        grad_hidden[rows] = head.combine(grad_logits)
        grad_weight += grad_logits.T @ hidden[rows].to(grad_logits.dtype)
    return grad_hidden, grad_weight.to(weight.dtype)


def _torch_chunk_rows(weight: Tensor) -> int:
    elements = TORCH_CHUNK_ELEMENTS.get(weight.device.type, TORCH_CHUNK_ELEMENTS["cpu"])
    return max(SMALLEST_TORCH_CHUNK, elements // len(weight))


def _chunks(M: int, chunk_rows: int) -> list[slice]:
    """Slices that cover M rows; none for M = 0."""
    return [slice(start, min(start + chunk_rows, M)) for start in range(0, M, chunk_rows)]


class _Head:
    """The weight [V, D] and its two products, accumulated in float32.

    16-bit operands are multiplied as they are where a float32 result is to be had (CUDA), else in float32.
    """

    def __init__(self, weight: Tensor):
        self.dtype = weight.dtype
        self.multiplies_16_bit = weight.device.type == "cuda" and weight.dtype in (torch.float16, torch.bfloat16)
        self.matrix = weight if self.multiplies_16_bit else weight.to(_value_dtype(weight))
        self.scale = FLOAT16_SCALE if weight.dtype == torch.float16 else 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [C, D] -> [C, V]"""
        if self.multiplies_16_bit:
            return torch.mm(hidden, self.matrix.T, out_dtype=torch.float32)
        return hidden.to(self.matrix.dtype) @ self.matrix.T

    def combine(self, coefficients: Tensor) -> Tensor:
        """coefficients [C, V] -> their combinations of the rows of the head [C, D]"""
        return self.combine_scaled(
            (coefficients * self.scale).to(self.dtype) if self.multiplies_16_bit else coefficients
        )

    def combine_scaled(self, coefficients: Tensor) -> Tensor:
        """As `combine`, of coefficients already multiplied by `scale` and rounded where the product needs that."""
        if self.multiplies_16_bit:
            product = torch.mm(coefficients, self.matrix, out_dtype=torch.float32)
            return product / self.scale if self.scale != 1 else product
        return coefficients.to(self.matrix.dtype) @ self.matrix


class _Rows:
    """Softmax statistics of a chunk of rows, in the notation of the file's first lines. Overwrites `logits` [C, V]."""

    def __init__(self, logits: Tensor, targets: Tensor, temperature: float, softcap: float):
        self.target = targets[:, None]
        self.slope = None  # s' [C, V], None where it is 1
        if softcap > 0:
            logits.div_(softcap).tanh_()
            self.slope = 1 - logits * logits
            logits.mul_(softcap)
        if temperature != 1:
            logits.div_(temperature)
        logits.sub_(logits.amax(1, keepdim=True))
        self.shifted = logits  # z - r
        self.exponentials = logits.exp()  # exp(z - r), 0 at the target
        shifted_target = self.shifted.gather(1, self.target)
        self.target_exponential = shifted_target.exp()  # a
        self.exponentials.scatter_(1, self.target, 0.0)
        self.rest = self.exponentials.sum(1, keepdim=True)  # R
        self.total = self.target_exponential + self.rest  # Z
        self.log_total = self.total.log()
        weighted = (self.exponentials * self.shifted).sum(1, keepdim=True) + self.target_exponential * shifted_target
        self.logprob = (shifted_target - self.log_total).squeeze(1)
        self.entropy = (self.log_total - weighted / self.total).squeeze(1)

    def unit_coefficients(self) -> Tensor:
        """(1[v = y] - p_v) s'_v, [C, V]"""
        coefficients = self.exponentials / -self.total
        coefficients.scatter_(1, self.target, self.rest / self.total)
        return coefficients if self.slope is None else coefficients.mul_(self.slope)

    def entropy_coefficients(self) -> Tensor:
        """-p_v (log p_v + entropy) s'_v, [C, V]"""
        probabilities = self.exponentials / self.total
        probabilities.scatter_(1, self.target, self.target_exponential / self.total)
        coefficients = probabilities.mul_(self.log_total - self.entropy[:, None] - self.shifted)
        return coefficients if self.slope is None else coefficients.mul_(self.slope)


# The "rows" route.


def _rows_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, softcap: float, form: str, chunk_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = _allocate(hidden, form)
    logprobs, entropy, unit, unit_scale, unit_entropy = outputs
    unit_scale.fill_(1.0)
    V = len(weight)
    head = _Head(weight)
    # Whole 16 bytes to a row, as the tensor cores want them.
    padded = _round_up(V, 8)
    chunk_rows = chunk_rows or max(64, ROUTE_CHUNK_BYTES // (V * (4 + 2 * weight.element_size())))
    coefficients = weight.new_empty(len(unit[:chunk_rows]), padded)
    entropy_coefficients = weight.new_empty(len(unit_entropy[:chunk_rows]), padded)
    for rows in _chunks(len(hidden), chunk_rows):
        logits = head.logits(hidden[rows])
        C = len(logits)
        _rows_kernel[(C,)](
            logits, coefficients, entropy_coefficients, targets[rows], logprobs[rows], entropy[rows],
            V, padded, 1.0 / temperature, softcap, head.scale if head.multiplies_16_bit else 1.0,
            LIMIT=LIMIT, SOFTCAP=softcap > 0, UNIT=len(unit) > 0, ENTROPY=len(unit_entropy) > 0,
            BLOCK=min(8192, next_power_of_2(V)), num_warps=16,
        )  # fmt: skip
        if len(unit) > 0:
            unit[rows] = head.combine_scaled(coefficients[:C, :V])
        if len(unit_entropy) > 0:
            unit_entropy[rows] = head.combine_scaled(entropy_coefficients[:C, :V])
    return outputs


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@triton.jit
def _tanh(x):
    # exp of a negative number cannot overflow.
    decay = tl.exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def _scaled_logit(x, inverse_temperature, softcap, SOFTCAP: tl.constexpr):
    """z and s' of raw logits x."""
    slope = tl.full(x.shape, 1.0, tl.float32)
    if SOFTCAP:
        bent = _tanh(x / softcap)
        slope = 1.0 - bent * bent
        x = softcap * bent
    return x * inverse_temperature, slope


@triton.jit
def _row_sums(
    logits, target, reference, V, inverse_temperature, softcap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One pass over a row: R, the sum of exp(z - r) (z - r), and the largest z - r, all without the target."""
    rest = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        others = (columns < V) & (columns != target)
        x = tl.load(logits + columns, mask=columns < V, other=0.0)
        z, _ = _scaled_logit(x, inverse_temperature, softcap, SOFTCAP)
        shifted = tl.where(others, z - reference, -float("inf"))
        exponential = tl.exp(shifted)
        rest += exponential
        weighted += exponential * tl.where(others, shifted, 0.0)
        largest = tl.maximum(largest, shifted)
    return tl.sum(rest, 0), tl.sum(weighted, 0), tl.max(largest, 0)


@triton.jit
def _rows_kernel(
    logits, coefficients, entropy_coefficients, targets, logprobs, entropy,
    V, padded, inverse_temperature, softcap, scale,
    LIMIT: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of float32 logits [C, V]: its values, and its coefficients of the rows of the head."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * V
    coefficients += row.to(tl.int64) * padded
    entropy_coefficients += row.to(tl.int64) * padded
    target = tl.load(targets + row)
    target_logit, _ = _scaled_logit(tl.load(logits + target), inverse_temperature, softcap, SOFTCAP)

    reference = target_logit
    rest, weighted, largest = _row_sums(logits, target, reference, V, inverse_temperature, softcap, SOFTCAP, BLOCK)
    if largest > LIMIT:
        reference = reference + largest
        rest, weighted, largest = _row_sums(logits, target, reference, V, inverse_temperature, softcap, SOFTCAP, BLOCK)

    target_shifted = target_logit - reference
    target_exponential = tl.exp(target_shifted)
    total = target_exponential + rest
    log_total = tl.log(total)
    row_entropy = log_total - (weighted + target_exponential * target_shifted) / total
    tl.store(logprobs + row, target_shifted - log_total)
    tl.store(entropy + row, row_entropy)

    if UNIT or ENTROPY:
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(logits + columns, mask=columns < V, other=0.0)
            z, slope = _scaled_logit(x, inverse_temperature, softcap, SOFTCAP)
            log_probability = z - reference - log_total
            probability = tl.exp(log_probability)
            scaled_slope = slope * scale
            if UNIT:
                coefficient = tl.where(columns == target, rest / total, -probability) * scaled_slope
                tl.store(coefficients + columns, coefficient.to(coefficients.dtype.element_ty), mask=columns < V)
            if ENTROPY:
                coefficient = -probability * (log_probability + row_entropy) * scaled_slope
                tl.store(
                    entropy_coefficients + columns,
                    coefficient.to(entropy_coefficients.dtype.element_ty),
                    mask=columns < V,
                )


# The "tiles" route. Its logits, references and sums are in bits, not nats: exp2 is the instruction, exp a product more.

LN_2 = tl.constexpr(math.log(2))


def _fits_tiles(hidden: Tensor, weight: Tensor, form: str) -> bool:
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


def _tiles_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, softcap: float, form: str, chunk_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = _allocate(hidden, form)
    logprobs, entropy, unit, unit_scale, _ = outputs
    if len(hidden) == 0:
        return outputs
    V = len(weight)
    chunk_rows = min(chunk_rows or _tiles_chunk_rows(weight, form), len(hidden))
    scaling = _Scaling(1.0 / (temperature * math.log(2)), softcap)
    target_logits = _target_logits(hidden, weight, targets, scaling)
    references = target_logits.clone()
    exponentials = weight.new_empty(min(chunk_rows, len(unit)), _round_up(V, 8))
    sums = references.new_empty(3, cdiv(V, TILE_COLUMNS), chunk_rows)
    for rows in _chunks(len(hidden), chunk_rows):
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
    z, _ = _scaled_logit(tl.sum(products, 0), inverse_temperature, softcap, SOFTCAP)
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
            z, slope = _scaled_logit(accumulator, inverse_temperature, softcap, SOFTCAP)
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
