"""scripts/write_scaling_table.py: what is counted from a shape is what transformers' model and an adapter have."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "benchmarks")]

import write_scaling_table as table  # noqa: E402
from shapes import SHAPES  # noqa: E402

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
