"""Did the run do what it should? Title, figures of the run, and the verdict from log and evaluation."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from datetime import UTC, datetime

from pretrain.collapse import STEPS_IN_A_ROW, can_collapse, judged_after, replay, scales, too_short
from pretrain.config import Run
from pretrain.logged import is_of_gpus
from pretrain.report.accuracy import headline
from pretrain.report.record import Record
from pretrain.visualize.markup import Child, Html, element
from pretrain.visualize.numbers import TIE, duration, magnitude, percent, significant

SIGNS = {True: "✓", False: "✗", None: "–"}
WORDS = {True: "holds", False: "fails", None: "unknown"}


@dataclass(frozen=True)
class Verdict:
    """One claim about the run; `holds` is None where nothing was measured."""

    holds: bool | None
    claim: str
    evidence: str


def header(record: Record, title: str) -> Html:
    """Title line and the figures of the run."""
    facts = [element("div", element("dt", name), element("dd", value)) for name, value in _facts(record)]
    run = record.run
    subtitle = f"{run.name} · {run.backbone.size} · {run.views.size} px"
    return element(
        "header",
        element("p", "M3I pre-training", class_="kicker"),
        element("h1", title),
        element("p", subtitle, class_="subtitle"),
        element("dl", facts, class_="facts"),
    )


def _facts(record: Record) -> list[tuple[str, Child]]:
    run, last = record.run, (record.log[-1] if record.log else {})
    step = last.get("step") or max(record.checkpoints, default=0)
    facts: list[tuple[str, Child]] = [
        ("steps", f"{step:,} of {run.steps:,}"),
        ("images seen", f"{step * run.batch:,}"),
        ("batch", f"{run.batch:,} images"),
    ]
    if record.facts:
        averaged, backbone = num_parameters(run, record)
        facts += [
            ("backbone", f"{magnitude(backbone)} parameters"),
            ("with heads and text", magnitude(averaged)),
        ]
    if seconds := working_seconds(record):
        facts.append(("training time", duration(seconds)))
    _, rates = record.series("images_per_second")
    if rates := [rate for rate in rates if math.isfinite(rate)]:
        facts.append(("images per second", significant(statistics.median(rates))))
    _, shares = record.series("mfu")
    if shares := [share for share in shares if math.isfinite(share)]:
        facts.append(("model FLOP/s utilisation", percent(statistics.median(shares))))
    if "gpu_hours" in last and is_of_gpus(last):
        facts.append(("GPU-hours", significant(last["gpu_hours"])))
    state = record.state
    if hardware := state.get("hardware") or record.evaluation.get("hardware"):
        facts.append(("hardware" if state.get("hardware") else "evaluated on", str(hardware)))
    if state.get("world"):
        precision = str(state.get("dtype", "")).removeprefix("torch.")
        facts.append(
            (
                "engine",
                f"ZeRO-{state.get('stage')}, {state['world']} rank{'s' * (state['world'] != 1)}, {precision}",
            )
        )
    if state.get("commit"):
        commit, _, changes = str(state["commit"]).partition("+")
        facts.append(("commit", f"{commit[:12]}{' + changes' if changes else ''}"))
    if last.get("time"):
        facts.append(("finished" if step >= run.steps else "last log line", _date(last["time"])))
    return facts


def num_parameters(run: Run, record: Record) -> tuple[int, int]:
    """Parameters of the student without decoders, and of its image encoder alone; nothing is allocated.

    ValueError for a recipe of more than the newest checkpoint explains.
    """
    from pretrain.checkpoint.towers import undrawn_towers

    assert record.facts is not None, "they are those of the newest checkpoint"
    towers = undrawn_towers(record.checkpoints[max(record.checkpoints)], run, record.facts)
    return sum(p.numel() for p in towers.parameters()), sum(p.numel() for p in towers.encoder.parameters())


def working_seconds(record: Record) -> float:
    """Time spent in steps: every logged step time holds for the steps since the line before it."""
    steps, seconds = record.series("step_seconds")
    finite = [(step, second) for step, second in zip(steps, seconds, strict=True) if math.isfinite(second)]
    total, before = 0.0, 0.0
    for step, second in finite:
        total += (step - before) * second
        before = step
    return total


def verdicts(record: Record) -> list[Verdict]:
    """Evaluation against its start and chance, collapse, and whether all losses fell."""
    return [*_evaluated(record), _collapse(record), _losses(record), *_complete(record)]


def verdict_box(record: Record) -> Html:
    """The verdicts as a list; signs and words say it beside colours."""
    items = [
        element(
            "li",
            element("span", SIGNS[v.holds], class_="sign", aria_label=WORDS[v.holds], role="img"),
            element("span", element("strong", v.claim), element("span", v.evidence, class_="evidence")),
            class_={True: "holds", False: "fails", None: "unknown"}[v.holds],
        )
        for v in verdicts(record)
    ]
    return element("section", element("h2", "Verdict"), element("ul", items), class_="verdict", id="verdict")


def _evaluated(record: Record) -> list[Verdict]:
    found = headline(record)
    if not found:
        told = f"that of evaluation.json {record.left_out}" if record.left_out else "not run yet"
        return [Verdict(None, "Evaluation", told)]
    verdicts = []
    for move in found:
        after, before = move.after, move.before
        is_sure, told = None, "no interval, so that nothing tells how sure it is"
        if after.interval is not None:
            low, high = after.interval
            is_sure, told = low > move.chance, f"95{TIE}% interval {100 * low:.1f} to {percent(high)}"
        end = f"chance {percent(move.chance)}; {told}"
        if before is None:
            claim = f"{move.title}: {percent(after.accuracy)}"
            verdicts.append(Verdict(is_sure, claim, f"one checkpoint only; {end}"))
            continue
        better = is_sure if after.accuracy > before.accuracy else False
        claim = f"{move.title}: {percent(before.accuracy)} → {percent(after.accuracy)}"
        verdicts.append(Verdict(better, claim, end))
    return verdicts


def _collapse(record: Record) -> Verdict:
    """The verdict that the monitor gave: which targets collapsed, or the lowest values that count."""
    names = record.names("collapse")
    if not names:
        return Verdict(None, "Collapse", "the log holds no measure of the features")
    if not any(can_collapse(record.run, name) for name in names):
        return Verdict(None, "Collapse", "none is possible: no target is of features that training changes")
    watch = replay(record.run, record.log)
    if watch.collapsed:
        told = "; ".join(map(str, watch.collapsed.values()))
        return Verdict(False, f"Collapsed: {', '.join(watch.collapsed)}", told)
    told = []
    for name in names:
        judged = [v for step, v in record.measured(name).items() if watch.judges(name, step)]
        if len(judged) >= STEPS_IN_A_ROW:
            lowest = (
                f"{quantity.replace('_', ' ')} {significant(min(v[quantity] for v in judged))} "
                f"(limit {significant(scale.limit)})"
                for quantity, scale in scales(judged[-1]).items()
            )
            told.append(f"{name} {', '.join(lowest)}")
    if not told:
        after = f"fewer than {STEPS_IN_A_ROW} steps are logged after step {judged_after(record.run):,} yet"
        return Verdict(None, "Collapse", too_short(record.run) or after)
    return Verdict(True, "No collapse", f"lowest after the warm-up: {'; '.join(told)}")


def _losses(record: Record) -> Verdict:
    """Mean of the last tenth of every loss against its first tenth."""
    told, fell = [], []
    for name in record.names("nats"):
        _, values = record.series("nats", name)
        tenth = max(len(values) // 10, 1)
        if len(values) < 2:
            continue
        first, last = statistics.fmean(values[:tenth]), statistics.fmean(values[-tenth:])
        fell.append(last < first)
        told.append(f"{name} {significant(first)} → {significant(last)}")
    if not fell:
        return Verdict(None, "Losses", "fewer than two logged steps")
    rose = sum(not f for f in fell)
    claim = "All losses fell" if not rose else f"{rose} of {len(fell)} losses did not fall"
    return Verdict(not rose, claim, f"nats, first → last tenth of the run: {', '.join(told)}")


def _complete(record: Record) -> list[Verdict]:
    """A note when the run is not at its end or skipped steps."""
    found = []
    last = record.log[-1] if record.log else {}
    step = last.get("step") or max(record.checkpoints, default=0)
    if step < record.run.steps:
        found.append(Verdict(None, "Not finished", f"{step:,} of {record.run.steps:,} steps are logged"))
    if last.get("skipped_steps"):
        found.append(Verdict(False, "Steps were skipped", f"{last['skipped_steps']} that the guard refused"))
    return found


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
