"""What of a layer waits for the backward pass, and where, on a CUDA GPU: the same gradient, in less memory."""

import pytest
import torch
import transformers
from test_run_gpu import write_checkpoint

from grpo.config import Config
from grpo.packing import lay_out_to_read
from grpo.policy import Policy
from grpo.policy.load import load_model
from grpo.types import Completion, Group, Prompt

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

QWEN3 = transformers.Qwen3Config(
    vocab_size=2048,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=4096,
)
TOKENS = 256 + 16 * 509


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = write_checkpoint(QWEN3, tmp_path_factory.mktemp("qwen3"))
    config = Config(model=str(folder), base="nf4", device="cuda", lora_rank=8)
    policy = Policy(load_model(config, torch.device("cuda"), 1024), config)
    for parameter in policy.store.parameters():
        parameter.data.normal_(std=0.02, generator=torch.Generator("cuda").manual_seed(parameter.numel()))
    policy.store.refresh()
    return policy


def batch_of(policy, seed):
    generator = torch.Generator().manual_seed(seed)

    def tokens(length):
        return torch.randint(3, 2048, (length,), generator=generator).tolist()

    completions = [Completion(tokens(509), [0.0] * 509, "", "stop", 0) for _ in range(16)]
    return lay_out_to_read([Group(Prompt(0, "", tokens(256), {}), completions)], policy.device)


def gradients(policy, batch):
    return torch.autograd.grad(policy.logprobs(batch)[0].sum(), policy.store.parameters())


def distance(one, other):
    """Between two gradients, as a share of the first."""
    between = sum((a - b).double().square().sum() for a, b in zip(one, other, strict=True))
    return (between / sum(a.double().square().sum() for a in one)).sqrt().item()


def noise(policy, batch):
    """The distance of a gradient from itself: flash attention's backward pass adds up in another order each time."""
    first = gradients(policy, batch)
    return max(distance(first, gradients(policy, batch)) for _ in range(3))


def test_the_same_gradient_in_less_memory(policy):
    layers = len(policy.model.layers)
    batch = batch_of(policy, seed=1)
    results, peaks = [], []
    for treatments in (
        ["keep"] * layers,
        ["recompute"] * 6 + ["keep"] * (layers - 6),
        ["recompute"] * layers,
        ["offload"] * (layers - 1) + ["recompute"],
    ):
        policy.model.treat(treatments)
        gradients(policy, batch)  # kernels are chosen
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results.append(gradients(policy, batch))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    policy.model.treat(["keep"] * layers)
    allowed = 3 * noise(policy, batch) + 1e-6
    # Products over some rows at once are added up in another order: what is rounded to bfloat16 is half a unit off.
    rounding = torch.finfo(torch.bfloat16).eps / 2
    assert all(distance(results[0], others) <= allowed + rounding for others in results[1:])
    assert distance(results[2], results[3]) <= allowed
    kept, half, recomputed, offloaded = peaks
    assert offloaded < recomputed < half < kept
    # All but the last layer's input are on the host, and of two layers that and what attention gave, twice as large.
    assert recomputed - offloaded >= (layers - 7) * TOKENS * 1024 * 2


def test_a_pass_without_a_backward_pass_leaves_nothing_behind(policy):
    layers = len(policy.model.layers)
    policy.model.treat(["offload"] * (layers - 1) + ["recompute"])
    first, second = batch_of(policy, seed=1), batch_of(policy, seed=2)
    expected, allowed = gradients(policy, second), 3 * noise(policy, second) + 1e-6
    policy.logprobs(first)
    assert distance(expected, gradients(policy, second)) <= allowed
