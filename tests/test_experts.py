"""Mixtures of experts against transformers + PEFT: outputs, every LoRA gradient, training steps, files; over weights in
NF4 and bf16; with adapters on the experts and without."""

from dataclasses import replace

import bitsandbytes.functional as bnb
import peft
import pytest
import torch
from bnb_reference import dequantize_4bit
from grpo_kernels.nf4 import NF4, nf4_dequantize
from test_policy import assert_same_gradient, five_steps_beside_peft, peft_model, reference_model, save_adapter
from tiny_models import CPU, MIXTURES, build_policy, one_batch, randomise, reference_logprobs

from grpo.doctor.choice import bytes_of_adapter, look_at_model
from grpo.errors import UserError
from grpo.memory_trial import _adapter_bytes, _base_weights, _met
from grpo.policy.adapter import describe, factors_in, load_adapter
from grpo.policy.experts import Experts
from grpo.policy.peft_names import modules_of

FIRST = ("qwen3-moe", "deepseek-v2", "gpt-oss")


def by_name(*first):
    """All of them; but for the first ones a second stage."""
    return [pytest.param(name, marks=[] if name in first else [pytest.mark.slow]) for name in MIXTURES]


def experts_of(model):
    """Name -> experts, in the policy's model."""
    return {name.removeprefix("model."): m for name, m in model.named_modules() if isinstance(m, Experts)}


def gradients_of(theirs):
    """PEFT's gradients by the names of its tensors."""
    return {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
        if "lora_" in name
    }


def round_weights(model, policy):
    """Give transformers' linears and experts the weights that the policy's bases hold."""
    for projection in policy.store.projections.values():
        dense = dequantised(projection.base)
        model.get_submodule(projection.names[0]).weight.data = dense
    for name, experts in experts_of(policy.model).items():
        theirs = model.get_submodule(name)
        for weights in experts.maps():
            parameter = getattr(theirs, weights.name.rpartition(".")[2])
            dense = dequantised(weights.base).unflatten(0, (weights.num_experts, -1))
            parameter.data = (dense.mT if theirs.is_transposed else dense).contiguous()


def dequantised(base):
    return nf4_dequantize(base, torch.float32) if isinstance(base, NF4) else base.float().clone()


@pytest.mark.parametrize("adapted", [True, False], ids=["experts", "no_experts"])
@pytest.mark.parametrize("name", by_name(*FIRST))
def test_outputs_and_all_gradients_are_those_of_peft(name, adapted, tiny_config, groups, tmp_path):
    config = tiny_config(name, expert_adapters=adapted, temperature=0.7)
    policy = build_policy(config)
    randomise(policy, size=0.2)
    assert bool(policy.store.experts) == adapted
    theirs = peft_model(policy, reference_model(config), tmp_path)
    batch = one_batch(groups, config)
    logprobs = policy.logprobs(batch)[0][batch.mask]
    expected, _ = reference_logprobs(theirs, groups, 0.7)
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=1e-5)

    weights = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(2))
    (weights * logprobs).sum().backward()
    (weights * expected).sum().backward()
    gradients, modules = gradients_of(theirs), modules_of(policy.store.experts)
    compared = 0
    for each in policy.store.adapted():
        module = modules.get(each.names[0], each.names[0])
        assert_same_gradient(each.lora_a.grad, gradients.pop(f"{module}.lora_A"))
        assert_same_gradient(each.lora_b[0].grad, gradients.pop(f"{module}.lora_B"))
        compared += 1
    assert not gradients and compared >= 8


@pytest.mark.parametrize("name", by_name("qwen3-moe"))
def test_five_training_steps_are_those_of_peft(name, tiny_config, groups, tmp_path):
    five_steps_beside_peft(tiny_config(name, expert_adapters=True, max_grad_norm=0.5), groups, tmp_path)


@pytest.mark.parametrize(
    ("base", "double"), [("nf4", "auto"), pytest.param("nf4", "on", marks=pytest.mark.slow), ("bf16", "auto")]
)
@pytest.mark.parametrize("name", by_name(*FIRST))
def test_rounded_weights_are_the_rounded_models(name, base, double, tiny_config, groups, tmp_path):
    config = tiny_config(name, base=base, double_quant=double, expert_adapters=True)
    policy = build_policy(config)
    randomise(policy, size=0.2)
    held = [weights.base for experts in experts_of(policy.model).values() for weights in experts.maps()]
    assert held and all(isinstance(each, NF4) if base == "nf4" else each.dtype == torch.bfloat16 for each in held)
    rounded = reference_model(config)
    round_weights(rounded, policy)
    theirs = peft_model(policy, rounded, tmp_path)
    batch = one_batch(groups, config)
    with torch.no_grad():
        expected, _ = reference_logprobs(theirs, groups, 1.0)
        torch.testing.assert_close(policy.logprobs(batch)[0][batch.mask].double(), expected, atol=1e-5, rtol=1e-5)
        whole, _ = reference_logprobs(peft_model(policy, reference_model(config), tmp_path), groups, 1.0)
    assert (whole - expected).abs().max() > 1e-3


@pytest.mark.parametrize("adapted", [True, False], ids=["experts", "no_experts"])
@pytest.mark.parametrize("name", by_name("gpt-oss"))
def test_double_quantised_experts_are_bitsandbytes_own(name, adapted, tiny_config):
    """Of all experts of a layer as one weight. What the plan is told it spares is what it spares."""
    config = tiny_config(name, base="nf4", expert_adapters=adapted)
    once, twice = (build_policy(config), build_policy(replace(config, double_quant="on")))
    held = [sum(base.nbytes for base in bases_of(policy)) for policy in (once, twice)]
    assert held[0] - held[1] == once.store.spared_by_double_quant > 0
    assert twice.store.spared_by_double_quant == 0
    theirs = reference_model(config)
    for experts_name, experts in experts_of(twice.model).items():
        for weights in experts.maps():
            module = theirs.get_submodule(experts_name)
            dense = getattr(module, weights.name.rpartition(".")[2]).data
            dense = (dense.mT if module.is_transposed else dense).flatten(0, 1).contiguous()
            packed, state = bnb.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
            assert torch.equal(weights.base.packed, packed.flatten())
            assert torch.equal(weights.base.absmax, state.absmax)
            assert torch.equal(dequantised(weights.base), dequantize_4bit(packed, state))


def bases_of(policy):
    """All that is kept in 4 bits."""
    return [m.base for m in policy.model.modules() if isinstance(getattr(m, "base", None), NF4)]


def test_routers_stay_as_they_are(tiny_config):
    policy = build_policy(tiny_config("qwen2-moe", expert_adapters=True))
    assert not [name for name in policy.store.projections if name.endswith((".gate", ".router"))]
    assert {name.rpartition(".")[2] for name in policy.store.projections} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


LORA = dict(r=4, target_modules=[], lora_alpha=12, task_type="CAUSAL_LM", init_lora_weights=False)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("fields", [
    dict(target_modules=["q_proj", "o_proj"], target_parameters=EXPERTS),
    dict(target_modules=["q_proj"], target_parameters=["down_proj"]),
    dict(target_modules=["q_proj"], target_parameters=["gate_up_proj"], use_rslora=True),
    dict(target_modules="q_proj k_proj gate_proj up_proj down_proj".split(), r=2),  # PEFT makes rank 4 of gate and up
    dict(target_parameters=EXPERTS, rank_pattern={"down_proj": 2}, alpha_pattern={"gate_up_proj": 3}),
    dict(target_modules=["v_proj"], target_parameters=["q_proj.weight", *EXPERTS], rank_pattern={"q_proj.weight": 1}),
], ids=str)  # fmt: skip
def test_adapters_of_experts_that_peft_wrote_compute_here_what_they_compute_there(
    fields, tiny_config, groups, tmp_path
):
    config = tiny_config("qwen3-moe", expert_adapters=True, lora_rank=4)
    policy = build_policy(config)
    randomise(policy)
    torch.manual_seed(3)
    theirs = peft.get_peft_model(reference_model(config), peft.LoraConfig(**(LORA | fields))).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path)
    assert describe(tmp_path).rank == 4
    load_adapter(policy, tmp_path)
    batch = one_batch(groups, config)
    with torch.no_grad():
        expected, _ = reference_logprobs(theirs, groups, 1.0)
        torch.testing.assert_close(policy.logprobs(batch)[0][batch.mask].double(), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_of_experts_needs_experts_with_an_adapter(tiny_config, tmp_path):
    adapted = build_policy(tiny_config("qwen3-moe", expert_adapters=True))
    save_adapter(adapted, tmp_path)
    with pytest.raises(UserError, match="--expert-adapters"):
        load_adapter(build_policy(tiny_config("qwen3-moe")), tmp_path)
    with pytest.raises(UserError, match="experts of its model"):
        factors_in(tmp_path)


@pytest.mark.parametrize("adapted", [True, False], ids=["experts", "no_experts"])
def test_the_memory_plan_and_the_doctor_count_experts(adapted, tiny_config):
    config = tiny_config("qwen3-moe", expert_adapters=adapted)
    policy, theirs = build_policy(config), reference_model(config)
    of_layers = [p for name, p in theirs.named_parameters() if "layers" in name and "norm" not in name]
    routers = [p for name, p in theirs.named_parameters() if name.endswith("mlp.gate.weight")]
    there = sum(p.nbytes for p in of_layers) - sum(p.nbytes for p in routers)
    assert _base_weights(policy) * 4 == there
    storage = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in policy.store.parameters()}
    assert _adapter_bytes(policy) == sum(storage.values())  # in float32 the mirrors are the masters
    _, sizes = look_at_model(config, CPU)
    assert sizes.linears * 4 == there
    trained = sum(p.numel() for p in policy.store.parameters())
    assert bytes_of_adapter(config, sizes) == (4 + 4 + 8 + 2) * trained


@pytest.mark.parametrize("name", by_name("qwen2-moe", "deepseek-v2"))
def test_a_token_meets_as_many_experts_as_are_chosen(name, tiny_config, groups):
    """By the model's own settings, shared experts and layers without any included."""
    config = tiny_config(name)
    policy, theirs = build_policy(config), reference_model(config)
    settings = theirs.config
    spared = 1 - settings.num_experts_per_tok / len(
        theirs.get_submodule(next(iter(experts_of(policy.model)))).gate_up_proj
    )
    of_experts = sum(
        p.numel() for n, p in theirs.named_parameters() if n.endswith(("gate_up_proj", "experts.down_proj"))
    )
    held = _base_weights(policy)
    assert 0 < of_experts < held
    assert _met(policy, one_batch(groups, config)) * held == pytest.approx(held - spared * of_experts)


def test_a_token_meets_all_of_a_model_without_experts(tiny_config, groups):
    config = tiny_config("qwen3")
    assert _met(build_policy(config), one_batch(groups, config)) == 1


def test_no_dense_copy_of_experts_is_kept(tiny_config):
    policy = build_policy(tiny_config("deepseek-v2", base="nf4"))
    assert not [name for name, tensor in policy.model.state_dict().items() if tensor.dim() == 3]
    [experts] = experts_of(policy.model).values()
    assert sum(weights.base.nbytes for weights in experts.maps()) < 0.6 * 6 * 3 * 32 * 64
