"""What did some steps do, operator by operator? A trace and a table, of rank 0."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from pretrain.collectives import rank
from pretrain.intact import write_text

TRACE = "trace"  # folder beside the log
ROWS = 40  # of the table


class Window:
    """Follows steps `first` to `last` by torch.profiler, and leaves OUT/trace/steps_F-L.json.gz, for Perfetto or
    chrome://tracing, and OUT/trace/steps_F-L.txt, the operators by the time that they took themselves.

    The parts of a step (pretrain/clock.py) are ranges of the trace. Without `steps` it does nothing. ValueError when
    not all of them are steps of the run; where a run goes on behind their first it does nothing.
    """

    def __init__(self, steps: tuple[int, int] | None, out: Path, first_step: int, run_steps: int) -> None:
        self._steps, self._folder = steps, out / TRACE
        self._profile: profile | None = None
        if steps is not None and not 0 < steps[0] <= steps[1] <= run_steps:
            raise ValueError(
                f"--profile {steps[0]}:{steps[1]} must lie within steps 1 to {run_steps} of the run: name others, or "
                "leave it out"
            )
        if steps is not None and first_step >= steps[0]:  # the same command goes on after them
            self._steps = None

    def before(self, step: int) -> None:
        """Opens the window where it begins with step `step`, counted from 1, of which a refused one is made again."""
        if self._steps is None or step != self._steps[0] or self._profile is not None or rank():
            return
        on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profile = profile(activities=[ProfilerActivity.CPU, *on_gpu], acc_events=True)
        self._profile.start()

    def after(self, step: int) -> Path | None:
        """Closes the window where it ends with step `step`; the trace that was written then."""
        is_last = self._steps is not None and step == self._steps[1]
        return self.close() if is_last else None

    def close(self) -> Path | None:
        """Writes what an open window saw, also where the run ends before it."""
        if self._profile is None:
            return None
        seen, self._profile = self._profile, None
        seen.stop()
        first, last = self._steps
        trace = self._folder / f"steps_{first}-{last}.json.gz"
        by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            seen.export_chrome_trace(str(trace))
            write_text(trace.with_suffix("").with_suffix(".txt"), seen.key_averages().table(by, ROWS))
        except OSError as error:
            warnings.warn(f"NOT WRITTEN: {trace} ({error}): training goes on without it", stacklevel=2)
            return None
        return trace
