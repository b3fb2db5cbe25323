"""What a Config refuses: values of another type, choices that do not exist, numbers that cannot be."""

import math

import pytest

from grpo.config import Config, check_type
from grpo.errors import UserError


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"base": "fp32"}, "base is 'fp32' (str). It must be one of 'float32', 'bf16', 'nf4'."),
        ({"engine": "vlm"}, "one of 'auto', 'vllm', 'torch'"),
        ({"advantage": "gpro"}, "advantage is 'gpro'"),
        ({"correction": None}, "correction is None (NoneType)"),
        ({"base": ["nf4"]}, "base is ['nf4'] (list)"),
        ({"steps": 2.5}, "steps is 2.5 (float). It must be a whole number (int)."),
        ({"steps": "10"}, "steps is '10' (str)"),
        ({"seed": True}, "seed is True (bool)"),
        ({"learning_rate": "1e-5"}, "learning_rate is '1e-5' (str). It must be a number."),
        ({"temperature": True}, "temperature is True"),
        ({"dynamic_sampling": 1}, "dynamic_sampling is 1 (int). It must be True or False."),
        ({"model": None}, "model is None (NoneType). It must be text (str)."),
    ],
)
def test_values_of_the_wrong_kind_are_refused(fields, told):
    with pytest.raises(UserError) as caught:
        Config(**fields)
    assert told in str(caught.value)


def test_an_int_is_a_number_and_a_union_takes_either():
    assert Config(learning_rate=1, weight_decay=0).learning_rate == 1
    check_type("limit", None, int | None)
    with pytest.raises(UserError, match=r"It must be a whole number \(int\) or None"):
        check_type("limit", "3", int | None)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 10**400])
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "lora_alpha", "reward_timeout", "temperature",
                                  "kl_coef", "kv_cache_gib", "top_entropy", "correction_cap"])  # fmt: skip
def test_numbers_are_finite(name, value):
    with pytest.raises(UserError, match=rf"{name} is .*\. Use a finite number\."):
        Config(**{name: value})


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"off_policy_mask": math.nan}, "off_policy_mask is nan"),
        ({"off_policy_mask": -1.0}, "off_policy_mask is -1.0. Use 0 or more."),
        ({"dual_clip": math.nan}, "dual_clip is nan"),
        ({"reward_timeout": 1e12}, "at most 1e+09 seconds"),
    ],
)
def test_numbers_that_cannot_be(fields, told):
    with pytest.raises(UserError) as caught:
        Config(**fields)
    assert told in str(caught.value)


def test_infinity_is_taken_where_it_means_no_bound():
    assert Config(dual_clip=math.inf, off_policy_mask=math.inf) == Config()
