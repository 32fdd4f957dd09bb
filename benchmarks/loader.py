"""How many images a second does one core read, decode and augment, against webdataset with torchvision on Pillow?

    OMP_NUM_THREADS=1 python benchmarks/loader.py [--images 512] [--rounds 5] [--record loader]

Photo-like JPEGs (quality 90, from smoothed noise with edges) of 500 x 375 and of 340 x 256 pixels, built into shards
by `data_prep build folder`; one process, one thread. Both sides read the same files, turn about, best of all rounds,
per second of processor time, since a busy machine changes the clock on the wall more: samples without decoding, and
decoding with two augmented views at 224 px (the recipe `m3i.vit_b16`; on the other side the same augmentations from
torchvision.transforms on Pillow images). Writes benchmarks/results/loader.json, of another machine loader_*.json.
"""

from __future__ import annotations

import argparse
import gc
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import cv2
import numpy as np
import torch
import torch.nn.functional as F
import webdataset
from PIL import Image
from torchvision import transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.record import keep  # noqa: E402
from data_prep.processes import keep_memory  # noqa: E402
from pretrain.config import Mixing, Views  # noqa: E402
from pretrain.data.decode import decode_image, plain_jpeg_size  # noqa: E402
from pretrain.data.order import Order  # noqa: E402
from pretrain.data.shards import ShardFolder  # noqa: E402
from pretrain.data.views import draw_views, make_views  # noqa: E402
from pretrain.data.workers import LARGEST  # noqa: E402
from pretrain.recipes import load  # noqa: E402

# With it the files are as large as photos of that size: 56 and 29 kB, the mean of 105 photos of COCO under free
# licences, resized so and saved at quality 90.
GRAIN = 0.03
SIDES = {"500 x 375": (500, 375), "340 x 256": (340, 256)}  # width, height


def photo(width: int, height: int, seed: int) -> bytes:
    """A JPEG about as large as a photo of that size: soft shapes, a few hard edges, some grain."""
    generator = torch.Generator().manual_seed(seed)
    soft = F.interpolate(torch.rand(1, 3, 6, 8, generator=generator), (height, width), mode="bicubic")[0]
    edges = torch.rand(1, 1, 12, 16, generator=generator) > 0.8
    hard = F.interpolate(edges.float(), (height, width), mode="nearest")[0]
    grain = GRAIN * torch.randn(3, height, width, generator=generator)
    levels = ((soft + 0.2 * hard + grain).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    memory = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(levels)).save(memory, "JPEG", quality=90)
    return memory.getvalue()


def build(folder: Path, width: int, height: int, count: int) -> tuple[Path, int]:
    """A data set of `count` photos, and their mean bytes."""
    images = folder / "images" / "photo"
    images.mkdir(parents=True)
    sizes = []
    for number in range(count):
        content = photo(width, height, number)
        sizes.append(len(content))
        (images / f"{number:06d}.jpg").write_bytes(content)
    command = [sys.executable, "-m", "data_prep", "build", "folder", "--from", str(images.parent)]
    subprocess.run([*command, "--out", str(folder / "set")], cwd=ROOT, check=True, capture_output=True)
    (manifest,) = (folder / "set").rglob("manifest.json")
    return manifest.parent, round(sum(sizes) / count)


def torchvision_views(views: Views) -> Callable[[Image.Image], list[torch.Tensor]]:
    """The augmentations of ours as torchvision has them, on Pillow images."""
    kernel = 2 * round(0.05 * views.size) + 1  # 23 at 224, as SimCLR has it

    def of(which: int) -> Callable[[Image.Image], torch.Tensor]:
        blur = transforms.GaussianBlur(kernel, views.blur_sigma)
        return transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    views.size, views.scale, views.ratio, transforms.InterpolationMode.BICUBIC
                ),
                transforms.RandomHorizontalFlip(views.flip),
                transforms.RandomApply([transforms.ColorJitter(*views.jitter)], views.jitter_probability),
                transforms.RandomGrayscale(views.grayscale),
                transforms.RandomApply([blur], views.blur[which]),
                transforms.RandomSolarize(128, views.solarize[which]),
                transforms.PILToTensor(),
            ]
        )

    both = [of(which) for which in (0, 1)]
    return lambda image: [one(image) for one in both]


def forms(folder: Path, count: int, views: Views) -> dict[str, Callable[[], int]]:
    """What is timed: each goes once through the data set and gives the number of samples."""
    shards = ShardFolder(folder)
    order = Order(0, [1.0], [shards.shard_sizes], Mixing())
    urls = [str(folder / shard.name) for shard in shards.manifest.shards]
    generator, theirs = Random(0), torchvision_views(views)

    def ours(work: Callable[[dict[str, bytes]], object]) -> int:
        for position in range(count):
            pick = order[position]
            work(shards.read(pick.shard, pick.index)[1])
        return count

    def two_views(members: dict[str, bytes]) -> None:
        image = decode_image(members["jpg"])
        make_views(image, draw_views(image.shape[0], image.shape[1], views, generator), views.size)

    def webdatasets(decode: bool) -> int:
        data = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).shuffle(
            1000, initial=100, rng=generator
        )
        done = 0
        for sample in data.decode("pil") if decode else data:
            if decode:
                theirs(sample["jpg"].convert("RGB"))
            done += 1
        return done

    def device_views(on_device: str) -> Callable[[dict[str, bytes]], None]:
        """What is left to a core when the device makes colours, or all from the files on."""

        def work(members: dict[str, bytes]) -> None:
            image = None if on_device == "all" else decode_image(members["jpg"])
            height, width = plain_jpeg_size(members["jpg"]) if image is None else image.shape[:2]
            make_views(image, draw_views(height, width, views, generator), views.size, with_colours=False)

        return work

    return {
        "read": lambda: ours(lambda members: None),
        "read, webdataset": lambda: webdatasets(decode=False),
        "decode": lambda: ours(lambda members: decode_image(members["jpg"])),
        "views": lambda: ours(two_views),
        "views, colours on the device": lambda: ours(device_views("colours")),
        "views, all on the device": lambda: ours(device_views("all")),
        "views, webdataset": lambda: webdatasets(decode=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--record", default="loader", help="name of the result; plan counts with that of `loader`"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    gc.freeze()
    keep_memory(LARGEST)  # as in the loader's workers; both sides gain
    views = load("m3i.vit_b16").views
    measured = {}
    for name, (width, height) in SIDES.items():
        with tempfile.TemporaryDirectory() as place:
            folder, mean_bytes = build(Path(place), width, height, options.images)
            timed = forms(folder, ShardFolder(folder).manifest.num_samples, views)
            best = dict.fromkeys(timed, 0.0)
            for _ in range(options.rounds):
                for form, work in timed.items():
                    begun = time.process_time()
                    count = work()
                    best[form] = max(best[form], count / (time.process_time() - begun))
        measured[name] = {"jpeg_bytes": mean_bytes} | {form: round(rate, 1) for form, rate in best.items()}
        measured[name]["times webdataset, read"] = round(best["read"] / best["read, webdataset"], 2)
        measured[name]["times webdataset, views"] = round(best["views"] / best["views, webdataset"], 2)
        print(name, measured[name], flush=True)
    keep(
        options.record,
        "goals, reached or not: one core reads 5 times, augments 3 times as many images/s as webdataset with Pillow",
        torch.device("cpu"),
        images=options.images,
        rounds=options.rounds,
        view=views.size,
        samples_a_second=measured,
    )


if __name__ == "__main__":
    main()
