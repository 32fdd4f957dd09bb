"""Are the README's figures those that were measured?"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from typing import Any

from pretrain import recipes
from tests.paths import ROOT

README = " ".join((ROOT / "README.md").read_text().split())


def measured(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def three_digits(number: float) -> str:
    return f"{float(f'{number:.3g}'):,.0f}"


def test_the_loaders_rates_are_those_that_were_measured() -> None:
    kept, peers = measured("loader"), measured("loader_peers")
    large, small = (kept["samples_a_second"][size] for size in ("500 x 375", "340 x 256"))

    def row(name: str, key: str, *notes: str) -> str:
        told = zip((large, small), notes or ("", ""), strict=True)
        return f"| {name} | " + " | ".join(three_digits(found[key]) + note for found, note in told) + " |"

    times = [f"{found['times webdataset, read']:.1f} times webdataset" for found in (large, small)]
    views = [f"{found['times webdataset, views']:.1f} times" for found in (large, small)]
    rows = [
        row("read, without decoding", "read", f": {times[0]}", f": {times[1]}"),
        row(
            "read, decode, two views",
            "views",
            f": {views[0]} webdataset with torchvision on Pillow",
            f": {views[1]}",
        ),
        row("the same, colours left to the GPU", "views, colours on the device"),
        row("the same, all left to the GPU", "views, all on the device"),
    ]
    for line in rows:
        assert line in README
    assert f"an AMD EPYC shared with others, {kept['date'][:10]}" in README
    other = measured("loader_another_machine")
    found = [other["samples_a_second"][size] for size in ("500 x 375", "340 x 256")]
    read, views = (" and ".join(three_digits(rates[key]) for rates in found) for key in ("read", "views"))
    times = [
        " and ".join(f"{rates[f'times webdataset, {key}']:.1f}" for rates in found)
        for key in ("read", "views")
    ]
    assert (
        f"an EPYC of {other['cpu_model']}, the same day" in README and other["date"][:10] == kept["date"][:10]
    )
    assert f"{read} read ({times[0]} times webdataset), {views} with two views ({times[1]} times)" in README
    times = peers["times"]
    assert (
        f"on {peers['date'][:10]}, had {three_digits(peers['samples_a_second']['ours']['read'])}: "
        f"{times['energon']['read']:.0f} times Energon, {times['grain']['read']:.1f} times Grain"
    ) in README
    wait = measured("loader_wait")
    quick, slow = (found["images_a_second_without_pause"] for found in (wait, wait["steady"]))
    assert f"{slow:.0f} and {quick:.0f} images a second of 340 x 256 in two spans" in README
    assert (
        f"waits {100 * wait['wait_share']:.1f} % of its time, one of that pace throughout "
        f"{100 * wait['steady']['wait_share']:.1f} %"
    ) in README


def test_the_sources_that_a_recipe_draws_from_are_told() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    start = lines.index("| recipe | sources |") + 2
    told = []
    for line in itertools.takewhile(lambda line: line.startswith("|"), lines[start:]):
        patterns, sources = (re.findall(r"`([^`]+)`", cell) for cell in line.strip("|").split("|"))
        told.append((patterns, sources))
    for name in recipes.names():
        first = next(
            sources for patterns, sources in told if any(fnmatchcase(name, pattern) for pattern in patterns)
        )
        assert list(recipes.load(name).data) == first, name


def test_the_options_of_the_look_at_data_are_told() -> None:
    _, _, told = README.partition("- A look: `python -m pretrain.data")
    told, _, _ = told.partition("- Where: ")
    helped = subprocess.run(
        [sys.executable, "-m", "pretrain.data", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    options = set(re.findall(r"^  (--[a-z]+)", helped, re.MULTILINE))
    assert options >= {"--images", "--workers", "--out"}
    assert {option for option in options if option not in told} == set()
    assert (
        f"warm-up ({recipes.load('m3i.demo').optim.warmup} in the demo's) need a shorter `--optim.warmup`"
        in README
    )


def test_the_start_on_many_shards_is_the_one_that_was_measured() -> None:
    kept = measured("loader_scale")
    found = kept["medians"]
    assert (
        f"A start on {kept['shards']:,} shards of {kept['samples_a_shard']:,} samples takes "
        f"{found['start_cpu_seconds']:.1f} CPU seconds and {found['mebibytes_taken']:.0f} MiB beside the imports' "
        f"{three_digits(found['mebibytes_before'])}, the next position {1e6 * found['position_seconds']:.1f} "
        f"microseconds, the first of a window {1e3 * found['position_in_a_new_window_seconds']:.0f} ms"
    ) in README


def test_what_the_toolkits_made_of_exported_files_is_what_was_measured() -> None:
    """Six files are built; four give our features; three make a step, in which no parameter of the backbone stays."""
    for size, found in measured("openmmlab_loads")["backbones"].items():
        files = found["toolkits"]["configs"]
        assert size.endswith("_tiny") and len(files) == 6 and found["min_cosine"] > 0.9999
        assert {row["file"] for row in found["proof"]} >= {file for file in files if "lvis" not in file}
        stepped = found["training_step"]
        assert set(stepped) == {"upernet_ade20k.py", "mask2former_ade20k.py", "dino_coco.py"}
        assert not any(step["backbone_parameters_that_stayed"] for step in stepped.values())
    assert "no committed result" not in README
    for told in (
        "all six files of a tiny InternImage and of a tiny ViT were built",
        "those for ADE20K and COCO gave our features at two sizes",
        "UperNet, Mask2Former and DINO for COCO made a training step.",
        "No step was made of those for LVIS, nor of Mask R-CNN",
    ):
        assert told in README


def test_the_table_of_dense_transfer_is_the_one_that_was_measured() -> None:
    kept = (ROOT / "benchmarks" / "results" / "dense_transfer.md").read_text()
    table = kept[kept.index("\n|") :]
    assert table.count("\n") > 2 and " ".join(table.split()) in README
