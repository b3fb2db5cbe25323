"""Rollouts: prompts in, groups of sampled completions out."""

from grpo.rollout.engine import Engine

__all__ = ["Engine"]
