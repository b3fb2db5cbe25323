"""Descriptions of cities, paid for what they mention. The reward comes from a package and is named, not imported."""

from grpo import Config, Task

CITIES = {
    "Lima": ["coast", "Peru"],
    "Quito": ["Andes", "Ecuador"],
    "La Paz": ["Andes", "Bolivia"],
    "Oslo": ["fjord", "Norway"],
}


def rows(split, data):
    for city, keywords in CITIES.items():
        yield {"city": city, "keywords": keywords, "answer": " and ".join(keywords)}


def prompt(row):
    return [{"role": "user", "content": f"What is {row['city']} known for? One sentence."}]


task = Task(
    name="cities",
    rows=rows,
    prompt=prompt,
    rewards={"mentions": 1.0, "repetition": 0.2},
    gold="It is known for {answer}.",
    solved=("mentions", 1.0),
    data="made up",
    held_out=1,
    config=Config(model="Qwen/Qwen2.5-1.5B-Instruct"),
    embedded={"model": "embedded", "base": "float32"},
)
