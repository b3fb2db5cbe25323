"""What a run leaves behind and shows: step lines, metrics, completions, TensorBoard events, curves."""

from grpo.record.console import Console, show_sample
from grpo.record.curves import draw_curves
from grpo.record.recorder import Recorder

__all__ = ["Console", "Recorder", "draw_curves", "show_sample"]
