"""Draws the report of a run again: report.md, report.html and loss.png in its folder.

    gpt2-triton report runs/gpt2_124m --gpu_hour_price 2.5

Training does this itself, at checkpoints and when it ends; this is for another price, and for runs
that were killed.
"""

from pathlib import Path

from gpt2.cli import parse, starting
from gpt2.options import ReportConfig


def main() -> None:
    with starting():
        config = parse(ReportConfig, __doc__)
        from gpt2.train.report import write_report
    run = Path(config.run)
    if not (run / "metrics.jsonl").exists():
        raise OSError(f"{run}: no run here: it has no metrics.jsonl")
    write_report(run, gpu_hour_price=config.gpu_hour_price)
    print(f"{run / 'report.html'}, {run / 'report.md'}")
