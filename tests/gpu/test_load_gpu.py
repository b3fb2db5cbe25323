"""Loading on a CUDA GPU: read piece by piece a model is the one that is read whole, and a base may be in both kinds."""

import pytest
import torch
from test_load import assert_same, pickled, tensors
from tiny_models import CPU

from grpo.config import Config
from grpo.loss import build_loss
from grpo.packing import build_packer, lay_out_to_read
from grpo.policy import Policy, load_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CUDA = torch.device("cuda")


def load(folder, base, device=CUDA, **more):
    config = Config(model=str(folder), base=base, device=device.type, lora_rank=8)
    return load_model(config, device, 64, note=lambda told: None, **more)


@pytest.mark.parametrize("base", ["float32", "bf16", "nf4"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma2"])
def test_read_piece_by_piece_it_is_the_model_that_is_read_whole(name, base, checkpoint, tmp_path):
    ours = load(checkpoint(name), base)
    assert all(tensor.is_cuda for _, tensor in tensors(ours))
    assert_same(ours, load(pickled(checkpoint(name), tmp_path / "pickled"), base))


def test_a_base_of_which_some_is_in_16_bits(checkpoint, groups):
    """Log-probabilities are as far from the CPU's as those of one kind are: the rounding of bf16. An update moves every
    adapter."""
    fields = dict(model=checkpoint("qwen3"), base="nf4", quantization="dynamic", lora_rank=8)

    def policy_of(device, dense):
        config = Config(**fields, device=device.type)
        return Policy(load_model(config, device, 64, dense=dense), config), config

    def gap(dense):
        logprobs = []
        for device in (CPU, CUDA):
            policy, _ = policy_of(device, dense)
            batch = lay_out_to_read(groups, device)
            with torch.no_grad():
                logprobs.append(policy.logprobs(batch)[0][batch.mask].float().cpu())
        return (logprobs[0] - logprobs[1]).abs().mean()

    dense = ["0.gate_up", "1.down", "1.qkv"]
    assert gap(dense) < 1.5 * gap([])
    policy, config = policy_of(CUDA, dense)
    assert sorted(policy.store.dense) == dense
    metrics = policy.update(build_packer(config, CUDA)(groups), build_loss(config), 1e-3)
    assert metrics["optim/grad_norm"] > 0
    assert all(b.abs().max() > 0 for _, _, b in policy.store.factors())


def test_what_stays_in_16_bits_is_chosen_on_the_gpu(checkpoint):
    prompts = [[3 + (7 * i + j) % 90 for j in range(20)] for i in range(4)]
    config = Config(
        model=checkpoint("qwen3"), base="nf4", quantization="dynamic", dynamic_allowance=0.5, lora_rank=8, device="cuda"
    )
    notes = []
    loaded = load_model(config, CUDA, 64, note=notes.append, prompts=prompts)
    [told] = [note for note in notes if "--quantization dynamic keeps" in note]
    assert loaded.store.dense and all(name in told for name in loaded.store.dense)
    assert all(loaded.store[name].base.dtype == torch.bfloat16 for name in loaded.store.dense)
    assert_same(loaded, load_model(config, CUDA, 64, dense=loaded.store.dense))
