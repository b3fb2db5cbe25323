"""The names of the rewards that ship: what a task may name without saying where it is. Knows nothing else.

pyproject.toml offers them as entry points too. They stand here because an installation that was made before a reward
was added (`pip install -e`, then a newer commit) does not know of it.
"""

SHIPPED = (
    "correctness",
    "integer",
    "strict_xml",
    "soft_xml",
    "xml_count",
    "exact_match",
    "similarity",
    "math",
    "number",
    "strict_number",
    "choice",
    "code",
    "code_share",
    "think_format",
    "think_answer",
    "length",
    "repetition",
)
