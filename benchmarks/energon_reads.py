"""Does Megatron-Energon read the shards of the published sources, every sample once and with the same bytes?

    OMP_NUM_THREADS=1 python benchmarks/energon_reads.py --environments DIR [DATA ...]

DATA are data sets that `python -m data_prep build` made; without any, miniatures of every source in its published
format are written, served on the loopback and built, all splits of them. Energon runs in a virtual environment of its
own, made in DIR when it is not there yet (a GB or more; minutes). A copy of each data set by hard links gets what
`energon prepare` would write beside our index. Writes benchmarks/results/energon_reads.json; exit code 1 where a
sample differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.loader_peers import environment, prepare_for_energon  # noqa: E402
from benchmarks.record import keep  # noqa: E402
from data_prep.index import index_path  # noqa: E402
from data_prep.schema import Manifest  # noqa: E402
from tests.data_prep.sources.conftest import served  # noqa: E402
from tests.data_prep.sources.published import built_all  # noqa: E402


def linked(folder: Path, copy: Path) -> Path:
    """The shards of a data set by hard links, with Energon's own files beside them."""
    copy.mkdir()
    manifest = Manifest.read(folder)
    for shard in manifest.shards:
        for path in (folder / shard.name, index_path(folder / shard.name)):
            os.link(path, copy / path.name)
    (copy / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
    prepare_for_energon(copy)
    return copy


def expected(folder: Path) -> dict[str, str]:
    """SHA-256 of the image of every sample, as its .json says."""
    hashes = {}
    for shard in Manifest.read(folder).shards:
        with tarfile.open(folder / shard.name) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if extension == "json":
                    hashes[key] = json.load(tar.extractfile(member))["sha256"]
    return hashes


def compare(python: Path, folder: Path, copy: Path) -> dict[str, object]:
    """What Energon delivered of one data set, against what is in it."""
    wanted = expected(folder)
    script = ROOT / "benchmarks" / "peers" / "energon_reads.py"
    done = subprocess.run(
        [str(python), str(script), str(linked(folder, copy)), str(len(wanted))],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return {"samples": len(wanted), "same": False, "error": done.stderr.strip().splitlines()[-1:]}
    read = json.loads(done.stdout.strip().splitlines()[-1])
    return {"samples": len(wanted), "read": len(read), "same": read == wanted}


def miniatures(above: Path) -> list[Path]:
    """Every split of a miniature of every source."""
    with served() as server:
        made = built_all(above, server)
    return [above / "disk" / name / split for name, one in made.items() for split in one.splits]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="DATA")
    parser.add_argument("--environments", type=Path, required=True)
    options = parser.parse_args()
    python = environment(options.environments, "energon")
    results = {}
    with tempfile.TemporaryDirectory() as above:
        for number, folder in enumerate(options.folders or miniatures(Path(above))):
            with tempfile.TemporaryDirectory(dir=folder.parent) as work:
                manifest = Manifest.read(folder)
                name = f"{number} {manifest.builder.get('source', manifest.name)} {manifest.split}"
                results[name] = compare(python, folder, Path(work) / "copy")
                print(name, results[name])
    keep(
        "energon_reads",
        "Megatron-Energon 7.4.1 reads every sample of our shards once, with the same bytes",
        torch.device("cpu"),
        sets=results,
    )
    if not all(result["same"] for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
