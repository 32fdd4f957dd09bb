"""What must somebody know who finds the exported files? The README.md beside them."""

from __future__ import annotations

from pathlib import Path

from pretrain import provenance
from pretrain.evaluate.result import table
from pretrain.export.agreement import Agreement, summary
from pretrain.export.keys import Keys
from pretrain.export.trained import Trained

ROOT = Path(__file__).resolve().parent.parent.parent


def text(
    trained: Trained,
    name: str,
    keys: dict[str, Keys],
    proof: list[Agreement],
    how_to_load: str,
    unproven: str = "",
) -> str:
    """The model card in Markdown."""
    run = trained.run
    sections = {
        f"{run.backbone.size}, M3I pre-training, {name} format": _summary(trained),
        "How to load": how_to_load,
        "Input": _input(trained),
        "Training": _training(trained),
        "Data": _data(trained),
        "Evaluation": _evaluation(trained),
        "Files and tensors": _list([f"`{file}`: {told}" for file, told in keys.items()])
        + "\n\nEvery tensor by name: `keys.json`.",
        "Proof": "The files were loaded strictly into fresh models and compared with the towers they came from, on "
        f"random images, in float32:\n\n{_list(summary(proof))}" + _unproven(unproven),
        "Licence": _licence(),
    }
    blocks = [
        f"{'#' if index == 0 else '##'} {title}\n\n{body}\n"
        for index, (title, body) in enumerate(sections.items())
    ]
    return "\n".join(blocks)


def _list(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _unproven(unproven: str) -> str:
    return "" if not unproven else f"\n\nNot proven: {unproven.splitlines()[0]}"


def _summary(trained: Trained) -> str:
    averaged = {"teacher": "the momentum teacher (float32 moving average)", "student": "the student"}
    return (
        f"Weights of {averaged[trained.which]} after {trained.state['step']} of {trained.run.steps} steps of recipe "
        f"`{trained.run.name}`. Method: Towards All-in-one Pre-training via Maximizing Multi-modal Mutual "
        "Information (CVPR 2023, arXiv 2211.09807)."
    )


def _input(trained: Trained) -> str:
    views = trained.run.views
    return (
        f"RGB, {views.size} x {views.size} pixels: short side resized bicubically with antialiasing, middle square; "
        f"then (value / 255 - mean) / std.\n\n- mean: {list(views.mean)}\n- std: {list(views.std)}\n"
        f"- on the 0 to 255 scale: mean {_scaled(views.mean)}, std {_scaled(views.std)}"
    )


def _scaled(values: tuple[float, ...]) -> list[float]:
    return [round(255 * value, 3) for value in values]


def _training(trained: Trained) -> str:
    run, optim, state = trained.run, trained.run.optim, trained.state
    commits = f"{state.get('commit') or 'unknown'}; of export: {provenance.commit() or 'unknown'}"
    versions = ", ".join(f"{name} {version}" for name, version in state.get("versions", {}).items())
    init = trained.facts.sha256.get("init")
    return _list(
        [
            f"objective: input {run.objective.input}, targets {', '.join(run.objective.targets)}",
            f"global batch: {run.batch} images; images read: {state['position']:,}",
            f"AdamW, peak learning rate {optim.lr}, weight decay {optim.weight_decay}, betas {optim.betas}",
            f"commit of training: {commits}",
            f"versions: {versions or 'unknown'}",
            *([f"started from weights of SHA-256 {init}"] if init else []),
        ]
    )


def _data(trained: Trained) -> str:
    facts, lines = trained.facts, []
    for name, source in trained.run.data.items():
        count = trained.num_samples.get(name)
        known = "number of samples unknown" if count is None else f"{count:,} samples"
        manifest = facts.sha256.get(f"data.{name}")
        known += "" if manifest is None else f" (manifest of SHA-256 {manifest})"
        lines.append(f"`{name}`: {known}, supervision {source.supervision}, weight {source.weight:g}")
    lines.append(
        f"categories: {len(facts.categories)}; vocabulary of the captions: {facts.vocab_size} tokens"
    )
    for split, data in (trained.evaluation or {"data": {}})["data"].items():
        lines.append(f"evaluated with {split}: `{data['name']}`, {data['num_samples']:,} samples")
    return _list(lines)


def _evaluation(trained: Trained) -> str:
    evaluation = trained.evaluation
    if evaluation is None:
        why = f", since {trained.unevaluated}" if trained.unevaluated else ""
        again = "`python -m pretrain.evaluate RUN --data DIR`, then export again"
        return f"Not evaluated at this checkpoint{why}: {again}."
    made = ", ".join(str(evaluation.get(key)) for key in ("hardware", "date", "commit"))
    return f"Of the teacher, with 95 % intervals ({made}):\n\n```\n{table(evaluation)}\n```"


def _licence() -> str:
    path = ROOT / "LICENSE"
    if not path.is_file():
        return "The project has not chosen a licence yet: ask its authors. The training data keep their own licences."
    name = ", ".join(line.strip() for line in path.read_text().strip().splitlines()[:2])
    return f"{name}. The training data keep their own licences."
