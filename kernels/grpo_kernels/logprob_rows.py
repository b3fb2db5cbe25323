"""The "rows" route of `linear_logprob`: cuBLAS writes float32 logits, one program a row turns them into coefficients.
Axes and notation are those of logprob.py.
"""

from torch import Tensor

from grpo_kernels.dispatch import next_power_of_2, tl, triton
from grpo_kernels.logprob_head import LIMIT, ROUTE_CHUNK_BYTES, Head, allocate, chunks_of, round_up, scaled_logit


def rows_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, softcap: float, form: str, chunk_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = allocate(hidden, form)
    logprobs, entropy, unit, unit_scale, unit_entropy = outputs
    unit_scale.fill_(1.0)
    V = len(weight)
    head = Head(weight)
    # Whole 16 bytes to a row, as the tensor cores want them.
    padded = round_up(V, 8)
    chunk_rows = chunk_rows or max(64, ROUTE_CHUNK_BYTES // (V * (4 + 2 * weight.element_size())))
    coefficients = weight.new_empty(len(unit[:chunk_rows]), padded)
    entropy_coefficients = weight.new_empty(len(unit_entropy[:chunk_rows]), padded)
    for rows in chunks_of(len(hidden), chunk_rows):
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
        z, _ = scaled_logit(x, inverse_temperature, softcap, SOFTCAP)
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
    target_logit, _ = scaled_logit(tl.load(logits + target), inverse_temperature, softcap, SOFTCAP)

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
            z, slope = scaled_logit(x, inverse_temperature, softcap, SOFTCAP)
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
