"""The trained model: loading, projections, forward passes, the update."""

from grpo.policy.load import load_model, load_tokenizer
from grpo.policy.policy import Policy

__all__ = ["Policy", "load_model", "load_tokenizer"]
