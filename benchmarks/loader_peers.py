"""How many samples a second does one core read and decode, against Megatron-Energon and Grain?

    OMP_NUM_THREADS=1 python benchmarks/loader_peers.py --environments DIR [--images 2000] [--rounds 3]

Each peer runs in a virtual environment of its own, which is made in DIR when it is not there yet (a GB; minutes). All
read the same shards of photo-like JPEGs of 340 x 256 px, shuffled, in one process without workers, turn about, best
of all rounds; decoding is simplejpeg's everywhere. Writes benchmarks/results/loader_peers.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.loader import build  # noqa: E402
from benchmarks.record import keep  # noqa: E402
from pretrain.config import Mixing  # noqa: E402
from pretrain.data.decode import decode_image  # noqa: E402
from pretrain.data.order import Order  # noqa: E402
from pretrain.data.shards import ShardFolder  # noqa: E402

PEERS = {  # what pip installs
    "energon": ("megatron-energon==7.4.1", "torch==2.13.0", "s3fs==2026.9.0", "simplejpeg==1.9.0"),
    "grain": ("grain==0.2.18", "simplejpeg==1.9.0"),
}
OURS = "ours"


def environment(folder: Path, peer: str) -> Path:
    """The Python of a peer's environment."""
    python = folder / peer / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / peer)], check=True)
        subprocess.run([str(python), "-m", "pip", "--quiet", "install", *PEERS[peer]], check=True)
    return python


def prepare_for_energon(folder: Path) -> None:
    """What `energon prepare` writes beside the index that our builder writes already."""
    manifest = json.loads((folder / "manifest.json").read_text())
    counts = {shard["name"]: shard["num_samples"] for shard in manifest["shards"]}
    (folder / ".nv-meta").mkdir()
    (folder / ".nv-meta" / ".info.json").write_text(
        json.dumps({"energon_version": "7.4.1", "shard_counts": counts})
    )
    parts = {"split_parts": {"train": list(counts), "val": [], "test": []}, "exclude": []}
    (folder / ".nv-meta" / "split.yaml").write_text(json.dumps(parts))  # JSON is YAML
    loader = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    (folder / ".nv-meta" / "dataset.yaml").write_text(json.dumps(loader))


def our_rates(folder: Path, num: int) -> dict[str, float]:
    shards = ShardFolder(folder)
    order = Order(0, [1.0], [shards.shard_sizes], Mixing())
    rates, position = {}, 0
    for what, work in (("read", lambda content: None), ("decode", decode_image)):
        begun = time.perf_counter()
        for _ in range(num):
            pick = order[position]
            work(shards.read(pick.shard, pick.index)[1]["jpg"])
            position += 1
        rates[what] = num / (time.perf_counter() - begun)
    shards.close()
    return rates


def peer_rates(python: Path, peer: str, folder: Path, num: int) -> dict[str, float]:
    script = ROOT / "benchmarks" / "peers" / f"{peer}_rate.py"
    done = subprocess.run(
        [str(python), "-W", "ignore", str(script), str(folder), str(num)],
        check=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environments", type=Path, required=True)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the allocator is left as it is everywhere
    pythons = {peer: environment(options.environments, peer) for peer in PEERS}
    best: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder, mean_bytes = build(Path(place), 340, 256, options.images)
        prepare_for_energon(folder)
        for _ in range(options.rounds):
            for name in (OURS, *PEERS):
                found = (
                    our_rates(folder, options.images)
                    if name == OURS
                    else peer_rates(pythons[name], name, folder, options.images)
                )
                kept = best.setdefault(name, found)
                best[name] = {what: max(rate, kept[what]) for what, rate in found.items()}
                print(name, {what: round(rate) for what, rate in best[name].items()}, flush=True)
    keep(
        "loader_peers",
        "one core reads and decodes more samples/s than Energon and than Grain with a source of tar files",
        torch.device("cpu"),
        images=options.images,
        rounds=options.rounds,
        jpeg_bytes=mean_bytes,
        peers={peer: packages[0] for peer, packages in PEERS.items()},
        samples_a_second={
            name: {what: round(r, 1) for what, r in rates.items()} for name, rates in best.items()
        },
        times={
            peer: {what: round(best[OURS][what] / best[peer][what], 2) for what in best[OURS]}
            for peer in PEERS
        },
    )


if __name__ == "__main__":
    main()
