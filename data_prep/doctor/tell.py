"""How does a description of a data set read in a terminal?"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from data_prep.doctor.duplicates import Duplicates
from data_prep.doctor.summary import Values
from data_prep.schema import Manifest
from data_prep.stats import Description, ordered, spread

MOST = 60  # categories listed; the rest is summed up
MOST_NAMES = 12  # languages, tags and values in one line
BAR_WIDTH = 30  # characters of the longest bar


def as_text(described: Description) -> str:
    """A data set on a screen or two."""
    manifest, summary = described.manifest, described.summary
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    lines = [
        f"{manifest.name}/{manifest.split}: {manifest.num_samples:,} samples in {len(manifest.shards)} shards,"
        f" {num_bytes / 2**20:,.1f} MiB",
        f"  built from   {json.dumps(dict(manifest.builder), sort_keys=True)}",
        f"  members      {', '.join(f'{count:,} .{name}' for name, count in sorted(summary.formats.items()))}",
        f"  width        {_spread(summary.widths)} pixels",
        f"  height       {_spread(summary.heights)} pixels",
        f"  image        {_spread({size / 1024: count for size, count in summary.image_bytes.items()})} KiB",
    ]
    if num_captions := _total(summary.captions):
        lines.append(
            f"  captions     {num_captions:,}, {_spread(summary.captions)} a sample, {_spread(summary.words)} words,"
            f" {_spread(summary.characters)} characters each"
        )
    if summary.languages:
        looked = summary.languages.total()
        lines.append(f"  languages    of {looked:,} captions (py3langid): {_shares(summary.languages)}")
    if num_objects := _total(summary.objects):
        lines.append(f"  objects      {num_objects:,}, {_spread(summary.objects)} a sample")
    if num_tags := _total(summary.tags_a_sample):
        known = f" of {len(manifest.tags)} names" if manifest.tags else ""
        lines.append(
            f"  tags         {num_tags:,}{known}, {_spread(summary.tags_a_sample)} a sample, scores"
            f" {_spread(summary.scores)}: {_shares(summary.tags)}"
        )
    for name, values in sorted(summary.fields.items()):
        lines.append(f"  {name:12} {_field(values)}")
    lines += _duplicates(described)
    lines += _dropped(manifest)
    if manifest.has_category:
        lines += _histogram(manifest, summary.categories)
    return "\n".join(lines)


def _total(counts: Mapping[int, int]) -> int:
    return sum(value * count for value, count in counts.items())


def _spread(counts: Mapping[Any, int]) -> str:
    told = spread(counts)
    if not told:
        return "none"
    if told["min"] == told["max"]:
        return f"{told['min']:.4g}"
    return f"{told['min']:.4g} to {told['max']:,.6g} (median {told['median']:.4g}, mean {told['mean']:.1f})"


def _shares(counts: Counter[str]) -> str:
    total = counts.total()
    listed = ordered(counts.items())[:MOST_NAMES]
    rest = len(counts) - len(listed)
    return ", ".join(f"{name} {count / total:.1%}" for name, count in listed) + (
        f" and {rest} more" if rest else ""
    )


def _field(values: Values) -> str:
    parts = []
    if values.numbers:
        parts.append(_spread(values.numbers))
    if values.texts is None:
        parts.append("many different texts")
    elif values.texts:
        parts.append(_shares(values.texts))
    if values.other:
        parts.append(f"{values.other:,} lists or objects")
    if values.missing:
        parts.append(f"{values.missing:,} null")
    return f"of {values.count:,} samples: {'; '.join(parts)}"


def _duplicates(described: Description) -> list[str]:
    lines = [f"  same bytes   {_groups(described.exact)}"]
    if described.near is not None:
        computed = described.summary.num_computed
        how = f", {computed:,} hashes computed" if computed else ""
        lines.append(
            f"  look alike   {_groups(described.near)}, within {described.distance} of 64 bits{how};"
            f" {described.near.num_flat:,} flat pictures left aside"
        )
    return lines


def _groups(found: Duplicates) -> str:
    if not found.num_groups:
        return "no two samples"
    return f"{found.num_samples:,} samples in {found.num_groups:,} groups, {found.num_extra:,} more than one each"


def _dropped(manifest: Manifest) -> list[str]:
    if not manifest.dropped:
        return ["  left out     nothing"]
    counts = ", ".join(f"{reason} {count:,}" for reason, count in ordered(manifest.dropped.items()))
    return [f"  left out     {counts} (names in dropped.jsonl)"]


def _histogram(manifest: Manifest, counts: Counter[str]) -> list[str]:
    top = max(counts.values())
    width = max(len(name) for name in manifest.categories[:MOST])
    empty = sum(not counts[name] for name in manifest.categories)
    lines = [
        f"  categories   {len(manifest.categories)}{f', {empty} of them without a sample' if empty else ''}"
    ]
    for label, name in enumerate(manifest.categories[:MOST]):
        bar = "#" * round(BAR_WIDTH * counts[name] / top)
        lines.append(f"  {label:5d} {name:{width}} {counts[name]:7,} {bar}")
    if rest := manifest.categories[MOST:]:
        lines.append(f"        and {len(rest)} more with {sum(counts[name] for name in rest):,} samples")
    return lines
