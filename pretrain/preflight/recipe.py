"""Does the run fit its number of ranks, and can every node read the same data?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec

from pretrain.checkpoint.names import checkpoints_of, steps_in
from pretrain.data.faults import DataAway, NobodyThere
from pretrain.data.shards import ShardFolder
from pretrain.data.store import PATIENCE_AT_START
from pretrain.place import Place, is_url
from pretrain.preflight.check import Here
from pretrain.preflight.storage import ANSWERS
from pretrain.preflight.told import WARNING, Judged, Problem, Told, differences, size
from pretrain.retries import GaveUp, patiently, within

MOST_LOOKED_AT = 256  # shards of a data set whose size every node compares
HEADER = 512  # bytes, of the first member of a tar file
MAGIC = slice(257, 262)  # of POSIX.1-1988, b"ustar"
DATA_RULE = (
    "the same manifests on all nodes, all shards there, a batch of samples and a shard for each worker"
)
MASTERS, MOMENTS, AVERAGE = (
    4,
    8,
    4,
)  # bytes a parameter of a checkpoint: weights, AdamW, the teacher's average


def look_at_recipe(here: Here) -> dict[str, float] | None:
    """By rank 0 alone: bytes of a checkpoint, and of a rank's host memory. ValueError as training would raise it."""
    if here.run is None or here.paths is None or here.ranks.rank:
        return None
    from pretrain.main import quieten

    quieten()
    from pretrain.compiled import check_compile
    from pretrain.ds_config import check_config, read_ds_config
    from pretrain.plan.sizes import assumed_facts, sizes_of

    run, world = here.run, here.ranks.world
    config = read_ds_config(here.paths.ds_config)
    check_config(config, run, world)
    run.images_per_rank(world, here.paths.micro_batches)
    if here.paths.compile:
        check_compile(run.backbone.family, config["zero_optimization"]["stage"])
    sizes = sizes_of(run, assumed_facts(run))
    checkpoint = (MASTERS + MOMENTS) * sizes.num_trained + AVERAGE * sizes.num_averaged
    is_offloaded = "offload_optimizer" in config["zero_optimization"]
    on_host = (
        1 if here.is_gpu else 2
    ) + is_offloaded  # a copy is written beside training; without a GPU all is here
    here.model = {
        "parameters": sizes.num_trained,
        "checkpoint": checkpoint,
        "host": on_host * checkpoint / world,
    }
    return here.model


def judge_recipe(told: Sequence[Told], here: Here) -> Judged:
    assert here.run is not None, "the recipe is checked where there is one"
    model, images = told[0].value, here.run.images_per_rank(here.ranks.world)
    value = (
        f"{model['parameters'] / 1e6:.4g} M parameters, checkpoints of {size(model['checkpoint'])}, "
        f"{images} images a rank"
    )
    return Judged(value, "recipe, ds config and number of ranks fit each other")


def look_at_data(here: Here) -> dict[str, Any] | None:
    """`sources`: SHA-256 of the manifest of each by name, its shards and samples; errors as the loader raises them.

    `fails` where a store is away: training asks it again, and its code says whether to start again. NobodyThere where
    training would take the address for a wrong one.
    """
    if here.run is None or here.paths is None:
        return None
    try:
        if not any(map(is_url, here.paths.data.values())):
            return {"sources": _look_at_sources(here)}
        return {"sources": within(ANSWERS * here.options.check_seconds, lambda: _look_at_sources(here))}
    except TimeoutError as error:
        return {"fails": f"{', '.join(map(str, here.paths.data.values()))}: {error}"}
    except (DataAway, GaveUp) as error:
        if isinstance(error, NobodyThere) and not _has_begun(here):
            raise
        return {"fails": str(error)}


def _has_begun(here: Here) -> bool:
    """Is there a checkpoint, with which the addresses of the data have served? Also where nobody can tell now."""
    assert here.paths is not None, "data is checked where there is some"
    kept = checkpoints_of(here.paths.out) if here.paths.checkpoints is None else here.paths.checkpoints
    try:
        return bool(within(ANSWERS * here.options.check_seconds / 2, lambda: steps_in(kept)))
    except OSError:
        return True


def _look_at_sources(here: Here) -> dict[str, Any]:
    assert here.run is not None and here.paths is not None, "data is checked where there is some"
    from pretrain.data.sources import open_sources, tokenizer_folder
    from pretrain.data.steps import run_order

    run, places = here.run, here.paths.data
    sources = open_sources(run, places, tokenizer_folder(run, places, here.paths.tokenizer), slice(0))
    run_order(run, sources)  # shares of the sources
    told: dict[str, Any] = {}
    for source in sources.opened:
        shards = source.shards
        num = len(shards.manifest.shards)
        for problem in shards.problems(slice(0, None, -(-num // MOST_LOOKED_AT))):
            raise problem
        _require_tar(places[source.name], shards, here.ranks.node % num)
        told[source.name] = {"manifest": shards.sha256, "shards": num, "samples": len(shards)}
    here.sample_bytes = max(source.shards.num_bytes / len(source.shards) for source in sources.opened)
    return told


def _require_tar(place: Place, shards: ShardFolder, number: int) -> None:
    """ValueError unless the first bytes of a shard are read and begin a tar file; errors as the loader or the store
    has them."""
    name = shards.manifest.shards[number].name
    if isinstance(place, Path):
        header = shards.first_bytes(number, HEADER)
    else:
        fs, root = fsspec.url_to_fs(place, use_listings_cache=False)
        header = patiently(
            lambda: fs.cat_file(f"{root}/{name}", start=0, end=HEADER), f"{place}/{name}", PATIENCE_AT_START
        )
    if header[MAGIC] != b"ustar":
        raise ValueError(
            f"{place}/{name} does not begin as a tar file: copy it again or build the data set again"
        )


def judge_data(told: Sequence[Told], here: Here) -> Judged:
    assert here.run is not None, "data is checked where there is some"
    fails = [
        Problem(one.place, one.value["fails"], "training asks it once more", status=WARNING)
        for one in told
        if "fails" in one.value
    ]
    told = [Told(one.place, one.value["sources"]) for one in told if "sources" in one.value]
    if not told:
        return Judged("fails now", DATA_RULE, fails)
    flat = [Told(one.place, {name: of["manifest"] for name, of in one.value.items()}) for one in told]
    problems = [
        *fails,
        *differences(flat, "manifest of ", "copy the same build of the data set to every node"),
    ]
    sources = told[0].value
    for name, of in sources.items():
        if of["samples"] < here.run.batch:
            problems.append(
                Problem(
                    None,
                    f"{name} has {of['samples']} samples, the batch {here.run.batch}",
                    "samples may come twice in one batch: name a larger data set or a smaller --batch",
                    status=WARNING,
                )
            )
        readers = here.ranks.world * max(1, here.paths.workers if here.paths else 0)
        if of["shards"] < readers:
            problems.append(
                Problem(
                    None,
                    f"{name} has {of['shards']} shards, {readers} processes read it",
                    "several read the same file, and from a store each node fetches it: build it again with a "
                    "smaller --shard-size, or start fewer --workers",
                    status=WARNING,
                )
            )
    value = ", ".join(
        f"{name}: {of['samples']} samples in {of['shards']} shards" for name, of in sources.items()
    )
    return Judged(value, DATA_RULE, problems)
