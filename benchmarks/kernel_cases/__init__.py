"""The benchmark cases, a file a kernel, in the order in which they run and are reported.
Knows nothing of how contests are run or reported.
"""

FILES = (
    "linear_logprob",
    "norms",
    "rotary",
    "gates",
    "attention",
    "nf4",
    "nf4_product",
    "grouped",
    "lora_inference",
    "lora",
    "mlp",
)
