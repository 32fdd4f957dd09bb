"""One self-contained page about a run: `python -m pretrain.report RUN` writes RUN/report.html."""
