"""What a reward may return, and what it is taken for."""

import itertools
import math
from collections import deque
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas
import pytest
import torch
from scored import error_of, make_group, quiet, scored

from grpo.errors import UserError
from grpo.rewards.samples import copies


class Half:
    def __float__(self):
        return 0.5


@pytest.mark.parametrize(
    "value",
    [
        *(True, -2, 0.25, None, Fraction(1, 4), Decimal("0.25"), Half()),
        *(np.float32(0.25), np.float16(0.25), np.bool_(True), np.int64(3), np.array(0.25)),
        *(torch.tensor(0.5), torch.tensor(0.5, requires_grad=True), torch.tensor([0.5]), torch.tensor([[0.5]])),
        *(
            torch.tensor(0.5, dtype=dtype)
            for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn)
        ),
        *(torch.tensor(True), torch.tensor(3)),
    ],
)
def test_whatever_is_a_number_counts_as_it_does_in_torch(value):
    def constant(completion):
        return value

    def constants(completions):
        return [value] * len(completions)

    # What TRL makes of a reward's list.
    plain = value.item() if isinstance(value, (torch.Tensor, np.ndarray)) else value
    expected = torch.tensor([torch.nan if plain is None else plain] * 2, dtype=torch.float32)
    group = scored({constant: 1.0, constants: 1.0})[0]
    for part in group.parts.values():
        assert torch.equal(part.nan_to_num(9), expected.nan_to_num(9))


@pytest.mark.parametrize(
    "container",
    [
        *(list, tuple, np.array, torch.tensor, iter, deque, pandas.Series),
        *(lambda values: map(float, values), lambda values: (value for value in values)),
        *(
            lambda values: dict(enumerate(values)).values(),
            lambda values: pandas.Series(values, index=[9] * len(values)),
        ),
        *(
            lambda values, d=dtype: torch.tensor(values, dtype=d)
            for dtype in (torch.bfloat16, torch.float16, torch.int64)
        ),
        *(lambda values: torch.tensor(values)[:, None], lambda values: [torch.tensor([value]) for value in values]),
        *(lambda values: torch.tensor(values, requires_grad=True), lambda values: np.array(values, dtype=object)),
    ],
)
def test_whatever_gives_numbers_in_order_counts(container):
    def lengths(completions):
        return container([float(len(completion)) for completion in completions])

    async def later(completions):
        return lengths(completions)

    for reward in (lengths, later):
        assert [group.rewards.tolist() for group in scored({reward: 1.0})] == [[1, 4], [0, 1, 2]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_number_is_finite_or_not_whatever_it_is_held_in(dtype, value):
    def one(completion):
        return torch.tensor(value, dtype=dtype)

    def batch(completions):
        return torch.full((len(completions),), value, dtype=dtype)

    def batch_of_numpy(completions):
        return torch.full((len(completions),), value, dtype=torch.float32).numpy()

    for reward in (one, batch, batch_of_numpy):
        assert "A reward is a finite number" in error_of({reward: 1.0})


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("1.0", "'1.0' (str of length 3)"),
        (math.nan, "nan (float)"),
        (math.inf, "inf (float)"),
        (1e300, "1e+300 (float)"),
        (10**400, "(int)"),
        ([1.0], "[1.0] (list of length 1)"),
        (torch.ones(2), "(Tensor of length 2)"),
        ({}, "{} (dict of length 0)"),
        (1j, "1j (complex)"),
        (np.complex64(1), "(complex64)"),
        (torch.tensor(1 + 0j), "(Tensor)"),
        (b"1", "b'1' (bytes of length 1)"),
        (pandas.NA, "<NA> (NAType)"),
        (Decimal("Infinity"), "(Decimal)"),
        (np.array([1.0, 2.0]), "(ndarray of length 2)"),
    ],
)
def test_anything_else_is_an_error_that_says_what_and_where(value, told):
    def odd(completion):
        return value if completion == "6" else 0.0

    def odd_batch(completions):
        return [odd(completion) for completion in completions]

    for reward, name in ((odd, "odd"), (odd_batch, "odd_batch")):
        message = error_of({reward: 1.0})
        assert message.startswith(f"Reward `{name}` returned ")
        assert told in message
        assert "row 9, completion '6'" in message
        assert "finite number" in message


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        ([1.0], "[1.0] (list of length 1)"),
        ([1.0] * 6, "(list of length 6)"),
        (1.0, "1.0 (float)"),
        (None, "None (NoneType)"),
        ("12345", "'12345' (str of length 5)"),
        (dict.fromkeys(range(5), 1.0), "(dict of length 5)"),
        (torch.tensor(1.0), "tensor(1.) (Tensor)"),
        (torch.ones(2, 5), "(Tensor of length 2)"),
        (b"12345", "(bytes of length 5)"),
        ({1.0, 2.0, 3.0, 4.0, 5.0}, "(set of length 5)"),
        (itertools.count(), "(list of length 6)"),
        (map(float, "1234"), "(list of length 4)"),
    ],
)
def test_a_batch_must_come_back_as_a_list_of_its_length(returned, told):
    def batch(completions):
        return returned

    message = error_of({batch: 1.0})
    assert told in message
    assert "here 5" in message
    assert "rows 7, 9" in message


class Leaves:
    """Everything that is asked of it ends the program, as a success."""

    def leave(self, *given):
        raise SystemExit(0)

    __float__ = __repr__ = __len__ = __reduce_ex__ = __deepcopy__ = leave


def test_a_value_that_ends_the_program_is_no_number():
    def one(completion):
        return Leaves()

    def batch(completions):
        return Leaves()

    for reward in (one, batch):
        with pytest.raises(UserError, match=rf"`{reward.__name__}` returned something that cannot be shown"):
            scored({reward: 1.0})
    prompts = copies([Leaves()])
    assert isinstance(prompts[0], Leaves)


def test_a_coroutine_that_nobody_awaits_is_told():
    async def right(completion, answer):
        return 1.0

    groups = [make_group(7, ["5"])]  # one: only the first is told, and closed
    assert "It must be awaited: write the reward" in error_of({quiet(right): 1.0}, groups)
