"""The embedded default: the word problems are right and reproducible, the shipped model is what it claims to be."""

import re
from random import Random

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.embedded import MODEL_DIR, word_problems
from grpo.embedded.problems import fill, split_of
from grpo.embedded.templates import TEMPLATES
from grpo.rewards import correctness

CALCULATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def test_at_least_forty_templates_of_two_to_four_steps():
    assert len(TEMPLATES) >= 40
    assert {len(template.steps) for template in TEMPLATES} == {2, 3, 4}
    assert all(len(template.phrasings) >= 2 for template in TEMPLATES)


@pytest.mark.parametrize("index", range(len(TEMPLATES)))
def test_every_calculation_of_a_template_is_right(index):
    """Each `a op b = c` is worked out anew, and each number in it is in the question, a result, or a known factor."""
    for seed in range(20):
        row = fill(TEMPLATES[index], Random(seed), level=1 + seed % 3)
        solution, answer = row["answer"].split("\n#### ")
        known = {2, *map(int, re.findall(r"\d+", row["question"]))}
        calculations = CALCULATION.findall(solution)
        assert len(calculations) == len(solution.split("\n")) == len(TEMPLATES[index].steps)
        for left, sign, right, result in calculations:
            a, b, c = int(left), int(right), int(result)
            assert {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": b * c == a}[sign], row
            assert c >= 2 and {a, b} <= known, row
            known.add(c)
        assert calculations[-1][3] == answer
        assert not re.search(r"[{}\[\]]", row["question"] + row["answer"]), "a slot was left open"


def test_problems_are_a_pure_function_of_their_arguments():
    problems = word_problems("train", 50, seed=3, level=2)
    assert problems == word_problems("train", 50, seed=3, level=2)
    assert problems[:20] == word_problems("train", 20, seed=3, level=2)
    assert problems != word_problems("train", 50, seed=4, level=2)
    assert problems != word_problems("train", 50, seed=3, level=1)


def test_train_and_test_are_disjoint_whatever_the_seed():
    train = {row["question"] for seed in range(3) for row in word_problems("train", 1000, seed)}
    test = {row["question"] for seed in range(3) for row in word_problems("test", 1000, seed)}
    assert len(train) > 2900 and len(test) > 2900 and not train & test
    assert {split_of(question) for question in test} == {"test"}


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="validation"):
        word_problems("validation")


def test_higher_levels_have_larger_numbers_and_more_steps():
    def largest_and_fewest_steps(level):
        solutions = [row["answer"] for row in word_problems("train", 300, level=level)]
        numbers = [int(n) for solution in solutions for n in re.findall(r"\d+", solution)]
        return max(numbers), min(solution.count("\n") for solution in solutions)

    (small, two), (larger, three), (largest, _) = map(largest_and_fewest_steps, (1, 2, 3))
    assert small < larger < largest and two == 2 and three == 3


def test_the_model_and_its_folder_are_small():
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    assert model.config.architectures == ["Qwen3ForCausalLM"]
    assert model.num_parameters() <= 5_000_000
    assert model.config.max_position_embeddings >= 1024
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) <= 10 * 2**20


@pytest.mark.parametrize(
    "text",
    ["", " ", "a  b\t\r\n\n c ", "🎉 naïve 日本語 ½", "x <<48/2=24>>24", "\x00\x7f", "\u200b\ufeff", "$1,080.50 don't"],
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_are_tokens_of_their_own(tokenizer):
    assert [tokenizer.decode(token) for token in tokenizer("12 * 345")["input_ids"]] == [
        "1", "2", " *", " 3", "4", "5",
    ]  # fmt: skip


def test_the_words_of_the_problems_are_single_tokens(tokenizer):
    text = " ".join(row["question"] for row in word_problems("test", 100))
    words = re.findall(r" [A-Za-z]+", text)
    assert sum(len(tokenizer(word)["input_ids"]) == 1 for word in words) > 0.99 * len(words)


def test_the_chat_template_ends_where_the_assistant_begins(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_answer_column_is_gold_for_the_correctness_reward():
    for row in word_problems("test", 50):
        number = row["answer"].split("#### ")[1]
        assert correctness(f"<answer>\n{number}\n</answer>", row["answer"]) == 2.0
