"""The memory plan on a CUDA GPU: what it predicts of an update is what the update takes."""

import pytest
import torch
from test_activations_gpu import QWEN3, batch_of
from test_run_gpu import write_checkpoint

from grpo.config import Config
from grpo.memory_trial import measure
from grpo.policy import Policy
from grpo.policy.load import load_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("base", ["nf4", "bf16"])
def test_an_update_takes_what_was_predicted(base, tmp_path):
    folder = write_checkpoint(QWEN3, tmp_path)
    config = Config(model=str(folder), base=base, device="cuda", lora_rank=8)
    policy = Policy(load_model(config, torch.device("cuda"), 1024), config)
    sizes = measure(policy, 765)
    batch, layers = batch_of(policy, seed=1), len(policy.model.layers)
    for kept, offloaded in ((0, 0), (1, 0), (5, 0), (layers, 0), (0, layers - 1)):
        recomputed = layers - kept - offloaded
        policy.model.treat(["offload"] * offloaded + ["recompute"] * recomputed + ["keep"] * kept)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        gradients = torch.autograd.grad(policy.logprobs(batch)[0].sum(), policy.store.parameters())
        measured = torch.cuda.max_memory_allocated() - before
        del gradients
        predicted = sizes.update(len(batch.tokens), kept, offloaded) - 4 * sizes.parameters  # none are added up here
        assert predicted == pytest.approx(measured, rel=0.1), (kept, offloaded)


def test_segments_grow_once_a_model_is_loaded(tmp_path):
    folder = write_checkpoint(QWEN3, tmp_path)
    load_model(Config(model=str(folder), base="bf16", device="cuda"), torch.device("cuda"), 64)
    assert torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"]
