"""The report: one HTML file about a run, or several, made from their folders alone.

    files of a run -> reading.py: what is kept of them -> judging.py: verdict, health, suspects
                                                       -> charts.py: inline SVG       -> page.py, page.html: the file

Nothing in it was written by us but the template: completions, prompts and names are of models and of strangers, and are
escaped wherever they stand. Knows nothing of how a run is trained.
"""

from grpo.report.judging import paired_line
from grpo.report.page import write_report
from grpo.report.sink import REPORT, ReportSink

__all__ = ["REPORT", "ReportSink", "paired_line", "write_report"]
