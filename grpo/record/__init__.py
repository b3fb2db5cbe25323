"""What a run leaves behind and shows: step lines, files of JSON lines, TensorBoard events, curves, trackers."""

from grpo.record.console import Console, show_sample
from grpo.record.curves import draw_curves
from grpo.record.recorder import Recorder
from grpo.record.sinks import Sink
from grpo.record.tokens import TokenTrace

__all__ = ["Console", "Recorder", "Sink", "TokenTrace", "draw_curves", "show_sample"]
