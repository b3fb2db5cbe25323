"""A GPU whose memory does not hold a batch: the step is what it would have been, and nothing stays of what failed."""

import gc
from dataclasses import replace

import pytest
import torch
import transformers
from test_run_gpu import write_checkpoint

from grpo.config import Config
from grpo.fitting import Fitting
from grpo.loss import build_loss
from grpo.packing import batch_limit, build_packer, lay_out_longest
from grpo.policy import Policy, load_model
from grpo.types import Completion, Group, Prompt

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

QWEN3 = transformers.Qwen3Config(
    vocab_size=32_000,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
GROUPS, COMPLETIONS, PROMPT, LENGTH = 4, 4, 256, 896  # a batch of 15,360 tokens


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = write_checkpoint(QWEN3, tmp_path_factory.mktemp("model"))
    config = Config(model=str(folder), base="bf16", lora_rank=8, lora_alpha=8.0, recompute="none")
    return Policy(load_model(config, torch.device("cuda"), PROMPT + LENGTH), config)


@pytest.fixture
def limited():
    """bytes -> from now on PyTorch may hold no more of the GPU than that."""

    def limit(size):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(size / torch.cuda.mem_get_info()[1])

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


def groups_of(number):
    """Groups of random completions whose advantages differ."""
    draw = torch.Generator().manual_seed(0)

    def tokens(count):
        return torch.randint(3, QWEN3.vocab_size, (count,), generator=draw).tolist()

    made = []
    for index in range(number):
        written = [Completion(tokens(LENGTH), [-10.0] * LENGTH, "", "stop", 0) for _ in range(COMPLETIONS)]
        group = Group(Prompt(index, "", tokens(PROMPT), {}), written)
        group.advantages = torch.linspace(-1, 1, COMPLETIONS)
        made.append(group)
    return made


def measured(policy, config, groups):
    """The gradient of a step, flat, its metrics and the most bytes that were allocated for it."""
    loss, pack = build_loss(config), build_packer(config, policy.device, policy.fit.limit)
    policy.optimizer.zero_grad()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    [batches] = pack(groups)
    loss.prepare(policy, batches)
    sums = [part for batch in batches for part in policy.fit(lambda part: policy.backward(part, loss), batch)]
    gradient = torch.cat([parameter.grad.flatten() for parameter in policy.store.parameters()])
    return gradient, loss.summarize(sums), torch.cuda.max_memory_reserved()


def test_a_batch_that_the_gpu_does_not_hold_is_computed_in_parts(policy, limited):
    config = Config(kl_coef=0.1)
    groups = groups_of(GROUPS)
    told = []
    policy.fit.tell = told.append
    whole, metrics, peak = measured(policy, config, groups)
    assert policy.fit.count() == 0
    policy.optimizer.zero_grad()
    kept = torch.cuda.memory_allocated()
    assert peak - kept > 2**30, "the batch is too small to say anything"
    limited(kept + (peak - kept) * 2 // 3)
    parts, metrics_of_parts, peak_of_parts = measured(policy, config, groups)
    assert policy.fit.count() >= 1 and len(told) >= 1
    assert peak_of_parts < peak
    assert whole.norm() > 0 and (parts - whole).norm() < 2e-2 * whole.norm()  # bf16 rounds to 4e-3
    assert metrics_of_parts == pytest.approx(metrics, rel=2e-2, abs=1e-3)
    policy.optimizer.zero_grad()
    del parts
    gc.collect()  # a failed pass leaves a few MB in cycles, which Python takes away in time
    assert torch.cuda.memory_allocated() <= kept, "something of the failed tries is still there"
    measured(policy, config, groups)
    assert policy.fit.count() == 0, "the batches that followed are not the smaller ones"


def test_after_a_rehearsal_the_step_fits(policy, limited):
    config = replace(policy.config, max_completion_tokens=LENGTH, prompts_per_step=GROUPS, group_size=COMPLETIONS)
    groups, loss = groups_of(GROUPS), build_loss(config)
    policy.optimizer.zero_grad()
    policy.fit = Fitting(batch_limit(config), lambda note: None)
    _, _, peak = measured(policy, config, groups)
    policy.optimizer.zero_grad()
    kept = torch.cuda.memory_allocated()
    longest = lay_out_longest(config, policy.fit.limit, PROMPT, [5, 6, 7], policy.device)
    assert len(longest.tokens) == GROUPS * (PROMPT + COMPLETIONS * LENGTH)
    limited(kept + (peak - kept) * 2 // 3)
    policy.rehearse(longest, loss)
    assert policy.fit.limit.tokens < len(longest.tokens)
    assert torch.cuda.memory_allocated() <= kept + 20 * longest.tokens.nbytes  # the batch's own columns
    pack = build_packer(config, policy.device, policy.fit.limit)
    for _ in range(2):  # the second with the optimizer's state
        assert policy.update(pack(groups), loss, 1e-4)["policy/split_batches"] == 0
