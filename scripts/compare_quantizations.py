"""How far a model in NF4 is from itself unrounded, where some projections stay in 16 bits: those that --quantization
dynamic chooses on 16 training prompts, and as many bytes of them at random.

    python scripts/compare_quantizations.py [--model FOLDER] [--allowances 0.1 0.2 0.5] [--draws 40]

Mean KL of the next token on held-out word problems with their answers, in float32; shares are of that with all in NF4.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import torch
from grpo_kernels.nf4 import nf4_dequantize
from torch import Tensor
from transformers import AutoModelForCausalLM

from grpo.config import Config
from grpo.policy.form import LINEARS
from grpo.policy.load import load_model, load_tokenizer, model_source
from grpo.policy.projections import join_nf4
from grpo.policy.quantization import PROMPTS, best_within
from grpo.task import load_task

CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--allowances", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--draws", type=int, default=40, help="choices at random")
    arguments = parser.parse_args()
    model = Rounded(arguments.model, texts(arguments.model, "test", 48, with_gold=True))
    costs = {name: sum(2 * w.numel() - w.numel() * 9 // 16 for w in found) for name, found in model.weights.items()}
    in_nf4, nothing = sum(costs.values()) * 9 / 23, model.divergence([])
    print(f"{arguments.model}: {len(costs)} projections, all in NF4: {nothing:.2g} nats")
    for allowance in arguments.allowances:
        kept = chosen(arguments.model, allowance)
        by_chance = []
        for seed in range(arguments.draws):
            order = Random(seed).sample(list(costs), len(costs))
            worth = {name: costs[name] / (1 + index) for index, name in enumerate(order)}
            by_chance.append(model.divergence(best_within(worth, costs, int(allowance * in_nf4))) / nothing)
        print(
            f"allowance {allowance:.0%}: {model.divergence(kept) / nothing:.3f} with {', '.join(kept) or 'nothing'}; "
            f"at random {mean(by_chance):.3f} ({min(by_chance):.3f} to {max(by_chance):.3f})",
            flush=True,
        )


def texts(model: str, split: str, count: int, with_gold: bool = False) -> list[list[int]]:
    """Tokens of the GSM8K task's embedded prompts, with their gold answers or without."""
    task, tokenizer = load_task(Path(__file__).parents[1] / "tasks/gsm8k.py"), load_tokenizer(model)
    found = []
    for row in list(task.rows(split, "embedded"))[:count]:
        asked = tokenizer.apply_chat_template(task.prompt(row), add_generation_prompt=True, tokenize=False)
        told = str(task.gold).format(**row) if with_gold else ""
        found.append(tokenizer(asked + told, add_special_tokens=False)["input_ids"])
    return found


def chosen(model: str, allowance: float) -> list[str]:
    """What a run would choose."""
    fields: Any = {"quantization": "dynamic", "dynamic_allowance": allowance, "lora_rank": 1, "device": "cpu"}
    config = Config(model=model, base="nf4", **fields)
    return load_model(config, CPU, 1024, prompts=texts(model, "train", PROMPTS)).store.dense


class Rounded:
    """transformers' model in float32, any projection of which can be in NF4 or in bf16."""

    def __init__(self, model: str, prompts: list[list[int]]):
        self.model: Any = AutoModelForCausalLM.from_pretrained(model_source(model), dtype=torch.float32).eval()
        self.prompts = [torch.tensor([tokens]) for tokens in prompts]
        self.linears = {
            f"{index}.{name}": [layer.get_submodule(part) for part in parts]
            for index, layer in enumerate(self.model.model.layers)
            for name, (parts, *_) in LINEARS.items()
        }
        self.weights = {name: [linear.weight.data for linear in found] for name, found in self.linears.items()}
        self.exact = self.logprobs()

    @torch.no_grad()
    def logprobs(self) -> Tensor:
        logits = [self.model(input_ids=tokens, use_cache=False).logits[0] for tokens in self.prompts]
        return torch.cat(logits).log_softmax(-1)

    def divergence(self, dense: list[str]) -> float:
        for name, linears in self.linears.items():
            for linear, weight in zip(linears, self.weights[name], strict=True):
                rounded = (
                    weight.bfloat16().float() if name in dense else nf4_dequantize(join_nf4([weight]), torch.float32)
                )
                linear.weight.data = rounded
        return float((self.exact.exp() * (self.exact - self.logprobs())).sum(-1).mean())


if __name__ == "__main__":
    main()
