"""Format alone is paid: right answers are counted, and earn nothing. For docs/report.md."""

from dataclasses import replace

from grpo.rewards import correctness, soft_xml, strict_xml, xml_count
from grpo.task import load_task

task = replace(
    load_task("gsm8k"),
    name="format-only",
    rewards={correctness: 0.0, strict_xml: 1.0, soft_xml: 1.0, xml_count: 1.0},
)
