"""A reward that a package offers: once it is installed, every task may name it `mentions`."""

import re


def mentions(completion: str, keywords: list[str]) -> float:
    """0 to 1: the share of the row's keywords that the completion mentions, as whole words, whatever their case.

    Range: 0 to 1.

    >>> mentions("Lima lies on the coast.", ["coast", "desert"])
    0.5
    """
    words = set(re.findall(r"\w+", completion.lower()))
    return sum(keyword.lower() in words for keyword in keywords) / len(keywords)
