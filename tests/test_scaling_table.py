"""scripts/write_scaling_table.py: what is counted from a shape is what transformers' model and an adapter have."""

import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "benchmarks")]

import sharded  # noqa: E402
import write_scaling_table as table  # noqa: E402
from shapes import SHAPES  # noqa: E402
from threaded_ranks import Table, Thread  # noqa: E402

from grpo.config import Config  # noqa: E402

QUICK = ["qwen2.5-1.5b", "qwen3-0.6b"]
LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in table.MODELS.values() if name not in QUICK]


@pytest.mark.parametrize("name", [*QUICK, *LARGE])
def test_a_shape_has_the_sizes_of_the_model(name):
    given = dict(SHAPES[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(given.pop("model_type"), **given))
    head = model.get_output_embeddings()
    linears = [each for each in model.modules() if isinstance(each, torch.nn.Linear) and each is not head]
    shape = table.shape_of(name)
    assert shape.weights == sum(each.weight.numel() for each in linears)
    assert shape.trained == table.RANK * sum(each.in_features + each.out_features for each in linears)
    norms_and_biases = sum(each.numel() for each in model.parameters() if each.ndim == 1)
    assert shape.tables == sum(each.numel() for each in model.parameters()) - shape.weights - norms_and_biases


def test_the_longest_completion_that_fits_is_the_longest():
    """Told by the plan that would be chosen, of which the table looks at the smallest alone."""
    shape, gib = table.shape_of("qwen2.5-14b"), 20.0
    longest = table.longest("qwen2.5-14b", "nf4", gib)
    assert 0 < longest < table.MOST
    table.plan_of(shape, "nf4", gib, table.Step(longest))
    with pytest.raises(table.UserError):
        table.plan_of(shape, "nf4", gib, table.Step(longest + table.GRAIN))


@pytest.mark.parametrize(("cards", "network", "seconds"), [(1, 1.0, 0.0), (2, 1.0, 0.1), (16, 5.0, 0.375 + 0.03)])
def test_what_cards_cost(cards, network, seconds):
    """1 GB of gradients, 10 MB of completions, 10 GB/s inside a host."""
    assert table.cost(cards, 1e9, 1e7, 10.0, network) == pytest.approx(seconds)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_holds_of_a_base_what_is_counted(ranks, tmp_path):
    """The layers' parts and the buffers of a model that is made as benchmarks/sharded.py makes it."""
    config = Config(model="tiny", base="nf4", device="cpu", lora_rank=table.RANK, engine="none", method="sft")
    asked = Namespace(layers=6, tokens=64)
    loaded = sharded.random_model(config, Thread(1, Table(ranks)), asked, str(tmp_path))
    layers = loaded.model.around.__self__.layers
    held = [tensor.untyped_storage() for layer in layers for tensor in (layer.part, layer.whole)]
    held = sum({memory.data_ptr(): memory.nbytes() for memory in held}.values())
    shape = replace(table.shape_of("tiny"), layers=6)
    counted = table.sizes_of(shape, "nf4", ranks).weights - 2 * shape.tables
    assert held == pytest.approx(counted, rel=0.02)  # with what it is rounded up by
    step = table.Step()
    assert f"1/{ranks} of the layers" in table.plan_of(shape, "nf4", 24.0, step, ranks=ranks).table()
