"""Which targets of a run's objective does its data serve, and which are left out of the training? No torch."""

from __future__ import annotations

from pretrain.config import Run
from pretrain.facts import DataFacts
from pretrain.objective import Target


def active_targets(run: Run, facts: DataFacts) -> dict[str, Target]:
    """The objective's targets that the data can serve; ValueError when that leaves none."""
    without = _without_labels(run, facts)
    active = {name: target for name, target in run.objective.targets.items() if name not in without}
    if not active:
        raise ValueError(
            f"none of the targets {sorted(run.objective.targets)} has labels in the data: give a source with "
            "categories, captions or tags, or an objective that predicts images"
        )
    return active


def _without_labels(run: Run, facts: DataFacts) -> dict[str, Target]:
    """The objective's targets whose labels no source gives."""
    has = {"category": bool(facts.categories), "text": bool(facts.vocab_size), "tags": bool(facts.tags)}
    targets = run.objective.targets.items()
    return {name: target for name, target in targets if not has.get(target.kind, True)}


def left_out(run: Run, facts: DataFacts) -> str | None:
    """The line that names the targets which nothing in the data serves, and why; None where all are served."""
    without = _without_labels(run, facts)
    if not without:
        return None
    told = ", ".join(f"{name} (no source has supervision={t.kind!r})" for name, t in without.items())
    sources = {name: source.supervision for name, source in run.data.items()}
    return f"LEFT OUT of the objective of {run.name}: {told}; the others are trained. Sources: {sources}"
