"""Moments in pages of the host's memory on a CUDA GPU: the bits of those that stay there, and their room for others."""

import pytest
import torch
import transformers
from safetensors.torch import load, load_file, save
from test_run_gpu import train, write_checkpoint
from torch import nn

from grpo import build
from grpo.config import Config, UpdateConfig
from grpo.folder import list_checkpoints
from grpo.policy.optimizer import (
    beside_pages,
    build_optimizer,
    check_optimizer,
    has_pages,
    lift_state,
    optimizer_tensors,
    page_state,
    restore_optimizer,
    state_to_come,
)
from grpo.run import main

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

GPU = torch.device("cuda")
SIZES = [(3,), (50, 100), (8192, 8192), (1_000_003,)]  # float32, 8 bits, and two in pages
IN_PAGES = 8192 * 8192 + 1_000_003  # values of a moment
QWEN3 = transformers.Qwen3Config(
    vocab_size=32_000,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
)


def parameters(sizes=SIZES):
    draw = torch.Generator(GPU).manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=draw, device=GPU)) for size in sizes]


def in_8_bits(start, paged):
    optimizer = build_optimizer(start, UpdateConfig(optimizer="adamw8bit", learning_rate=0.02, weight_decay=0.1))
    if paged:
        page_state(optimizer)
    return optimizer


def walk(optimizer, steps, first=0):
    """Steps down random gradients, the same for all optimizers."""
    for step in range(first, first + steps):
        draw = torch.Generator(GPU).manual_seed(step)
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=draw, device=GPU)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def bits_of(optimizer):
    """Parameters, and the state as a checkpoint's file has it, in the host's memory."""
    state = save({name: tensor.cpu().contiguous() for name, tensor in optimizer_tensors(optimizer).items()})
    return [each.detach().cpu() for each in optimizer.param_groups[0]["params"]], load(state)


def assert_same(one, other):
    (parameters, state), (others, other_state) = bits_of(one), bits_of(other)
    assert all(map(torch.equal, parameters, others))
    assert state.keys() == other_state.keys() and all(torch.equal(state[name], other_state[name]) for name in state)


def in_pages(optimizer):
    return {name for name, tensor in optimizer_tensors(optimizer).items() if getattr(tensor, "is_paged", False)}


def test_pages_are_to_be_had_here():
    assert has_pages(GPU)
    check_optimizer(Config(optimizer="adamw8bit", page_optimizer="on"), GPU)


def test_three_steps_are_the_same_bits_in_less_memory():
    held, optimizers = [], []
    for paged in (False, True):
        optimizer = in_8_bits(parameters(), paged)
        torch.cuda.synchronize()
        before, to_come = torch.cuda.memory_allocated(), sum(tensor.nbytes for tensor in state_to_come(optimizer))
        walk(optimizer, 3)
        held.append(torch.cuda.memory_allocated() - before)
        assert held[-1] == pytest.approx(to_come, abs=4 * 2**20)  # blocks of the allocator, and tables
        optimizers.append(optimizer)
    without, with_pages = optimizers
    assert in_pages(without) == set()
    assert in_pages(with_pages) == {"2.state1", "2.state2", "3.state1", "3.state2"}
    assert held[0] - held[1] == pytest.approx(2 * IN_PAGES, rel=0.05)
    assert held[1] == pytest.approx(beside_pages(with_pages), abs=4 * 2**20)
    assert_same(with_pages, without)
    state = bits_of(with_pages)[1]
    assert all(state[name].bool().any() for name in in_pages(with_pages))


@pytest.mark.parametrize(("first_paged", "then_paged"), [(True, True), (True, False), (False, True)])
def test_what_was_saved_goes_on_with_pages_or_without(first_paged, then_paged):
    walk(whole := in_8_bits(parameters(), paged=False), 5)
    walk(first := in_8_bits(parameters(), first_paged), 3)
    started, state = bits_of(first)
    second = in_8_bits([nn.Parameter(each.to(GPU)) for each in started], then_paged)
    restore_optimizer(second, state)
    assert bool(in_pages(second)) == then_paged
    assert_same(second, first)
    walk(second, 2, 3)
    assert_same(second, whole)


def test_a_lifted_state_is_off_the_gpu_and_comes_back_in_pages():
    walk(whole := in_8_bits(parameters(), paged=False), 5)
    walk(lifted := in_8_bits(parameters(), paged=False), 3)
    before = torch.cuda.memory_allocated()
    moments = lift_state(lifted)
    assert before - torch.cuda.memory_allocated() == pytest.approx(2 * IN_PAGES, rel=0.05)
    page_state(lifted)
    restore_optimizer(lifted, moments)
    assert len(in_pages(lifted)) == 4
    walk(lifted, 2, 3)
    assert_same(lifted, whole)


def test_pages_make_way_for_what_wants_their_room():
    """What the plan counts on: after a step the GPU may be filled as if they were not there; then they come back."""
    torch.cuda.set_per_process_memory_fraction(1.0)
    walk(whole := in_8_bits(parameters([(2**29,)]), paged=False), 2)
    optimizer = in_8_bits(parameters([(2**29,)]), paged=True)
    state = 2 * 2**29
    torch.cuda.empty_cache()
    size = torch.cuda.mem_get_info()[0] - 2**28 - beside_pages(optimizer)
    walk(optimizer, 1)
    torch.cuda.empty_cache()
    filled = torch.full((size,), 7, dtype=torch.uint8, device=GPU)  # more by most of the state than there is beside it
    torch.cuda.synchronize()
    assert size > state and filled[-1] == filled[size // 2] == 7
    del filled
    torch.cuda.empty_cache()
    walk(optimizer, 1, 1)
    assert_same(optimizer, whole)


def test_a_run_has_pages_where_they_are_asked_for_and_goes_on_without(tmp_path, monkeypatch, capsys):
    seen = []

    def restore(optimizer, tensors):
        restore_optimizer(optimizer, tensors)
        seen.append((optimizer, {name: tensor.cpu().clone() for name, tensor in optimizer_tensors(optimizer).items()}))

    monkeypatch.setattr(build, "restore_optimizer", restore)
    model, row = write_checkpoint(QWEN3, tmp_path / "model"), "optimizer, its state in pages of the host's memory"
    flags = ["--optimizer", "adamw8bit", "--lora-rank", "64", "--save-every", "1", "--page-optimizer"]
    train(model, "bf16", tmp_path, flags=[*flags, "on"])
    assert row in "".join(capsys.readouterr())
    [(optimizer, at_first)] = seen
    large = [each.numel() >= 100_000 for each in optimizer.param_groups[0]["params"]]
    assert at_first == {} and any(large) and not all(large)
    assert in_pages(optimizer) == {f"{index}.state{n}" for index, it in enumerate(large) if it for n in (1, 2)}
    for steps, mode in ((4, "off"), (5, "on")):
        saved = load_file(list_checkpoints(tmp_path / "run")[-1] / "optimizer.safetensors")
        argv = ["--resume", str(tmp_path / "run"), "--steps", str(steps), "--page-optimizer", mode]
        assert main(argv) == 0
        assert (row in "".join(capsys.readouterr())) == (mode == "on")
        optimizer, state = seen[-1]
        assert bool(in_pages(optimizer)) == (mode == "on")
        assert state.keys() == saved.keys() and all(torch.equal(state[name], saved[name]) for name in saved)
