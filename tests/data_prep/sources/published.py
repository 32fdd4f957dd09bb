"""Miniatures of every source in its published format, a trap or two in each: what is written, and how it is built."""

from __future__ import annotations

import base64
import bz2
import gzip
import hashlib
import io
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.__main__ import SOURCES
from data_prep.sources.yfcc15m import FIELDS, TABLE, photo_hash
from tests.data_prep.sources.archive import tar_of
from tests.data_prep.sources.built import LOOPBACK, run
from tests.data_prep.sources.conftest import Server, picture

HERE = "{in}"  # in an argument: the folder or URL of the miniature


@dataclass(frozen=True)
class Miniature:
    """How a miniature is built, and what must come out."""

    command: tuple[str, ...]  # of `build`, without --scratch and --out
    splits: Mapping[str, int]  # folder below --out ("." for itself) -> good samples
    dropped: Mapping[str, int]  # of all splits
    is_downloaded: bool = False

    def arguments(self, place: str) -> list[str]:
        """The command for inputs that lie at `place`."""
        return [word.replace(HERE, place) for word in self.command]


def scenes(folder: Path, server: Server) -> Miniature:
    command = ("scenes", "--count", "6", "--heldout", "0.34", "--size", "32")
    return Miniature(command, {"train": 4, "heldout": 2}, {})


def images(folder: Path, server: Server) -> Miniature:
    """A captions.tsv in Windows-1252 that names a missing image, a broken image and one that is no JPEG."""
    (folder / "photos" / "pics").mkdir(parents=True)
    for number, form in enumerate(("JPEG", "PNG", "JPEG")):
        (folder / "photos" / "pics" / f"{number}.jpg").write_bytes(picture(number, form))
    (folder / "photos" / "pics" / "bad.jpg").write_bytes(picture(9)[:99])
    rows = [b"pics/%d.jpg\tcaf\xe9 number %d" % (number, number) for number in range(3)]
    rows += [b"pics/bad.jpg\tbroken", b"pics/none.jpg\tmissing"]
    (folder / "photos" / "captions.tsv").write_bytes(b"\n".join([b"image\tcaption", *rows]))
    return Miniature(("folder", "--from", f"{HERE}/photos"), {".": 3}, {"missing_image": 1, "corrupt": 1})


def laion(folder: Path, server: Server) -> Miniature:
    urls = [server.put(f"/laion/{number}.jpg", picture(100 + number)) for number in range(4)]
    urls += [f"{server.url}/laion/gone.jpg", "ftp://example.com/x.jpg", urls[0]]
    table = {"URL": urls, "TEXT": [f"a caption number {n}" for n in range(7)], "NSFW": ["UNLIKELY"] * 7}
    pq.write_table(
        pa.table({**table, "similarity": [0.31, float("nan"), 0.4, 0.3, 0.5, 0.5, 0.2]}), folder / "0.parquet"
    )
    return Miniature(("laion400m", "--from", f"{HERE}/0.parquet"), {".": 4}, {"http_404": 1}, True)


def cc12m(folder: Path, server: Server) -> Miniature:
    contents = [picture(200 + number) for number in range(4)]
    urls = [server.put(f"/cc/{number}.jpg", content) for number, content in enumerate(contents)]
    lines = [f'{url}\t"<PERSON> opens a quote {n}'.encode() for n, url in enumerate(urls)]
    (folder / "cc12m.tsv").write_bytes(b"\n".join([*lines, b"no address at all"]))
    contents[3] = b"as it was once"
    hashes = [
        (url, hashlib.sha256(one).hexdigest(), hashlib.md5(one).hexdigest())
        for url, one in zip(urls, contents, strict=True)
    ]
    packed = gzip.compress("".join("\t".join(row) + "\n" for row in hashes).encode())
    (folder / "hashes.tsv.gz").write_bytes(packed)
    command = ("cc12m", "--from", f"{HERE}/cc12m.tsv", "--hashes", f"{HERE}/hashes.tsv.gz")
    return Miniature(command, {".": 3}, {"hash_mismatch": 1}, True)


def yfcc15m(folder: Path, server: Server) -> Miniature:
    listed, texts = [], []
    for number in range(4):
        address = f"http://farm1.staticflickr.com/2/{number}_x.jpg"
        name = photo_hash(address)
        if number < 3:
            server.put(f"/data/images/{name[:3]}/{name[3:6]}/{name}.jpg", picture(300 + number))
        listed.append(f"{number}\t10{number}\t{name}\n")
        texts.append(
            (f"10{number}", "My+cat", "It+is+%3Cb%3Efat%3C%2Fb%3E", address, "Attribution+License", "0")
        )
    (folder / "subset.tsv.bz2").write_bytes(bz2.compress("".join(listed).encode()))
    with closing(sqlite3.connect(folder / "yfcc100m_dataset.sql")) as connection:
        connection.execute(f"CREATE TABLE {TABLE} ({', '.join(f'{name} text' for name in FIELDS)})")
        connection.executemany(f"INSERT INTO {TABLE} VALUES (?, ?, ?, ?, ?, ?)", texts)
        connection.commit()
    command = ("yfcc15m", "--from", f"{HERE}/subset.tsv.bz2", "--texts", f"{HERE}/yfcc100m_dataset.sql")
    return Miniature((*command, "--images", server.url), {".": 3}, {"http_404": 1}, True)


def _whole_tar(folder: Path) -> None:
    """fall11_whole.tar of two synsets, a broken image and a PNG by the name of a JPEG among the images."""
    synsets = []
    for start, synset in ((0, "n01440764"), (10, "n02012849")):
        files = [
            (f"{synset}_{n}.JPEG", picture(400 + start + n, "PNG" if n == 1 else "JPEG")) for n in range(4)
        ]
        files.append((f"{synset}_9.JPEG", picture(490)[:200]))
        synsets.append((f"{synset}.tar", tar_of(files)))
    (folder / "fall11_whole.tar").write_bytes(tar_of(synsets))


def imagenet22k(folder: Path, server: Server) -> Miniature:
    """With the published maps: their numbers 0 and 1, one image of each synset in val, one that is missing."""
    _whole_tar(folder)
    numbers = {"n01440764": 0, "n02012849": 1}
    maps = {"train": (0, 1, 2, 9), "val": (3, 8)}
    for split, images in maps.items():
        lines = [f"{name}/{name}_{n}.JPEG\t{number}\n" for name, number in numbers.items() for n in images]
        (folder / f"ILSVRC2011fall_whole_map_{split}.txt").write_text("".join(lines))
    paths = [f"{HERE}/ILSVRC2011fall_whole_map_{split}.txt" for split in maps]
    command = ("imagenet22k", "--from", f"{HERE}/fall11_whole.tar", "--maps", *paths)
    return Miniature(command, {"train": 6, "val": 2}, {"missing_image": 2, "corrupt": 2})


def tencent_ml(folder: Path, server: Server) -> Miniature:
    _whole_tar(folder)
    (folder / "dictionary.txt").write_text(
        "index\tcategory id\tparent's index\tcategory name\n0\tn00001740\t-1\tentity\n1\tn01440764\t0\ttench\n"
    )
    urls = [server.put(f"/t/{number}_o.jpg", picture(500 + number)) for number in range(3)]
    lines = [f"{url}\t1:0.8\t0:0.9\n" for url in urls] + [
        f"{server.url}/t/gone.jpg 0:1\n",
        f"{urls[0]} 7:1\n",
    ]
    (folder / "train_urls_from_openimages.txt").write_text("".join(lines))
    lines = [f"n01440764/n01440764_{number}.JPEG\t1:1\t0:0.5\n" for number in (0, 1, 2, 7, 9)]
    (folder / "val_image_id_from_imagenet.txt").write_text("".join(lines))
    command = ("tencent_ml", "--dictionary", f"{HERE}/dictionary.txt")
    command += ("--urls", f"{HERE}/train_urls_from_openimages.txt", "--archives", f"{HERE}/fall11_whole.tar")
    command += ("--image-ids", f"{HERE}/val_image_id_from_imagenet.txt")
    dropped = {"http_404": 1, "missing_image": 1, "corrupt": 1}
    return Miniature(command, {"train-openimages": 3, "val-imagenet": 3}, dropped, True)


def open_images(folder: Path, server: Server) -> Miniature:
    """Originals with their MD5 in base64, one turned, one that was replaced since."""
    rows = io.StringIO()
    rows.write("ImageID,Subset,OriginalURL,License,Title,OriginalMD5,Rotation\n")
    for number, rotation in enumerate(("", "90.0", "0.0", "0.0")):
        content = picture(600 + number)
        url = server.put(f"/oi/{number}.jpg", picture(699) if number == 3 else content)
        md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
        rows.write(f'{number},train,{url},https://cc/by/2.0/,"a ""title"", of\ntwo lines",{md5},{rotation}\n')
    (folder / "images.csv").write_text(rows.getvalue())
    labels = "".join(f"{n},verification,/m/0{label},1\n" for n in range(4) for label in (1, 2))
    (folder / "labels.csv").write_text(f"ImageID,Source,LabelName,Confidence\n{labels}")
    (folder / "names.csv").write_text('LabelName,DisplayName\n/m/01,Cat\n/m/02,"Bow, arrow"\n')
    command = ("open_images", "--from", f"{HERE}/images.csv", "--labels", f"{HERE}/labels.csv")
    command += ("--names", f"{HERE}/names.csv", "--images", "original")
    return Miniature(command, {".": 3}, {"hash_mismatch": 1}, True)


MINIATURES: dict[str, Callable[[Path, Server], Miniature]] = {
    "scenes": scenes,
    "folder": images,
    "laion400m": laion,
    "cc12m": cc12m,
    "yfcc15m": yfcc15m,
    "imagenet22k": imagenet22k,
    "tencent_ml": tencent_ml,
    "open_images": open_images,
}


def built_all(above: Path, server: Server) -> dict[str, Miniature]:
    """Every miniature, written into above / "in" / its name and built into above / "disk" / its name."""
    made = {}
    for name, write in MINIATURES.items():
        folder = above / "in" / name
        folder.mkdir(parents=True)
        made[name] = write(folder, server)
        built_from(name, made[name], str(folder), above / "scratch" / name, str(above / "disk" / name))
    return made


def built_from(name: str, miniature: Miniature, place: str, scratch: Path, out: str) -> None:
    """By the command that a user types, in shards of three; inputs lie at `place`."""
    command = [*miniature.arguments(place), "--out", out, "--vocab-size", "64"]
    if miniature.is_downloaded:
        command += [*LOOPBACK, "--raw-shard-size", "3"]
    else:
        command += ["--shard-size", "3"]
    if "scratch" in SOURCES[name].__dataclass_fields__:
        command += ["--scratch", str(scratch)]
    assert run(*command) == 0
