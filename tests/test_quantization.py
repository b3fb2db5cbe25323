"""Which projections of an NF4 base stay in 16 bits: measured as transformers and bitsandbytes have it, chosen within
the allowance, nearer to the model than chance, and the same when a run is resumed."""

import json
import random
from functools import partial
from statistics import mean

import bitsandbytes.functional as bnb
import pytest
import torch
import transformers
from bnb_reference import dequantize_4bit
from grpo_kernels.nf4 import NF4
from tiny_models import CPU, VOCABULARY
from toy_task import SMALL, TASK

from grpo.build import build_policy
from grpo.config import Config
from grpo.embedded import MODEL_DIR, word_problems
from grpo.errors import UserError
from grpo.export.source import find
from grpo.folder import saved_run
from grpo.policy import load_model, load_tokenizer
from grpo.policy.form import LINEARS
from grpo.policy.quantization import best_within, spread
from grpo.run import main


def random_prompts(count=3):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (9 + i,), generator=generator).tolist() for i in range(count)]


def dynamic(model, prompts=(), dense=None, note=print, **fields):
    fields = dict(quantization="dynamic", dynamic_allowance=0.5, lora_rank=2) | fields
    config = Config(model=str(model), base="nf4", device="cpu", **fields)
    return load_model(config, CPU, 512, note=note, prompts=prompts, dense=dense)


class Rounded:
    """A model of transformers in float32, any projection of which can be in NF4, as bitsandbytes rounds it, or bf16."""

    def __init__(self, folder, prompts):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.prompts = [torch.tensor([tokens]) for tokens in prompts]
        self.linears = {
            f"{index}.{name}": [layer.get_submodule(part) for part in parts]
            for index, layer in enumerate(self.model.model.layers)
            for name, (parts, *_) in LINEARS.items()
        }
        self.weights = {name: [linear.weight.data for linear in found] for name, found in self.linears.items()}
        self.exact = self.logprobs()

    @torch.no_grad()
    def logprobs(self):
        logits = [self.model(input_ids=tokens, use_cache=False).logits[0].double() for tokens in self.prompts]
        return torch.cat(logits).log_softmax(-1)

    def divergence(self, dense):
        """Mean KL from the model without rounding where these projections are in bf16 and the others in NF4."""
        for name, linears in self.linears.items():
            for linear, weight in zip(linears, self.weights[name], strict=True):
                quantised = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64)
                linear.weight.data = weight.bfloat16().float() if name in dense else dequantize_4bit(*quantised)
        found = self.logprobs()
        return float((self.exact.exp() * (self.exact - found)).sum(-1).mean())

    def bytes_more(self, name):
        """In bf16 than in NF4 with a scale in float32 for 64 values."""
        return sum(weight.numel() * 2 - weight.numel() // 2 - weight.numel() // 16 for weight in self.weights[name])


@pytest.mark.parametrize("name", ["llama", "qwen3", "granite", "cohere2"])
def test_what_is_measured_and_what_is_kept(name, checkpoint):
    prompts, notes = random_prompts(), []
    loaded = dynamic(checkpoint(name), prompts, note=notes.append)
    kept = loaded.store.dense
    reference = Rounded(checkpoint(name), prompts)
    gains = {each: reference.divergence([]) - reference.divergence([each]) for each in reference.linears}
    allowed = 0.5 * sum(
        projection.base.nbytes for projection in dynamic(checkpoint(name), dense=[]).store.projections.values()
    )
    costs = {each: reference.bytes_more(each) for each in gains}
    expected = best_within(gains, costs, int(allowed))
    assert 0 < len(expected) < len(gains) and set(kept) == set(expected)
    before, after = reference.divergence([]), reference.divergence(kept)
    assert after < before
    [note] = [note for note in notes if "in 16 bits" in note]
    assert f"keeps {', '.join(expected)} in 16 bits" in note
    assert f"is {after:.2g} nats instead of {before:.2g}" in note
    for each, projection in loaded.store.projections.items():
        if each in kept:
            assert torch.equal(projection.base, torch.cat(reference.weights[each]).bfloat16())
        else:
            assert isinstance(projection.base, NF4)


def test_what_was_chosen_before_is_built_again_bit_for_bit(checkpoint):
    first = dynamic(checkpoint("llama"), random_prompts())
    again = dynamic(checkpoint("llama"), dense=first.store.dense)
    uniform = dynamic(checkpoint("llama"), dense=[])
    assert first.store.dense == again.store.dense != []
    for (name, one), two, other in zip(
        first.store.projections.items(),
        again.store.projections.values(),
        uniform.store.projections.values(),
        strict=True,
    ):
        assert torch.equal(one.lora_a, two.lora_a) and torch.equal(one.lora_a, other.lora_a)
        if name in first.store.dense:
            assert torch.equal(one.base, two.base)
        else:
            assert torch.equal(one.base.packed, two.base.packed) and torch.equal(one.base.packed, other.base.packed)
            assert torch.equal(one.base.absmax, two.base.absmax)
        assert (one.bias is None) == (two.bias is None) and (one.bias is None or torch.equal(one.bias, two.bias))


def test_nothing_is_kept_where_nothing_is_allowed(checkpoint):
    notes = []
    assert dynamic(checkpoint("llama"), random_prompts(), note=notes.append, dynamic_allowance=0.0).store.dense == []
    assert any("keeps nothing in 16 bits" in note for note in notes)


def test_the_best_for_their_bytes_are_taken_while_they_fit():
    gains = {"large": 9.0, "small": 2.0, "worse": 1.0, "harmful": -1.0, "same": 2.0}
    costs = {"large": 30, "small": 5, "worse": 10, "harmful": 1, "same": 5}
    assert best_within(gains, costs, 45) == ["small", "same", "large"]
    assert best_within(gains, costs, 29) == ["small", "same", "worse"]
    assert best_within(gains, costs, 4) == []


def test_rows_are_spread_over_all_tokens():
    assert spread(5, 9).tolist() == [0, 1, 2, 3, 4]
    assert spread(10, 4).tolist() == [0, 3, 6, 9]
    assert len(spread(1000, 1)) == 1


def test_it_is_nearer_to_the_model_than_chance_is():
    """On the embedded model, at equal memory, on problems that it was not chosen on."""
    tokenizer = load_tokenizer("embedded")

    def texts(split, count):
        rows = word_problems(split, count)
        return [tokenizer(f"{row['question']}\n{row['answer']}", add_special_tokens=False)["input_ids"] for row in rows]

    reference = Rounded(MODEL_DIR, texts("test", 4))
    kept = dynamic("embedded", texts("train", 16), note=lambda told: None).store.dense
    costs = {name: reference.bytes_more(name) for name in reference.linears}
    allowed = 0.5 * sum(weight.numel() for found in reference.weights.values() for weight in found) * (1 / 2 + 1 / 16)
    by_chance = []
    for seed in range(8):
        order = random.Random(seed).sample(list(costs), len(costs))
        worth = {name: costs[name] / (1 + index) for index, name in enumerate(order)}
        by_chance.append(best_within(worth, costs, int(allowed)))
    assert reference.divergence(kept) < 0.75 * mean(map(reference.divergence, by_chance))


@pytest.mark.slow
def test_a_resumed_run_keeps_what_was_chosen(tmp_path, capsys):
    (tmp_path / "toy.py").write_text(TASK.format(rewards="{letters: 1.0, says: 1.0}", extra=""))
    run = tmp_path / "run"
    flags = [*SMALL, "--base", "nf4", "--quantization", "dynamic", "--dynamic-allowance", "0.3"]
    flags += ["--steps", "2", "--save-every", "1", "--eval-prompts", "1", "--run-dir", str(run)]
    assert main([str(tmp_path / "toy.py"), *flags]) == 0
    assert "--quantization dynamic keeps" in capsys.readouterr().out
    first, second = sorted(run.glob("checkpoints/step-*"))
    assert json.loads((first / "state.json").read_text())["progress"]["dense"]
    uninterrupted = (second / "adapter_model.safetensors").read_bytes()
    assert main(["--resume", str(first)]) == 0
    assert (second / "adapter_model.safetensors").read_bytes() == uninterrupted
    assert main(["--eval", str(run)]) == 0
    told = capsys.readouterr().out
    assert "--quantization dynamic keeps" not in told and told.count("as --quantization dynamic chose before") == 2


@pytest.mark.slow
def test_a_run_goes_on_over_the_scales_that_it_began_with(tmp_path):
    """Whatever config.json leaves to the plan: another card might choose otherwise. What is exported has them too."""
    (tmp_path / "toy.py").write_text(TASK.format(rewards="{letters: 1.0, says: 1.0}", extra=""))
    run = tmp_path / "run"
    flags = [*SMALL, "--base", "nf4", "--double-quant", "on", "--steps", "2", "--save-every", "1"]
    assert main([str(tmp_path / "toy.py"), *flags, "--eval-prompts", "1", "--run-dir", str(run)]) == 0
    first, second = sorted(run.glob("checkpoints/step-*"))
    uninterrupted = (second / "adapter_model.safetensors").read_bytes()
    told = (run / "config.json").read_text()
    assert '"double_quant": "on"' in told
    (run / "config.json").write_text(told.replace('"double_quant": "on"', '"double_quant": "auto"'))
    policy = build_policy(saved_run(str(run)).config, None, 64, checkpoint=first)
    assert policy.store.spared_by_double_quant == 0
    assert find(str(run), "best", None).config.double_quant == "on"
    assert main(["--resume", str(first)]) == 0
    assert (second / "adapter_model.safetensors").read_bytes() == uninterrupted


def test_what_it_cannot_be_used_for(checkpoint):
    with pytest.raises(UserError, match="quantization dynamic is of a base in NF4, and base is bf16"):
        Config(base="bf16", quantization="dynamic")
    with pytest.raises(
        UserError, match=r"layers are recognised .*; .* is a GPT2LMHeadModel\. Use --quantization uniform"
    ):
        dynamic(checkpoint("gpt2"), random_prompts())
    with pytest.raises(UserError, match=r"kept 7\.down in 16 bits, which .* does not have"):
        dynamic(checkpoint("llama"), dense=["0.o", "7.down"])


def test_a_checkpoint_in_4_bits_has_nothing_to_keep(checkpoint, tmp_path):
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    read = partial(transformers.AutoModelForCausalLM.from_pretrained, checkpoint("llama"), dtype=torch.float32)
    read(quantization_config=settings, device_map="cpu").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is in NF4 already, so nothing of it can stay in 16 bits"):
        dynamic(tmp_path, random_prompts())
