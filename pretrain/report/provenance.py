"""What was this run made of? Data and what was left out of it, the resolved recipe, versions."""

from __future__ import annotations

import json
from pathlib import Path

from data_prep.schema import Manifest
from pretrain.report.record import Record
from pretrain.visualize.markup import Html, element, table


def data(record: Record, heldout: Path | None) -> Html:
    """Every source with its counts, then samples left out by reason at building and in training."""
    folders = {**record.data, **({"held-out": heldout} if heldout else {})}
    total = sum(source.weight for source in record.run.data.values())
    rows, dropped, problems = [], [], []
    for name, source in record.run.data.items():
        if name not in folders:
            rows.append(
                [
                    name,
                    source.supervision,
                    f"{100 * source.weight / total:.0f} %",
                    "–",
                    "–",
                    "folder not known",
                ]
            )
    for name, folder in folders.items():
        try:
            manifest = Manifest.read(folder)
        except (FileNotFoundError, ValueError) as error:
            problems.append(f"{name}: {error}")
            continue
        source = record.run.data.get(name)
        share = f"{100 * source.weight / total:.0f} %" if source else "–"
        kind = source.supervision if source else "evaluation"
        texts = "yes" if manifest.has_text else "no"
        rows.append(
            [
                name,
                kind,
                share,
                f"{manifest.num_samples:,}",
                f"{len(manifest.categories):,}",
                f"{manifest.name}, {manifest.split}; captions: {texts}; shards: {len(manifest.shards)}",
            ]
        )
        dropped += [
            [f"building {name}", reason, f"{count:,}"]
            for reason, count in sorted(manifest.dropped.items())
            if count
        ]
    last = record.log[-1].get("dropped") if record.log else None
    dropped += [["training", reason, f"{count:,}"] for reason, count in sorted((last or {}).items())]
    parts = [table(["source", "supervision", "share", "samples", "categories", "data set"], rows, "numbers")]
    parts += [element("p", problem, class_="missing") for problem in problems]
    if dropped:
        parts += [
            element("h3", "Samples left out"),
            table(["where", "reason", "samples"], dropped, "numbers narrow"),
        ]
    else:
        parts.append(
            element(
                "p", "No sample was left out, neither when the data was built nor in training.", class_="note"
            )
        )
    return element("div", parts)


def recipe(record: Record) -> Html:
    """The resolved recipe, folded away."""
    text = json.dumps(json.loads(record.run.to_json()), indent=2)
    summary = element("summary", f"{record.run.name}, every field")
    return element("details", summary, element("pre", text, tabindex="0"))


def environment(record: Record) -> Html | None:
    """Versions, ranks and ZeRO stage that the newest checkpoint recorded; None without a checkpoint."""
    if not record.state:
        return None
    rows = [[name, version] for name, version in (record.state.get("versions") or {}).items()]
    titles = {
        "hardware": "hardware",
        "world": "ranks",
        "stage": "ZeRO stage",
        "dtype": "precision",
        "commit": "commit",
    }
    rows += [
        [title, str(record.state[key])] for key, title in titles.items() if record.state.get(key) is not None
    ]
    return table(["what", "version or value"], rows, "numbers narrow")
