"""Weights that are read when they are needed, against the weights themselves, and the memory that this takes."""

import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tiny_models import SIZES
from torch import nn

from grpo.errors import UserError
from grpo.policy.promises import Checkpoint, NotPromised, Promise, no_progress, read_copy, settle, value_of

CPU = torch.device("cpu")


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    return {
        "one": torch.randn(6, 4, generator=generator),
        "two": torch.randn(6, 4, generator=generator).bfloat16(),
        "count": torch.arange(3),
    }


@pytest.fixture
def promised(weights, tmp_path):
    save_file(weights, tmp_path / "weights.safetensors")
    return Checkpoint([str(tmp_path / "weights.safetensors")], no_progress).promised


def test_a_promise_looks_like_its_tensor_and_is_read_as_it(weights, promised):
    for name, expected in weights.items():
        promise = promised[name]
        assert isinstance(promise, Promise)
        assert (promise.shape, promise.dtype, promise.device) == (expected.shape, expected.dtype, expected.device)
        assert not isinstance(value_of(promise), Promise) and torch.equal(value_of(promise), expected)


@pytest.mark.parametrize(
    "compute",
    [
        lambda w: w["two"].to(CPU, torch.float32),
        lambda w: torch.cat([w["one"], w["two"].float()], dim=1),
        lambda w: torch.stack([w["one"], torch.ones(6, 4)]).transpose(1, 2).contiguous(),
        lambda w: w["one"].chunk(3)[1],
        lambda w: torch.split(w["one"].T, [1, 3])[1][..., 2:],
        lambda w: w["one"].view(3, 2, 4).permute(2, 0, 1).reshape(4, 6) * 2,
    ],
)
def test_what_is_computed_of_promises_is_promised(compute, weights, promised):
    made, expected = compute(promised), compute(weights)
    assert isinstance(made, Promise)
    assert (made.shape, made.stride(), made.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert torch.equal(value_of(made), expected)


def test_what_is_no_tensor_is_computed_at_once(weights, promised):
    assert torch.equal(promised["one"], promised["one"].clone())
    assert not torch.equal(promised["one"], promised["two"].float())
    assert promised["one"].sum().item() == weights["one"].sum().item()


def test_a_weight_that_is_not_read_cannot_be_changed(promised):
    with pytest.raises(NotPromised, match="uniform_"):
        promised["one"].uniform_()


def test_settling_reads_everything_once_and_shares_what_was_shared(weights, promised):
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False), nn.Module())
    model[0].weight = model[1].weight = nn.Parameter(promised["one"])
    model[2].register_buffer("count", promised["count"])
    settle(model, CPU, lambda name: name == "0")
    assert model[0].weight is model[1].weight and torch.equal(model[0].weight, weights["one"])
    assert isinstance(model[2].count, Promise)
    settle(model, CPU)
    assert torch.equal(model[2].count, weights["count"]) and list(model[2].buffers())
    assert not any(isinstance(tensor, Promise) for tensor in [*model.parameters(), *model.buffers()])


def test_a_part_of_a_weight_does_not_keep_the_whole(weights, promised):
    model = nn.Linear(4, 2, bias=False)
    model.weight = nn.Parameter(promised["one"].chunk(3)[1], requires_grad=False)
    settle(model, CPU)
    assert torch.equal(model.weight, weights["one"][2:4])
    assert model.weight.untyped_storage().nbytes() == model.weight.nbytes


def test_a_copy_is_read_and_the_original_is_not(weights, promised):
    model = nn.Linear(4, 6, bias=False)
    model.weight = nn.Parameter(promised["two"], requires_grad=False)
    copy = read_copy(model)
    assert torch.equal(copy.weight, weights["two"].float()) and isinstance(model.weight, Promise)


def test_progress_counts_each_byte_once(weights, tmp_path):
    save_file(weights, tmp_path / "weights.safetensors")
    told = []
    promised = Checkpoint([str(tmp_path / "weights.safetensors")], lambda *at: told.append(at)).promised
    assert told == []
    for name in ("one", "two", "one", "count"):
        value_of(promised[name])
    assert told == [(96, 168), (144, 168), (144, 168), (168, 168)]


def test_a_tensor_of_an_unusual_dtype_is_read_as_well(tmp_path):
    weights = {"scale": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)}
    save_file(weights, tmp_path / "weights.safetensors")
    [read] = Checkpoint([str(tmp_path / "weights.safetensors")], no_progress).promised.values()
    assert torch.equal(value_of(read).float(), torch.tensor([1.0, 2.0]))


def test_a_file_that_is_cut_short_after_it_was_opened(tmp_path, promised):
    os.truncate(tmp_path / "weights.safetensors", 300)
    with pytest.raises(UserError, match=r"weights\.safetensors .* was changed while it was read, or its disk fails"):
        for promise in promised.values():
            value_of(promise)


# ---- memory

MEASURE = """
import gc, resource, sys
import torch
from grpo.config import Config
from grpo.policy import load_model

def load(folder):
    return load_model(Config(model=folder, base="nf4", device="cpu", lora_rank=1), torch.device("cpu"), 64)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(1)
load(sys.argv[1])  # what is imported late, and the memory of a first time
gc.collect()
resident = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
filler = bytearray(max(0, peak() - resident))
before = peak()
loaded = load(sys.argv[2])
bases = [projection.base for projection in loaded.store.projections.values()]
kept = [*loaded.model.parameters(), *loaded.model.buffers(), *(t for b in bases for t in (b.packed, b.absmax))]
print(peak() - before, sum(tensor.nbytes for tensor in kept))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_takes_no_more_than_the_finished_model_and_two_shards(checkpoint, tmp_path):
    """12 shards of 8 MB. Small blocks of memory go back to the system here, as blocks of a real model's size do."""
    sizes = SIZES | dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=24, head_dim=64)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path, max_shard_size="8MB")
    shards = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    assert len(shards) == 12
    told = subprocess.run(
        [sys.executable, "-c", MEASURE, checkpoint("llama"), str(tmp_path)],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    grown, finished = map(int, told.splitlines()[-1].split())
    assert grown > finished / 2  # it is measured at all
    assert grown < finished + 2 * max(shards)
