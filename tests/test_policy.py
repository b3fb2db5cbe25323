"""The policy against transformers + PEFT and bitsandbytes: logits, gradients, adapter files; and its invariants."""

import peft
import pytest
import torch
import transformers
from tiny_models import CPU, FUSED, GENERIC, build_policy, one_batch, randomise, reference_logprobs
from torch.utils._python_dispatch import TorchDispatchMode

from grpo.loss import build_loss
from grpo.policy import load, load_model
from grpo.policy.adapter import adapter_files
from grpo.policy.fused import FusedModel
from grpo.policy.generic import GenericModel
from grpo.policy.recognition import NotRecognisedError, recognise


def save_adapter(policy, folder):
    for name, content in adapter_files(policy).items():
        (folder / name).write_bytes(content)
    return folder


def peft_model(policy, base, folder):
    """The same adapter opened by PEFT over transformers' own model."""
    model = peft.PeftModel.from_pretrained(base, save_adapter(policy, folder), is_trainable=True)
    return model.eval()


def reference_model(config):
    """With the one attention of transformers that computes soft caps."""
    how = {"dtype": torch.float32, "attn_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_pretrained(config.model, **how).eval()


@pytest.mark.parametrize("name", [*FUSED, *GENERIC])
def test_architectures_are_told_apart_by_what_they_compute(name, tiny_config):
    notes = []
    model = load_model(tiny_config(name), CPU, 64, note=notes.append).model
    assert isinstance(model, FusedModel if name in FUSED else GenericModel)
    [note] = notes
    assert note.startswith("layers: fused, over packed" if name in FUSED else "layers: those of transformers' ")
    assert len(note) < 300


@pytest.mark.parametrize("name", [*FUSED, *GENERIC])
def test_they_are_told_apart_in_bf16_and_with_freshly_initialised_weights_too(name):
    """Where a layer adds little to its input, and rounding is coarse, a wrong layer must not pass for the right one."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config((FUSED | GENERIC)[name](), dtype=torch.bfloat16).eval()
    if name in FUSED:
        assert len(recognise(model, longest=64).layers) == model.config.get_text_config().num_hidden_layers
    else:
        with pytest.raises(NotRecognisedError):
            recognise(model, longest=64)


@pytest.mark.parametrize("name", [*FUSED, *GENERIC])
def test_logprobs_and_lora_gradients_are_those_of_peft(name, tiny_config, groups, tmp_path):
    config = tiny_config(name, temperature=0.7)
    policy = build_policy(config)
    randomise(policy)
    theirs = peft_model(policy, reference_model(config), tmp_path)
    batch = one_batch(groups, config)
    weights = torch.randn(int(batch.mask.sum()), generator=torch.Generator().manual_seed(2))

    logprobs, entropy = (x[batch.mask] for x in policy.logprobs(batch, differentiable_entropy=True))
    expected_logprobs, expected_entropy = reference_logprobs(theirs, groups, 0.7)
    torch.testing.assert_close(logprobs.double(), expected_logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, atol=1e-5, rtol=1e-5)

    (weights * logprobs + 0.3 * weights.flip(0) * entropy).sum().backward()
    (weights * expected_logprobs + 0.3 * weights.flip(0) * expected_entropy).sum().backward()
    gradients = peft_gradients(theirs)
    for projection in policy.store.projections.values():
        for part, (linear, a_grad) in enumerate(
            zip(projection.names, projection.lora_a.grad.split(config.lora_rank), strict=True)
        ):
            assert_same_gradient(a_grad, gradients[linear + ".lora_A"])
            assert_same_gradient(projection.lora_b[part].grad, gradients[linear + ".lora_B"])


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral-window", "glm4", "granite"])
def test_where_nothing_is_recognised_the_numbers_are_the_same(name, tiny_config, groups, monkeypatch, capsys):
    config = tiny_config(name)
    batch = one_batch(groups, config)
    expected = build_policy(config).logprobs(batch)[0]

    def never(model, longest):
        raise NotRecognisedError("this is a test")

    monkeypatch.setattr(load, "recognise", never)
    policy = build_policy(config)
    assert isinstance(policy.model, GenericModel)
    torch.testing.assert_close(policy.logprobs(batch)[0], expected, atol=1e-5, rtol=1e-5)
    assert capsys.readouterr().out.count("layers: ") == 2  # before and now


def assert_same_gradient(ours, theirs):
    """Up to the rounding of two orders of summation, which is as large as the gradient's largest elements make it, not
    as each small one of them."""
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def peft_gradients(model):
    """{linear.lora_A: gradient} under Hugging Face's module names."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): parameter.grad
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


# One of each kind; the others are the second stage.
STEPS_FIRST = ("qwen3", "gemma2", "gemma3", "glm4", "olmo2", "granite", "cohere2", "gpt2")
NF4_FIRST = ("qwen2", "gpt2", "gemma3", "phi3", "glm4", "cohere2")


class Weighted:
    """A loss without choices of its own: a weighted sum of log-probabilities and entropies."""

    differentiable_entropy = True

    def __init__(self, weights):
        self.weights = weights

    def prepare(self, policy, batches):
        pass

    prepare_step = prepare

    def __call__(self, logprobs, entropy, batch):
        return (self.weights * logprobs[batch.mask] + 0.1 * self.weights.flip(0) * entropy[batch.mask]).sum(), {}

    def summarize(self, sums):
        return {}


def five_steps_beside_peft(config, groups, tmp_path):
    """Both take them from one adapter on one batch, and say the same afterwards."""
    policy = build_policy(config)
    randomise(policy)
    theirs = peft_model(policy, reference_model(config), tmp_path)
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3, (config.adam_beta1, config.adam_beta2), weight_decay=0.0)
    batch = one_batch(groups, config)
    loss = Weighted(torch.randn(int(batch.mask.sum()), generator=torch.Generator().manual_seed(2)))
    before = policy.logprobs(batch)[0][batch.mask]
    for _ in range(5):
        policy.update([[batch]], loss, 1e-3)
        logprobs, entropies = reference_logprobs(theirs, groups, 1.0)
        optimizer.zero_grad()
        (loss.weights * logprobs + 0.1 * loss.weights.flip(0) * entropies).sum().backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
    expected, _ = reference_logprobs(theirs, groups, 1.0)
    after = policy.logprobs(batch)[0][batch.mask]
    torch.testing.assert_close(after.double(), expected, atol=1e-5, rtol=1e-5)
    assert (after - before).abs().max() > 1e-2


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in STEPS_FIRST else [pytest.mark.slow]) for name in [*FUSED, *GENERIC]],
)
def test_five_training_steps_are_those_of_peft(name, tiny_config, groups, tmp_path):
    five_steps_beside_peft(tiny_config(name, max_grad_norm=0.5), groups, tmp_path)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in NF4_FIRST else [pytest.mark.slow]) for name in [*FUSED, "gpt2"]]
)
def test_nf4_equals_bitsandbytes_dequantised_weights(name, tiny_config, groups, tmp_path):
    from bitsandbytes.functional import quantize_4bit
    from bnb_reference import dequantize_4bit

    config = tiny_config(name, base="nf4")
    policy = build_policy(config)
    randomise(policy)
    base = reference_model(config)
    for linear in [linear for linear, _, _ in policy.store.factors()]:
        weight = base.get_submodule(linear).weight
        stored = weight.data.T if name == "gpt2" else weight.data
        rounded = dequantize_4bit(*quantize_4bit(stored.contiguous(), quant_type="nf4", blocksize=64))
        weight.data = (rounded.T if name == "gpt2" else rounded).contiguous()
    theirs = peft_model(policy, base, tmp_path)
    batch = one_batch(groups, config)
    expected, _ = reference_logprobs(theirs, groups, 1.0)
    logprobs = policy.logprobs(batch)[0][batch.mask]
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=1e-5)
    logprobs.sum().backward()
    expected.sum().backward()
    gradients = peft_gradients(theirs)
    projection = policy.store.projections[next(iter(policy.store.projections))]
    first = projection.lora_a.grad[: config.lora_rank]
    assert_same_gradient(first, gradients[projection.names[0] + ".lora_A"])


def test_bf16_base_is_the_rounded_weight(tiny_config, groups, tmp_path):
    config = tiny_config(base="bf16")
    policy = build_policy(config)
    randomise(policy)
    base = reference_model(config)
    for linear in [linear for linear, _, _ in policy.store.factors()]:
        weight = base.get_submodule(linear).weight
        weight.data = weight.data.bfloat16().float()
    expected, _ = reference_logprobs(peft_model(policy, base, tmp_path), groups, 1.0)
    batch = one_batch(groups, config)
    assert policy.store["0.qkv"].base.dtype == torch.bfloat16
    torch.testing.assert_close(policy.logprobs(batch)[0][batch.mask].double(), expected, atol=1e-5, rtol=1e-5)


def test_the_reference_policy_is_the_model_without_adapter(tiny_config, groups):
    config = tiny_config()
    policy = build_policy(config)
    batch = one_batch(groups, config)
    fresh = policy.logprobs(batch)[0].detach()
    randomise(policy)
    assert not torch.allclose(policy.logprobs(batch)[0], fresh, atol=1e-3)
    torch.testing.assert_close(policy.reference_logprobs(batch), fresh)


def test_old_logprobs_are_those_before_the_first_optimizer_step(tiny_config, groups):
    """With two epochs the second step's ratio is against the policy that sampled, not against the first step's."""
    config = tiny_config(epochs=2, learning_rate=0.05, clip_low=0.01, clip_high=0.01)
    policy = build_policy(config)
    randomise(policy)
    batch = one_batch(groups, config)
    before = policy.logprobs(batch)[0]
    metrics = policy.update([[batch]], build_loss(config), config.learning_rate, config.epochs)
    torch.testing.assert_close(batch.old_logprobs, before, atol=0, rtol=0)
    assert policy.version == 2
    assert not torch.allclose(policy.logprobs(batch)[0], before, atol=1e-2)
    # No ratio is clipped at the first step, where it is 1; at the second many are.
    assert 0.1 < metrics["policy/clip_fraction"] <= 0.5


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma2"])
def test_how_activations_wait_changes_no_gradient(name, tiny_config, groups):
    policy = build_policy(tiny_config(name, recompute="none"))
    randomise(policy)
    batch = one_batch(groups, policy.config)

    def gradients():
        return torch.autograd.grad(policy.logprobs(batch)[0].sum(), policy.store.parameters())

    kept = gradients()
    first, *others = ["keep"] * len(policy.model.layers)
    for treatments in (
        ["recompute", *["recompute" for _ in others]],
        ["offload", *["offload" for _ in others]],
        ["offload", *others],
        ["recompute", *others],
        [first, *others],
    ):
        policy.model.treat(treatments)
        for before, now in zip(kept, gradients(), strict=True):
            torch.testing.assert_close(now, before, atol=0, rtol=0)


def test_a_pass_waits_for_the_gpu_before_it_and_not_after(tiny_config, groups):
    """What has to be counted on the GPU is counted before the layers are launched, once."""
    config = tiny_config()
    policy = build_policy(config)
    batch = one_batch(groups, config)
    called = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), named=None):
            called.append(operation.name())
            return operation(*arguments, **named or {})

    with Watch():
        policy.logprobs(batch)
    assert called.count("aten::nonzero") == 1
    assert called.index("aten::nonzero") < called.index("aten::embedding")
