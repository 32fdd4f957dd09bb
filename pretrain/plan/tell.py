"""How is a plan told? As text: what each setting needs, the fastest that fits in full, and its command."""

from __future__ import annotations

import dataclasses
import math
import shlex

from pretrain.plan.machines import GIB
from pretrain.plan.plan import Plan, Planned, tell_setting
from pretrain.plan.scaling import weak_scaling
from pretrain.plan.step_time import ASSUMPTIONS

# What a loader was measured with: JPEG files of 340 x 256 pixels, so many views an image of that side in pixels.
MEASURED_VIEWS, MEASURED_VIEW = 2, 224
# Images that one core reads, decodes and cuts in a second, by what the training device does of it
# (benchmarks/results/loader.json).
CUT_A_CORE = {"none": 662.0, "colours": 740.0, "all": 10234.0}
# Those of a worker of a running loader on the same files and views, which makes masks and labels too, and shares its
# batches (loader_wait.json, the slower of two spans); seconds an image that this takes, whatever the device makes.
IMAGES_A_WORKER = 397.0
BESIDE = 1 / IMAGES_A_WORKER - 1 / CUT_A_CORE["none"]
IMAGES_A_CORE = {name: 1 / (1 / rate + BESIDE) for name, rate in CUT_A_CORE.items()}
OF_LOADER = (
    f"loaders make as many images a core as of {MEASURED_VIEWS} views of {MEASURED_VIEW} px from JPEG files of 340 x "
    "256 pixels, measured on one AMD EPYC: fewer and smaller views take less time, larger files more"
)
GB = 1e9


def tell(plan: Plan, recipe: str, overrides: list[str], price: float | None) -> str:
    """The whole text, of a recipe by its name and overrides of it; ValueError when nothing fits."""
    best = plan.best()
    sections = [
        _head(plan),
        _table(plan),
        f"The fastest that fits: {tell_setting(best.setting)}\n\n" + _memory(best),
        _traffic(plan, best),
        _budget(plan, best, price),
        _scaling(plan, best),
        "Assumed:\n" + "\n".join(f"- {line}" for line in (*ASSUMPTIONS, OF_LOADER)),
        "Command:\n" + command(plan, best, recipe, overrides),
    ]
    return "\n\n".join(sections)


def _head(plan: Plan) -> str:
    run, cluster = plan.run, plan.cluster
    total = sum(plan.flops.values())
    shares = ", ".join(f"{part} {100 * value / total:.0f} %" for part, value in plan.flops.items())
    return (
        f"{run.name}: {plan.sizes.num_trained / 1e6:,.1f} million trained parameters, "
        f"{run.batch} images a step, {run.images_per_rank(cluster.gpus)} a GPU, {run.steps} steps\n"
        f"{cluster.gpus} {cluster.gpu}, {cluster.nodes} nodes, {cluster.network / GB:g} GB/s a GPU between nodes\n"
        f"Model FLOPs of a step: {total / 1e12:,.1f} T ({shares})"
    )


def _table(plan: Plan) -> str:
    rows = [("setting", "peak GiB", "room GiB", "sent GB", "waits ms", "step ms", "MFU")]
    for one in shortest(plan.planned):
        sent = sum(message.on_wire(plan.cluster.gpus) for message in one.messages)
        rows.append(
            (
                tell_setting(one.setting),
                f"{one.memory.peak / GIB:.1f}",
                f"{one.room / GIB:+.1f}",
                f"{sent / GB:.2f}",
                f"{1e3 * one.time.exposed:.0f}",
                f"{1e3 * one.time.total:.0f}" if one.fits else "does not fit",
                f"{100 * plan.mfu(one):.1f} %" if one.fits else "",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def shortest(planned: list[Planned]) -> list[Planned]:
    """The first of each file and choice of checkpointing: of its numbers of micro-batches the best."""
    found: dict[tuple[str, str], Planned] = {}
    for one in planned:
        key = one.setting.file, one.setting.checkpoint
        if key not in found or (not found[key].fits and one.room > found[key].room):
            found[key] = one
    return list(found.values())


def _memory(best: Planned) -> str:
    parts = [
        (f.name, getattr(best.memory, f.name))
        for f in dataclasses.fields(best.memory)
        if f.name != "resident"
    ]
    lines = [f"  {name:<12} {value / GIB:8.2f} GiB" for name, value in parts if value]
    lines.append(f"  {'peak':<12} {best.memory.peak / GIB:8.2f} GiB, room for {best.room / GIB:.2f} more")
    return "Memory of a GPU (host: of its rank; step: competes with activations, buffers and working):\n" + (
        "\n".join(lines)
    )


def _traffic(plan: Plan, best: Planned) -> str:
    if not best.messages:
        return "Communication: none, on one GPU"
    lines = [
        f"  {m.what:<24} {m.by:<15} {m.bytes / GB:9.3f} GB, {math.ceil(m.calls)} calls, "
        f"{m.on_wire(plan.cluster.gpus) / GB:.3f} GB sent by a GPU"
        for m in best.messages
    ]
    return "Communication of a step:\n" + "\n".join(lines)


def _budget(plan: Plan, best: Planned, price: float | None) -> str:
    time, rate = best.time, plan.images_per_second(best)
    core = IMAGES_A_CORE[plan.run.views.on_device]
    lines = [
        f"Step: {time.total:.3f} s = forward {time.forward:.3f}, backward {time.backward:.3f}, "
        f"waiting for ranks {time.exposed:.3f}, optimizer {time.optimizer:.3f}; {time.hidden:.3f} s of messages "
        "hide behind arithmetic",
        f"MFU: {100 * plan.mfu(best):.1f} %; {rate * plan.cluster.gpus:,.0f} images/s, {rate:,.0f} a GPU",
        f"Run: {plan.days(best):,.2f} days, {plan.gpu_hours(best):,.0f} GPU-hours"
        + ("" if price is None else f", {plan.gpu_hours(best) * price:,.0f} at {price:g} a GPU-hour"),
        f"Loader: {rate / core:.1f} cores a GPU at {core:,.0f} images/s a core "
        f"(views.on_device={plan.run.views.on_device}): --workers {math.ceil(rate / core)}",
    ]
    return "\n".join(lines)


def _scaling(plan: Plan, best: Planned) -> str:
    lines = [
        f"  {grown.gpus:>5} GPUs: step {grown.seconds:.3f} s, {100 * grown.efficiency:.1f} % of one node's rate"
        for grown in weak_scaling(plan, best.setting)
    ]
    return "Weak scaling of this setting, as many images a GPU (simulated):\n" + "\n".join(lines)


def command(plan: Plan, best: Planned, recipe: str, overrides: list[str]) -> str:
    """What starts the run; folders are left to fill in."""
    run, setting, cluster = plan.run, best.setting, plan.cluster
    nodes = f"--hostfile HOSTS --num_nodes {cluster.nodes} " if cluster.nodes > 1 else ""
    parts = [
        f"deepspeed {nodes}--num_gpus {cluster.gpus_a_node} pretrain/main.py --recipe {recipe}",
        "--data " + " ".join(f"{shlex.quote(name)}=DIR" for name in run.data),
        f"--ds-config ds_configs/{setting.file}.json --out DIR",
        f"--workers {math.ceil(plan.images_per_second(best) / IMAGES_A_CORE[run.views.on_device])}",
    ]
    parts += ["--guide DIR"] * run.objective.needs_guide
    parts += [f"--micro-batches {setting.micro_batches}"] * (setting.micro_batches > 1)
    parts += [shlex.join(overrides)] * bool(overrides)
    parts.append(f"--backbone.activation_checkpoint {setting.checkpoint}")
    return " \\\n    ".join(parts)
