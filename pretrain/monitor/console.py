"""How does a logged step read on a console? One line, and now and then a block with all of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pretrain.config import Run
from pretrain.logged import is_of_gpus
from pretrain.visualize.numbers import TIE, duration


class Unbroken:
    """A stream whose disk may be full: what finds no room is lost, and whoever writes goes on."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __eq__(self, other: object) -> bool:
        """A progress bar is cleared before lines that go to its own terminal, which it knows by that."""
        return self._stream == getattr(other, "_stream", other)

    def __hash__(self) -> int:
        return hash(self._stream)


def line(record: Mapping[str, Any], run: Run) -> str:
    """Losses, gradient, speed and the time left of a record of the log."""
    nats = "  ".join(f"{name} {value:.4f}" for name, value in record["nats"].items())
    wait = record["seconds"]["data_wait"] / max(record["step_seconds"], 1e-9)
    return (
        f"step {record['step']}/{run.steps}  {nats}  |g| {record['grad_norm']:.3g}  lambda {record['lambda']:.3g}  "
        f"lr {record['lr']:.2e}  {record['images_per_second']:.4g} img/s{_flops(record)}  wait {wait:.0%}  "
        f"{duration(record['eta_seconds']).replace(TIE, ' ')} left"
    )


def block(record: Mapping[str, Any]) -> str:
    """Where time, gradient and memory went, by source and target, and what it costs."""
    step = max(record["step_seconds"], 1e-9)
    parts = record["seconds"].items()
    rows = {
        "a step": f"{record['step_seconds']:.3g} s = "
        + " + ".join(f"{name.replace('_', ' ')} {s / step:.1%}" for name, s in parts if s / step >= 5e-4),
        "memory": ", ".join(f"{name} {n / 2**30:.2f} GiB" for name, n in record["memory_bytes"].items()),
        "|g| by part": _numbers(record.get("grad_norm_by_part", {})),
        "|g| at the encoder's output": _numbers(record.get("grad_norm_by_target", {})),
        "nats by source": "; ".join(
            f"{target}: {_numbers(of_source)}"
            for target, of_source in record.get("nats_by_source", {}).items()
        ),
    }
    if is_of_gpus(record):
        rows["GPU-hours"] = f"{record['gpu_hours']:.4g}, {record['gpu_hours_left']:.4g} to go"
    if "cost" in record:
        rows["cost"] = f"{record['cost']:.4g}, {record['cost_left']:.4g} to go"
    if slow := record.get("slowest"):
        rows["SLOWEST"] = (
            f"rank {slow['rank']} on {slow['host']}: {slow['seconds']:.3g} s of its own a step, "
            f"median {slow['median_seconds']:.3g} s"
        )
    return "\n".join(f"    {name}: {text}" for name, text in rows.items() if text)


def _flops(record: Mapping[str, Any]) -> str:
    if "teraflops_per_gpu" not in record:
        return ""
    share = f", {record['mfu']:.1%} MFU" if "mfu" in record else ""
    return f"  {record['teraflops_per_gpu']:.3g} TFLOP/s{share}"


def _numbers(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.3g}" for name, value in values.items())
