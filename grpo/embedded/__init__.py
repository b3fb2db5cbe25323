"""What ships with the package, for a machine without a GPU or the hub: a tiny model and a generator of word problems.

Knows nothing of training. `MODEL_DIR` holds the files that `scripts/train_embedded.py` writes.
"""

from pathlib import Path

from grpo.embedded.problems import word_problems

MODEL_DIR = Path(__file__).parent / "model"

__all__ = ["MODEL_DIR", "word_problems"]
