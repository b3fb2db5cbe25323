"""What an engine does to the process it lives in: nothing that lasts."""

import gc
import random
import shutil
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_engines import Letters, contexts, prompts, rollout
from tiny_models import build_policy
from transformers import AutoConfig

from grpo.rollout import vllm_compat
from grpo.rollout.vllm_engine import VllmEngine

# What memory may grow by from the second engine to the tenth: less than a tenth of what the eight of them held, and far
# less than one of them, whose KV cache alone has 64 MiB.
GROWTH = 32 * 2**20


def state_of_the_process():
    return {
        "python": random.getstate(),
        "numpy": tuple(np.random.get_state()[1]),
        "torch": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "frozen": gc.get_freeze_count(),
        "collects": gc.isenabled(),
    }


def test_building_and_sampling_leave_the_process_as_it_was(vllm_config):
    gc.unfreeze()  # what conftest.py froze
    config = vllm_config()
    policy = build_policy(config)
    torch.set_float32_matmul_precision("high")
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    before = state_of_the_process()
    engine = VllmEngine(policy, Letters(), contexts(prompts()), config, 60)
    assert state_of_the_process() == before
    assert not vllm_compat.has_graphs(engine.llm)  # on a CPU there are none
    rollout(engine, prompts(), 3, seed=1)
    engine.logprobs([[5, 6]], [[7, 8]])
    engine.sync()
    assert state_of_the_process() == before
    engine.close()
    assert state_of_the_process() == before


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_ten_engines_opened_and_closed_leave_nothing(vllm_config):
    config = vllm_config()
    policy = build_policy(config)
    memory, threads, gone = [], [], []
    for seed in range(10):
        engine = VllmEngine(policy, Letters(), contexts(prompts()), config, 60)
        rollout(engine, prompts(), 3, seed)
        gone += [weakref.ref(engine.llm), weakref.ref(vllm_compat.inner_model(engine.llm))]
        engine.close()
        gc.collect()
        memory.append(resident_bytes())
        threads.append(threading.active_count())
    assert [reference() for reference in gone] == [None] * 20
    assert threads[-1] <= threads[1]
    assert memory[-1] - memory[1] < GROWTH


class Compiled(VllmEngine):
    """As on a GPU."""

    def _arguments(self, longest):
        return super()._arguments(longest) | {"enforce_eager": False}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_is_forgotten_too(vllm_config):
    config = vllm_config()
    engine = Compiled(build_policy(config), Letters(), contexts(prompts()), config, 60)
    model = weakref.ref(vllm_compat.inner_model(engine.llm).model)
    assert not model().do_not_compile
    engine.close()
    gc.collect()
    assert model() is None


def test_a_model_class_is_looked_at_in_this_process(vllm_config):
    """Else vLLM starts another Python for it."""
    from vllm import ModelRegistry

    config = vllm_config()
    policy = build_policy(config)
    vllm_compat.import_vllm(policy.device)
    vllm_compat.load_model_class(policy.source)
    (architecture,) = AutoConfig.from_pretrained(policy.source).architectures
    entry = ModelRegistry.models[architecture]
    assert type(entry).__name__ == "_RegisteredModel"
    assert entry.model_cls.__name__ == architecture
    vllm_compat.load_model_class(policy.source)  # once more: nothing to do
    assert ModelRegistry.models[architecture] == entry


def test_warm_up_is_by_our_requests_and_only_meanwhile():
    from vllm import SamplingParams

    ours, usual = SamplingParams(temperature=0.7, seed=1), SamplingParams.for_sampler_warmup()
    with pytest.raises(KeyboardInterrupt), vllm_compat.warmed_up_with(ours):
        asked = SamplingParams.for_sampler_warmup()
        assert asked == ours and asked is not ours
        raise KeyboardInterrupt
    assert SamplingParams.for_sampler_warmup() == usual != ours
