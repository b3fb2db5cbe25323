"""Writes what docs/scaling.md says of sizes: which model fits which card, and what more cards cost by a model of it.

Knows nothing of any GPU. Plans are those of grpo/memory.py; what a run measures by trial is counted here from a model's
shape. Times begin at what benchmarks/scaling.py measured on two cards.

python scripts/write_scaling_table.py            rewrite what stands between the page's markers, and print it
python scripts/write_scaling_table.py --check    fail if that would change anything
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from grpo_kernels.logprob_head import ROUTE_CHUNK_BYTES  # noqa: E402
from shapes import SHAPES  # noqa: E402

from grpo.errors import UserError  # noqa: E402
from grpo.memory import CACHE_TO_SPARE, ENGINE_BYTES, GIB, Asked, Need, Plan, foresee  # noqa: E402
from grpo.memory_of_run import LOGIT_BYTES  # noqa: E402
from grpo.memory_trial import SMALL_HEAD, Sizes  # noqa: E402
from grpo.policy.fused import MLP_ROWS  # noqa: E402
from grpo.rollout.vllm_engine import MAX_BATCHED_TOKENS  # noqa: E402

PAGE = ROOT / "docs" / "scaling.md"
RESULTS = ROOT / "benchmarks" / "results"
MARKS = "<!-- {} begin: python scripts/write_scaling_table.py -->", "<!-- {} end -->"

# As torch reports them: of an RTX 4090, of an L40S with error correction, and of the H100 that we measured on.
CARDS = {"24 GB": 23.6, "48 GB": 44.4, "80 GB": 79.2}  # GiB
MODELS = {
    "1.5B": "qwen2.5-1.5b",
    "8B": "llama-3.1-8b",
    "14B": "qwen2.5-14b",
    "32B": "qwen2.5-32b",
    "70B": "llama-3.1-70b",
}
BASES = ("nf4", "bf16")
RANK, PROMPTS, GROUP, PROMPT, COMPLETION = 32, 8, 8, 256, 512
MOST, GRAIN = 131072, 256  # tokens of a completion that are looked at

OTHERS = int(0.8 * GIB)  # CUDA itself, on the H100
BLOCK = 64  # weights that share a scale
NESTED = 256  # scales that share another, where they are quantised too
# Hidden states' worth that a token takes beside what layers keep: while the head is at work what the last norm gives
# and the gradients of both, in the backward pass those of a layer's blocks. Of these two it was looked at what fits.
IN_THE_HEAD, IN_A_LAYER = 3, 4


# ---- a model's sizes, counted


@dataclass(frozen=True)
class Shape:
    """Of a decoder with gated MLPs."""

    hidden: int
    inner: int
    layers: int
    queries: int  # numbers a token
    keys: int
    vocabulary: int
    tied: bool

    @property
    def linears(self) -> list[tuple[int, list[int]]]:
        """(inputs, outputs of each part) of a layer's projections."""
        of_qkv = [self.queries, self.keys, self.keys]
        up, down = [self.inner, self.inner], [self.hidden]
        return [(self.hidden, of_qkv), (self.queries, [self.hidden]), (self.hidden, up), (self.inner, down)]

    @property
    def weights(self) -> int:
        """Numbers in the linears of all layers."""
        return self.layers * sum(inputs * sum(outputs) for inputs, outputs in self.linears)

    @property
    def trained(self) -> int:
        """Numbers of an adapter on all of them."""
        sides = sum(len(outputs) * inputs + sum(outputs) for inputs, outputs in self.linears)
        return RANK * self.layers * sides

    @property
    def tables(self) -> int:
        """Numbers of embedding and head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def kept(self) -> int:
        """Bytes that a layer keeps of a token for its backward pass, its input aside, in 16 bits: what both norms give,
        what the second reads; queries, keys and values as they come, queries and keys rotated, what attention gives;
        gate and up; and x A^T of every part."""
        as_they_come, rotated = self.queries + 2 * self.keys, self.queries + self.keys
        attention = as_they_come + rotated + self.queries
        low_rank = RANK * sum(len(outputs) for _, outputs in self.linears)
        return 2 * (3 * self.hidden + attention + 2 * self.inner + low_rank)


def shape_of(name: str) -> Shape:
    given = SHAPES[name]
    head = given.get("head_dim") or given["hidden_size"] // given["num_attention_heads"]
    return Shape(
        hidden=given["hidden_size"],
        inner=given["intermediate_size"],
        layers=given["num_hidden_layers"],
        queries=given["num_attention_heads"] * head,
        keys=given["num_key_value_heads"] * head,
        vocabulary=given["vocab_size"],
        tied=given["tie_word_embeddings"],
    )


def sizes_of(shape: Shape, base: str, ranks: int = 1) -> Sizes:
    """What grpo/memory_trial.py would measure, about. ranks: that share the base (--shard-base)."""
    scales = shape.weights // BLOCK
    of_weights = shape.weights // 2 + 4 * scales if base == "nf4" else 2 * shape.weights
    if ranks > 1:  # and two layers in the buffers
        of_weights = of_weights // ranks + 2 * of_weights // shape.layers
    # Where no engine is in the process, an embedding that is not the head too is in the host's memory.
    tables = shape.tables if ranks == 1 or shape.tied else shape.tables // 2
    inputs = 2 * shape.hidden * shape.layers
    unpacked = [2 * inputs_of * sum(outputs) if base == "nf4" else 0 for inputs_of, outputs in shape.linears]
    return Sizes(
        others=OTHERS,
        weights=of_weights + 2 * tables,
        adapter=(4 + 2) * shape.trained,
        parameters=shape.trained,
        layers=shape.layers,
        weights_per_layer=shape.weights / shape.layers,
        # Of the MLP, that of a part of the rows, with the gradient of what its products give, and both its bases.
        fixed=sum(unpacked[2:]) + 2 * MLP_ROWS * (3 * shape.inner + shape.hidden),
        recomputing=inputs + shape.kept - 2 * 2 * shape.inner + IN_A_LAYER * 2 * shape.hidden,
        kept_fixed=max(unpacked),
        one_kept=inputs + shape.kept + IN_A_LAYER * 2 * shape.hidden,
        keeping=shape.kept,
        layer_input=2 * shape.hidden,
        remembered=2 * shape.queries,
        reading_fixed=max(unpacked),
        reading=2 * (3 * shape.inner + 2 * shape.hidden),
        head_fixed=ROUTE_CHUNK_BYTES,
        head=inputs + IN_THE_HEAD * 2 * shape.hidden,
        small_head=SMALL_HEAD * 8 * shape.vocabulary,  # float32, and 16 bits twice; less on a Hopper
        spared=3 * scales - 8 * (scales // NESTED) if base == "nf4" and ranks == 1 else 0,
        shared_by=ranks,
    )


@dataclass(frozen=True)
class Step:
    """What a card does in one."""

    completion: int = COMPLETION  # tokens, at most
    prompt: int = PROMPT
    prompts: int = PROMPTS


def plan_of(
    shape: Shape, base: str, gib: float, step: Step, at_least: bool = False, ranks: int = 1, beside: float = 0.0
) -> Plan:
    """Of a step on a card of so much memory; at_least: the plan that takes least; ranks: that share the base, whose
    completions servers write; beside: GiB of the card that these have.

    Raises:
        UserError: it does not fit.
    """
    longest = step.prompt + step.completion
    need = Need(
        longest=longest,
        longest_completion=step.completion,
        tokens_per_step=step.prompts * (longest + (GROUP - 1) * step.completion),
        sequences=step.prompts * GROUP,
        kv_bytes_per_token=2 * 2 * shape.keys * shape.layers if ranks == 1 else 0,
        bytes_per_parameter=8,
        gives_cache_back=(False, True) if ranks == 1 else (True,),
        engine_bytes=ENGINE_BYTES if ranks == 1 else 0,
        read_at_once=MAX_BATCHED_TOKENS if ranks == 1 else 0,
        logits=LOGIT_BYTES * shape.vocabulary,
    )
    one = (longest + CACHE_TO_SPARE) * need.kv_bytes_per_token
    asked = Asked("offload", longest, one) if at_least else Asked("auto", 0, 0)
    sizes = sizes_of(shape, base, ranks)
    sizes = replace(sizes, others=sizes.others + int(beside * GIB))
    return foresee(sizes, need, int(gib * GIB), asked)


def fits(shape: str, base: str, gib: float, step: Step, ranks: int = 1) -> bool:
    try:
        plan_of(shape_of(shape), base, gib, step, at_least=True, ranks=ranks)
    except UserError:
        return False
    return True


# ---- what fits where


def what_fits() -> str:
    """A line a model and base, a column a card."""
    header = f"| model | base | its weights, GiB | {' | '.join(f'{card} card' for card in CARDS)} |"
    lines = [header, "|---|---|---:|" + "---:|" * len(CARDS)]
    for name, shape in MODELS.items():
        for base in BASES:
            weights = sizes_of(shape_of(shape), base).weights / GIB
            cells = [cell(shape, base, gib) for gib in CARDS.values()]
            lines.append(f"| {name} | {base} | {weights:.1f} | {' | '.join(cells)} |")
    cards = ", ".join(f"{gib:g}" for gib in CARDS.values())
    nested = " *: with the base's scales in 8 bits too." * any("*" in line for line in lines)
    return "\n".join(lines) + (
        f"\n\nThe longest completions, in tokens, that there is room for behind prompts of {PROMPT}; a dash: not even "
        f"{GRAIN}. In brackets what a card of {PROMPTS} prompts x {GROUP} completions of {COMPLETION} tokens a step "
        "has less of than it would like, which takes longer: sequences that are written at once, of "
        f"{PROMPTS * GROUP}; layers that keep their activations.{nested} LoRA of rank "
        f"{RANK}, vLLM in the process; {cards} GiB to be had."
    )


@cache
def longest(shape: str, base: str, gib: float, ranks: int = 1) -> int:
    """Tokens of the longest completion that fits; 0: none."""
    low, high = 0, MOST // GRAIN
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(shape, base, gib, Step(middle * GRAIN), ranks) else (low, middle - 1)
    return low * GRAIN


def cell(shape: str, base: str, gib: float, ranks: int = 1) -> str:
    most = longest(shape, base, gib, ranks)
    if not most:
        return "–"
    rounded = most if most < 10 * GRAIN else most // 1024 * 1024
    usual = plan_of(shape_of(shape), base, gib, Step(min(most, COMPLETION)), ranks=ranks)
    at_once = int(usual.kv_cache / max(1, usual.need.kv_bytes_per_token * usual.need.longest))
    less = [f"{at_once} at once"] * (ranks == 1 and at_once < PROMPTS * GROUP)
    less += [f"{usual.kept} of {usual.sizes.layers} layers"] * (usual.kept < usual.sizes.layers - 1)
    told = f"{rounded:,}" + " or more" * (most == MOST) + "*" * usual.sizes.double_quantised
    return told + f" ({', '.join(less)})" * bool(less)


# ---- a base larger than a card


SHARED = {"32B": (2, 4), "70B": (2, 4, 8)}  # models and numbers of cards
OF_SERVERS = 0.48  # of each card, where they are on the same cards


def what_parts_fit() -> str:
    """A line a model, base and number of cards that share it; then two plans of the largest on two cards."""
    header = f"| model | base | cards | weights of a card, GiB | {' | '.join(f'{card} cards' for card in CARDS)} |"
    lines = [header, "|---|---|---:|---:|" + "---:|" * len(CARDS)]
    for name, counts in SHARED.items():
        for base in BASES:
            for count in counts:
                weights = sizes_of(shape_of(MODELS[name]), base, count).weights / GIB
                cells = [cell(MODELS[name], base, gib, count) for gib in CARDS.values()]
                lines.append(f"| {name} | {base} | {count} | {weights:.1f} | {' | '.join(cells)} |")
    largest, gib = shape_of(MODELS["70B"]), CARDS["80 GB"]
    alone, shared = (plan_of(largest, "nf4", gib, Step(), ranks=2, beside=each) for each in (0, OF_SERVERS * gib))
    moved = (sizes_of(largest, "nf4").weights - 2 * largest.tables) / GIB
    return "\n".join(lines) + (
        f"\n\nThe longest completions behind prompts of {PROMPT}, {PROMPTS} prompts x {GROUP} completions a card and "
        f"step, with LoRA of rank {RANK}, where servers on other cards write them, or SFT. A part of the layers' base, "
        "two layers in the buffers, and all of embedding, head and adapter are on each card. Two 80 GB cards of a 70B "
        f"in NF4, completions of {COMPLETION} tokens:\n\n```text\n{alone.table()}\n```\n\n"
        f"and where servers have {OF_SERVERS:.0%} of each card:\n\n```text\n{shared.table()}\n```\n\n"
        f"A batch, forward and backward, brings {moved:.1f} GiB x 2 x (1 - 1 / cards) to each card, most of it while "
        "layers are computed."
    )


# ---- what the counted sizes are worth


UPDATE = re.compile(r"update, batches of ([\d,]+) tokens, layers: (.*) \(--recompute\) +([\d.]+)")
ROW = re.compile(r"^  (.+?)  +([\d.]+)", re.M)
STANDING = ("base", "adapter", "optimizer", "engine", "KV")  # how the rows begin of what is there during the update


def what_it_is_worth() -> str:
    """What updates took on a GPU, as runs planned it and as it was, and the same from counted sizes; and refusals."""
    lines = [
        "| run | update planned, GiB | as it was | counted | counted, of what it was |",
        "|---|---:|---:|---:|---:|",
    ]
    for case, row in measured():
        shape, plan = case.split("/")[0], "\n".join(row.get("plan", []))
        if found := UPDATE.search(plan):
            tokens, (kept, parked) = (
                int(found[1].replace(",", "")),
                (int((re.search(rf"(\d+) {what}", found[2]) or ["", "0"])[1]) for what in ("kept", "recomputed from")),
            )
            beside = sum(float(size) for name, size in ROW.findall(plan) if name.startswith(STANDING))
            was = row["allocated_peak_gib"] - beside
            counted = sizes_of(shape_of(shape), row["ran"]["base"]).update(tokens, kept, parked) / GIB
            told = f"{100 * (counted / was - 1):+.0f}%"
            lines.append(f"| {case} | {found[3]} | {was:.1f} | {counted:.1f} | {told} |")
        elif "does not fit" in row.get("failed", ""):
            step = Step(row["completion_tokens"], row["prompt_tokens"], row["prompts"])
            told = "fits" if fits(shape, "nf4", row["limit_gib"], step) else "refused"
            lines.append(f"| {case} in {row['limit_gib']} GiB | refused | | {told} | |")
    return "\n".join(lines)


def measured() -> list[tuple[str, dict[str, Any]]]:
    """Cases of dense models, ours."""
    files = ("step-nvidia-h100-80gb-hbm3.json", "memory-nvidia-h100-80gb-hbm3.json")
    cases = [case for file in files for case in json.loads((RESULTS / file).read_text())["cases"].items()]
    own = [(name, row) for name, row in cases if "ran" not in row or row["ran"].get("engine") == "VllmEngine"]
    return [(name, row) for name, row in own if name.split("/")[0] in MODELS.values()]


# ---- what more cards cost


A_HOST = 8  # cards
NETWORKS = {"8 x 400 Gb/s": 400.0, "100 Gb/s": 12.5, "10 Gb/s": 1.25}  # of a host, GB/s
OF_A_TOKEN = 20  # bytes: its number and its log-probability, 8 each, and some 4 of text
COUNTS = (1, 2, 4, 8, 16, 32, 64)


def what_more_cards_cost() -> str:
    """Weak scaling of an 8B: measured on two cards, by the model on more."""
    ranks = json.loads((RESULTS / "scaling-nvidia-h100-80gb-hbm3.json").read_text())["ranks"]
    two = ranks["2"]
    size, step = two["gradient_bytes"], two["step_s"]
    inside = size / two["all_reduce_s"] / 1e9  # GB/s, the factor of two ranks being 1
    own = PROMPTS * GROUP * COMPLETION * OF_A_TOKEN  # bytes of a rank's completions
    lines = [
        f"| cards | completions a step | {' | '.join(f'hosts joined by {name}' for name in NETWORKS)} |",
        "|---:|---:|" + "---:|" * len(NETWORKS),
    ]
    for count in COUNTS:
        costs = [cost(count, size, own, inside, network) for network in NETWORKS.values()]
        cells = [f"{1000 * each:.0f} ms, {100 * each / (step + each):.1f}%" for each in costs]
        if count <= A_HOST:
            cells = [f"in one host: {cells[0]}", *[""] * (len(cells) - 1)]
        lines.append(f"| {count} | {PROMPTS * GROUP * count:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + (
        f"\n\nWhat a step of {step:.2f} s is longer by, and their share of it, for an adapter of "
        f"{size / 1e6:.0f} MB. Of the sum 2 (n - 1) / n of these bytes pass every card (Patarasuk and Yuan 2009, what "
        "nccl-tests calls bus bandwidth), at the rate measured between two cards of a host, "
        f"{inside:.0f} GB/s with all that belongs to the sum, or at that of the wire between the hosts of {A_HOST} "
        f"where that is less. The completions, {own / 1e6:.2f} MB of each card, pass every wire but one's own once."
    )


def cost(cards: int, gradients: float, completions: float, inside: float, network: float) -> float:
    """Seconds of a step that one card would not take."""
    if cards == 1:
        return 0.0
    between = network if cards > A_HOST else float("inf")
    summed = 2 * (cards - 1) / cards * gradients / min(inside, between) / 1e9
    return summed + (cards - 1) * completions / between / 1e9


# ---- the page


PARTS = {"fits": what_fits, "parts": what_parts_fit, "worth": what_it_is_worth, "cards": what_more_cards_cost}


def main() -> None:
    old = text = PAGE.read_text()
    for name, tell in PARTS.items():
        begin, end = (mark.format(name) for mark in MARKS)
        before, rest = text.split(begin)
        told = tell()
        text = f"{before}{begin}\n\n{told}\n\n{end}{rest.split(end)[1]}"
        if "--check" not in sys.argv[1:]:
            print(told, end="\n\n")
    if "--check" in sys.argv[1:]:
        sys.exit(
            f"{PAGE} is older than what is counted; run python scripts/{Path(__file__).name}" if old != text else 0
        )
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
