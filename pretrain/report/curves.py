"""How did losses, gradients, schedules, features and speed move over the run?"""

from __future__ import annotations

import math
from collections.abc import Iterator

from pretrain.collapse import can_collapse, judged_after, scales
from pretrain.config import Run
from pretrain.objective import LABELS, Target
from pretrain.report.record import Record
from pretrain.visualize.chart import Chart, Level, Line, draw
from pretrain.visualize.markup import Html, element

SPARE_COLOURS = ("var(--extra_1)", "var(--extra_2)", "var(--extra_3)")
OWN_COLOURS = ("image_same", "image_other", "category", "text")  # CSS variables of the page
COLLAPSE = {  # title -> quantity of the log, what it says
    "Spread of the targets": (
        "std",
        "Standard deviation over the batch of unit-length features, mean over dimensions: 1/√width when spread "
        "over the sphere, 0 when all images look the same.",
    ),
    "Effective rank of the targets": (
        "effective_rank",
        "Directions that the features of a batch use: exp of the entropy of their singular values, at most "
        "the width and one less than the images.",
    ),
    "Agreement of prediction and target": (
        "agreement",
        "Mean cosine of the prediction with its own image's target, minus that with the targets of all other "
        "images: 0 when they say nothing about the image, as collapsed ones do.",
    ),
    "Entropy of the codes": (
        "code_entropy",
        "Nats of the mean assignment: ln of their number when the codes are used evenly, 0 when one takes all.",
    ),
}
BEST = {"std": "spread, 1/√width", "effective_rank": "all directions", "code_entropy": "even use"}
NOTHING_SHARED = Level("constant", 0.0)
OWN_LINES = (*(f"var(--{name})" for name in OWN_COLOURS), *SPARE_COLOURS)  # of a chart's own lines, in turn
IMAGE, LABEL, PLAIN = "var(--image_same)", "var(--category)", "var(--plain)"


def colour_of(target: str, record: Record) -> str:
    """The CSS colour that stands for a target everywhere in the page."""
    if target in OWN_COLOURS:
        return f"var(--{target})"
    others = [name for name in record.names("nats") if name not in OWN_COLOURS]
    return SPARE_COLOURS[others.index(target) % len(SPARE_COLOURS)] if target in others else PLAIN


def curves(record: Record) -> Html | None:
    """All charts of a log, grouped; None without a single logged step."""
    if not record.log:
        return None
    groups = {
        "Losses": (
            _losses(record),
            "Raw values are faint, smoothed ones strong; numbers are the last values.",
        ),
        "Gradients and their balance": (
            _gradients(record),
            "Norms of the gradient that image and label losses send to the encoder's output. "
            "λ, the weight of the label losses, follows from their moving averages.",
        ),
        "Schedules": (_schedules(record), None),
        **{title: (_collapse(record, quantity), note) for title, (quantity, note) in COLLAPSE.items()},
        "Speed and memory": (_speed(record), None),
    }
    parts = []
    for title, (charts, note) in groups.items():
        size = "wide" if len(drawn := list(charts)) in (2, 4) else "narrow"
        if drawn:
            parts.append(element("h3", title))
            if note:
                parts.append(element("p", note, class_="note"))
            parts.append(element("div", [draw(chart, size) for chart in drawn], class_=f"charts {size}"))
    return element("div", parts)


def chance_nats(record: Record, name: str) -> Level | None:
    """What a loss is worth without knowledge; None where that is unknown."""
    target = record.run.objective.targets.get(name)
    if target is None:
        return None
    if target.kind in ("pixels", "dense", "global"):
        return _chance_of_images(record.run, target)
    if target.kind == "category" and record.facts and record.facts.categories:
        count = len(record.facts.categories)
        return Level(f"chance, ln {count}", math.log(count))
    if target.kind == "text" and (pairs := texts_in_batch(record)) > 1:
        return Level(f"chance, ln {pairs}", math.log(pairs))
    return None


def _chance_of_images(run: Run, target: Target) -> Level | None:
    """The same of a target that is made of images: the likelihood decides."""
    if target.score == "boltzmann":
        mixed, slots = run.objective.input.mixed, len(run.objective.slots(target))
        candidates = run.batch // mixed * slots
        if target.kind == "dense":
            candidates *= min(run.projection.dense_samples, run.grid**2)
        return Level(f"chance, ln {candidates}", math.log(candidates))
    if target.score == "cosine" or target.keep == "decorrelation":
        return Level("nothing in common, 1", 1.0)
    return Level("predicting the mean, 0.5", 0.5) if target.score == "gaussian" else None


def texts_in_batch(record: Record) -> int:
    """Images of a global batch that carry a text, on average."""
    total = sum(source.weight for source in record.run.data.values())
    text = sum(source.weight for source in record.run.data.values() if source.supervision == "text")
    return round(record.run.batch * text / total)


def _chart(
    record: Record, title: str, unit: str, lines: dict[str, tuple[tuple[str, ...], str]], **options
) -> Chart | None:
    """A chart of the named series, those that were logged with at least one finite value."""
    is_smooth = options.pop("is_smooth", False)
    is_log = options.get("is_log", False)
    drawn = []
    for name, (path, colour) in lines.items():
        steps, values = record.series(*path)
        if any(math.isfinite(v) and (v > 0 or not is_log) for v in values):
            drawn.append(Line(name, colour, steps, values, is_smooth))
    return Chart(title, unit, drawn, **options) if drawn else None


def _present(*charts: Chart | None) -> Iterator[Chart]:
    return (chart for chart in charts if chart is not None)


def _losses(record: Record) -> Iterator[Chart]:
    for name in record.names("nats"):
        chance = chance_nats(record, name)
        levels = [chance] if chance else []
        unit = _scored(record, name)
        lines = {name: (("nats", name), colour_of(name, record))}
        yield from _present(_chart(record, name, unit, lines, levels=levels), _by_source(record, name))


def _by_source(record: Record, target: str) -> Chart | None:
    """A target's loss on each source, where several have it."""
    of_source = {source: ("nats_by_source", target, source) for source in record.run.data}
    told = [source for source, path in of_source.items() if record.series(*path)[0]]
    if len(told) < 2:
        return None
    lines = {source: (of_source[source], OWN_LINES[i % len(OWN_LINES)]) for i, source in enumerate(told)}
    return _chart(record, f"{target}, by source", "nats, mean over the images of a source", lines)


def _scored(record: Record, name: str) -> str:
    target = record.run.objective.targets.get(name)
    if target is None:
        return "nats"
    if target.kind in LABELS:
        return f"nats, mean over images with a {name}"
    if target.kind == "global" or target.score == "boltzmann":
        return "nats, mean over images" if target.kind == "global" else "nats, mean over sampled patches"
    return f"nats a dimension, mean over {'hidden' if target.scored == 'hidden' else 'all'} patches"


def _gradients(record: Record) -> Iterator[Chart]:
    branches = {
        "image": (("grad_norm_image",), IMAGE),
        "label": (("grad_norm_label",), LABEL),
    }
    return _present(
        _chart(record, "Gradient at the encoder's output", "norm, log scale", branches, is_log=True),
        _chart(
            record, "λ, weight of the label losses", "log scale", {"λ": (("lambda",), PLAIN)}, is_log=True
        ),
        _chart(
            record,
            "Gradient of all parameters",
            "norm, log scale",
            {"all": (("grad_norm",), PLAIN)} | _lines(record, "grad_norm_by_part"),
            is_log=True,
        ),
    )


def _lines(record: Record, group: str) -> dict[str, tuple[tuple[str, ...], str]]:
    """A line for each quantity of a group of the log."""
    names = record.names(group)
    return {name: ((group, name), OWN_LINES[i % len(OWN_LINES)]) for i, name in enumerate(names)}


def _schedules(record: Record) -> Iterator[Chart]:
    return _present(
        _chart(record, "Learning rate", "", {"rate": (("lr",), PLAIN)}, is_smooth=True, from_zero=True),
        _chart(record, "Teacher momentum", "", {"momentum": (("momentum",), PLAIN)}, is_smooth=True),
    )


def _collapse(record: Record, quantity: str) -> Iterator[Chart]:
    """One quantity of every target of which it was measured, with its best value and its limit."""
    after = judged_after(record.run)
    for name in record.names("collapse"):
        *_, (step, last) = record.measured(name).items()
        levels = [NOTHING_SHARED]
        if scale := scales(last).get(quantity):
            levels = [Level(BEST[quantity], scale.best)]
            if can_collapse(record.run, name):
                limit = "collapsed below" if step > after else f"limit after step {after:,}"
                levels.append(Level(limit, scale.limit))
        sizes = "codes" if quantity == "code_entropy" else "width"
        unit = f"{sizes} {last.get(sizes, 0):,}, {last['rows']:,} images"
        lines = {name: (("collapse", name, quantity), colour_of(name, record))}
        yield from _present(_chart(record, name, unit, lines, levels=levels, from_zero=True))


def _speed(record: Record) -> Iterator[Chart]:
    yield from _present(
        _chart(
            record, "Throughput", "images per second", {"": (("images_per_second",), PLAIN)}, from_zero=True
        )
    )
    yield from _present(
        _scaled(record, "Model FLOP/s utilisation", "percent of the peak", {"": ("mfu",)}, 100),
        _scaled(
            record,
            "Time of a step",
            "milliseconds by part",
            {name.replace("_", " "): ("seconds", name) for name in record.names("seconds")},
            1e3,
        ),
        _scaled(
            record,
            "Memory, most of any rank",
            "GiB",
            {name: ("memory_bytes", name) for name in record.names("memory_bytes")},
            2**-30,
        ),
    )


def _scaled(
    record: Record, title: str, unit: str, paths: dict[str, tuple[str, ...]], factor: float
) -> Chart | None:
    """A chart from zero of the named series, those with at least one finite value, times a factor."""
    lines = []
    for i, (name, path) in enumerate(paths.items()):
        steps, values = record.series(*path)
        if any(map(math.isfinite, values)):
            colour = PLAIN if len(paths) == 1 else OWN_LINES[i % len(OWN_LINES)]
            lines.append(Line(name, colour, steps, [factor * value for value in values]))
    return Chart(title, unit, lines, from_zero=True) if lines else None
