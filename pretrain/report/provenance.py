"""What was this run made of? Data and what was left out of it, the resolved recipe, versions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from data_prep.schema import Manifest
from pretrain.config import Run
from pretrain.data.order import shares
from pretrain.data.shards import read_manifest
from pretrain.evaluate.sets import Listing, is_set, read_set
from pretrain.place import Place
from pretrain.report.record import Record
from pretrain.visualize.markup import Html, element, table


def data(record: Record, heldout: Path | None) -> Html:
    """Every source with its counts, then samples left out by reason at building and in training."""
    folders = {**record.data, **({"held-out": heldout} if heldout else {})}
    manifests, problems = _manifests(folders)
    share_of = _shares(record.run, manifests)
    rows, dropped = [], []
    for name in {**record.run.data, **folders}:
        source, manifest = record.run.data.get(name), manifests.get(name)
        kind, share = (source.supervision, share_of[name]) if source else ("evaluation", "–")
        if manifest is not None:
            texts = "yes" if manifest.has_text else "no"
            told = [
                f"{manifest.num_samples:,}",
                f"{len(manifest.categories):,}",
                f"{manifest.name}, {manifest.split}; captions: {texts}; {_kept_in(manifest)}",
            ]
            rows.append([name, kind, share, *told])
            counts = sorted(manifest.dropped.items()) if isinstance(manifest, Manifest) else []
            dropped += [[f"building {name}", reason, f"{count:,}"] for reason, count in counts if count]
        elif name not in folders:
            rows.append([name, kind, share, "–", "–", "folder not known"])
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


def _kept_in(manifest: Manifest | Listing) -> str:
    if isinstance(manifest, Manifest):
        return f"shards: {len(manifest.shards)}"
    return "a folder of images for each class"


def _manifests(places: Mapping[str, Place]) -> tuple[dict[str, Manifest | Listing], list[str]]:
    """Those that can be read, by name, and what is wrong with the others."""
    found, problems = {}, []
    for name, place in places.items():
        try:
            is_local = isinstance(place, Path) and is_set(place)
            found[name] = read_set(place) if is_local else read_manifest(place)
        except (FileNotFoundError, ValueError) as error:
            problems.append(f"{name}: {error}")
    return found, problems


def _shares(run: Run, manifests: Mapping[str, Manifest | Listing]) -> dict[str, str]:
    """The part of all samples that each source gives, as far as its size is known where that decides."""
    if run.mixing.by == "size" and not manifests.keys() >= run.data.keys():
        return dict.fromkeys(run.data, "by size")
    sizes = [manifests[name].num_samples if name in manifests else 1 for name in run.data]
    found = shares([source.weight for source in run.data.values()], sizes, run.mixing)
    return {name: f"{100 * share:.0f} %" for name, share in zip(run.data, found, strict=True)}


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
