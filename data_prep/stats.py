"""What is in a data set? Counts, caption lengths, categories and what was left out, as text."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np

from data_prep.progress import progress_bar
from data_prep.schema import Manifest

MOST = 60  # categories listed; the rest is summed up
BAR_WIDTH = 30  # characters of the longest bar


def describe(folder: Path) -> str:
    """A data set as text; it reads the .json and .txt members. Raises what Manifest.read raises."""
    manifest = Manifest.read(folder)
    formats: Counter[str] = Counter()
    categories: Counter[str] = Counter()
    widths, heights, lengths, objects, captions, tags = [], [], [], [], [], []
    with progress_bar(manifest.num_samples, f"stats {folder.name}", "sample") as bar:
        for shard in manifest.shards:
            with tarfile.open(folder / shard.name) as tar:
                for member in tar:
                    extension = member.name.partition(".")[2]
                    if extension != "json":
                        formats[extension] += 1
                        continue
                    record = json.load(tar.extractfile(member))
                    widths.append(record["size"][0])
                    heights.append(record["size"][1])
                    lengths += [len(caption.split()) for caption in record["captions"]]
                    captions.append(len(record["captions"]))
                    objects.append(len(record.get("objects", [])))
                    tags.append(len(record.get("tags", [])))
                    categories[record.get("category", "")] += 1
                    bar.update()
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    lines = [
        f"{manifest.name}/{manifest.split}: {manifest.num_samples:,} samples in {len(manifest.shards)} shards,"
        f" {num_bytes / 2**20:.1f} MiB",
        f"  built from   {json.dumps(dict(manifest.builder), sort_keys=True)}",
        f"  members      {', '.join(f'{count:,} .{name}' for name, count in sorted(formats.items()))}",
        f"  width        {_spread(widths)} pixels",
        f"  height       {_spread(heights)} pixels",
    ]
    if manifest.has_text:
        lines.append(
            f"  captions     {sum(captions):,}, {_spread(captions)} a sample, {_spread(lengths)} words each"
        )
    if any(objects):
        lines.append(f"  objects      {sum(objects):,}, {_spread(objects)} a sample")
    if manifest.tags:
        lines.append(f"  tags         {sum(tags):,} of {len(manifest.tags)} names, {_spread(tags)} a sample")
    lines += _dropped(manifest)
    if manifest.has_category:
        lines += _histogram(manifest, categories)
    return "\n".join(lines)


def _spread(values: list[int]) -> str:
    low, middle, high = np.percentile(values, [0, 50, 100]).tolist()
    return (
        f"{low:g}" if low == high else f"{low:g} to {high:g} (median {middle:g}, mean {np.mean(values):.1f})"
    )


def _dropped(manifest: Manifest) -> list[str]:
    if not manifest.dropped:
        return ["  left out     nothing"]
    counts = sorted(manifest.dropped.items(), key=lambda entry: (-entry[1], entry[0]))
    return [
        f"  left out     {', '.join(f'{reason} {count:,}' for reason, count in counts)} (names in dropped.jsonl)"
    ]


def _histogram(manifest: Manifest, counts: Counter[str]) -> list[str]:
    top = max(counts.values())
    width = max(len(name) for name in manifest.categories[:MOST])
    lines = [f"  categories   {len(manifest.categories)}"]
    for label, name in enumerate(manifest.categories[:MOST]):
        bar = "#" * round(BAR_WIDTH * counts[name] / top)
        lines.append(f"  {label:5d} {name:{width}} {counts[name]:7,} {bar}")
    if rest := manifest.categories[MOST:]:
        lines.append(f"        and {len(rest)} more with {sum(counts[name] for name in rest):,} samples")
    return lines
