"""Does a guide become a tokenizer that can stand alone, and does a bad one show?"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pretrain import codebook
from pretrain.codebook import main, make_codebook, reseed_empty, summary, usage
from pretrain.data.decode import decode_image
from pretrain.data.shards import ShardFolder
from pretrain.data.views import center_view
from pretrain.models.guides import open_guide
from tests.data.sets import good_set
from tests.models.guide_folders import (
    SIZE,
    WIDTH,
    own_run,
    vit_folder,
)

CODES, IMAGES, GRID = 12, 21, 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return good_set(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guide")
    vit_folder(folder)
    return folder


@pytest.fixture(scope="module")
def made(guide: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A tokenizer of a guide that is gone since."""
    away = Path(shutil.copytree(guide, tmp_path_factory.mktemp("away") / "guide"))
    out = tmp_path_factory.mktemp("made") / "tokenizer"
    record = make_codebook(arguments(away, data, out))
    shutil.rmtree(away)
    return out, record


def arguments(guide: Path, data: Path, out: Path, codes: int = CODES, *more: str) -> list[str]:
    return [str(guide), "--data", str(data), "--codes", str(codes), "--out", str(out), *more]


def tokens_of(folder: Path, data: Path) -> torch.Tensor:
    """Tokens of all center views, one image at a time, as unit vectors [images, tokens, width]."""
    guide, shards = open_guide(folder), ShardFolder(data)
    views = [center_view(decode_image(shards.sample(index)["jpg"]), SIZE) for index in range(len(shards))]
    return F.normalize(torch.cat([guide(view[None], GRID)[:, 1:] for view in views]), dim=-1)


def test_tokenizer_opens_without_its_guide_and_codes_every_token(
    made: tuple[Path, dict[str, Any]], guide: Path, data: Path
) -> None:
    folder, record = made
    tokenizer, tokens = open_guide(folder), tokens_of(guide, data)
    assert (tokenizer.num_codes, tokenizer.width, tokenizer.grid) == (CODES, WIDTH, GRID)
    torch.testing.assert_close(tokenizer.codebook.norm(dim=1), torch.ones(CODES))
    views = torch.stack([center_view(decode_image(ShardFolder(data).sample(3)["jpg"]), SIZE)])
    assert torch.equal(tokenizer.codes(views, GRID)[0], (tokens[3] @ tokenizer.codebook.T).argmax(dim=1))
    assert record == json.loads((folder / "codebook.json").read_text())
    assert (record["codes"], record["images"], record["tokens"]) == (CODES, IMAGES, IMAGES * GRID**2)
    assert {"commit", "date", "source", "guide_sha256"} <= record.keys()


def test_recorded_usage_is_that_of_all_tokens(
    made: tuple[Path, dict[str, Any]], guide: Path, data: Path
) -> None:
    folder, record = made
    similarity = tokens_of(guide, data).flatten(0, 1).double() @ open_guide(folder).codebook.double().T
    share = similarity.argmax(dim=1).bincount(minlength=CODES) / len(similarity)
    entropy = -sum(p * math.log(p) for p in share.tolist() if p)
    assert record["entropy"] == pytest.approx(entropy) and 0.5 * math.log(CODES) < entropy
    assert record["mean_cosine"] == pytest.approx(similarity.max(dim=1).values.mean().item(), abs=1e-5)
    assert record["used"] == (share > 0).sum()


def test_codes_are_nearer_to_tokens_than_tokens_drawn_at_random(
    made: tuple[Path, dict[str, Any]], guide: Path, data: Path
) -> None:
    tokens = tokens_of(guide, data).flatten(0, 1)
    generator = torch.Generator().manual_seed(0)
    drawn = [tokens[torch.randperm(len(tokens), generator=generator)[:CODES]] for _ in range(20)]
    assert made[1]["mean_cosine"] > max(usage(tokens, entries, CPU)["mean_cosine"] for entries in drawn)


def test_same_seed_gives_the_same_tokenizer(
    made: tuple[Path, dict[str, Any]], guide: Path, data: Path, tmp_path: Path
) -> None:
    make_codebook(arguments(guide, data, tmp_path / "again"))
    make_codebook(arguments(guide, data, tmp_path / "other", CODES, "--seed", "1"))
    first, again, other = (open_guide(folder) for folder in (made[0], tmp_path / "again", tmp_path / "other"))
    assert torch.equal(first.codebook, again.codebook) and first.sha256 == again.sha256
    assert first.sha256 != other.sha256 and first.sha256 != open_guide(guide).sha256


def test_tokenizer_of_our_own_run(data: Path, tmp_path: Path) -> None:
    run = own_run(tmp_path / "run")
    make_codebook(arguments(run, data, tmp_path / "tokenizer", 8, "--images", "5"))
    tokenizer, guide = open_guide(tmp_path / "tokenizer"), open_guide(run)
    views = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(tokenizer(views, 4), guide(views, 4)) and tokenizer.num_codes == 8
    assert not (tmp_path / "tokenizer" / "guide" / "deepspeed").exists()


def test_empty_clusters_get_the_tokens_that_lie_farthest() -> None:
    tokens = F.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.5, 0.5]]), dim=1)
    centres = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    codebook, num_empty = reseed_empty(tokens, centres, CPU)
    assert num_empty == 1 and codebook.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert usage(tokens, codebook, CPU)["used"] == 2


def test_collapsed_codebook_is_told() -> None:
    tokens = F.normalize(torch.randn(40, 8).abs(), dim=1)
    tokens[1:] = tokens[1]
    told = usage(tokens, F.normalize(torch.cat([tokens[:2], -tokens[:2]]), dim=1), CPU)
    assert told["used"] == 2 and told["entropy"] == pytest.approx(
        -sum(p * math.log(p) for p in (1 / 40, 39 / 40))
    )
    record = {"codes": 4, "tokens": 40, "images": 1, "reseeded": 0, **told}
    assert "the codebook is collapsed" in summary(record)
    assert "collapsed" not in summary(record | {"entropy": math.log(4)})


def test_damaged_tokenizer_is_refused(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made[0], tmp_path / "copy"))
    content = bytearray((copy / "codebook.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "codebook.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"since codebook.safetensors has changed since it was written"):
        open_guide(copy)


def test_mistakes_are_told_before_any_image_is_read(
    made: tuple[Path, dict[str, Any]],
    guide: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(codebook, "encode", lambda *_: pytest.fail("images were read"))
    out = tmp_path / "out"
    with pytest.raises(
        ValueError, match=r"--codes 337 must be at most 336, the tokens of 21 images of 4 x 4"
    ):
        make_codebook(arguments(guide, data, out, 337))
    with pytest.raises(ValueError, match=r"--codes 1 must be at least 2"):
        make_codebook(arguments(guide, data, out, 1))
    with pytest.raises(ValueError, match=r"--images 22 must lie in \[1, 21\]"):
        make_codebook(arguments(guide, data, out, CODES, "--images", "22"))
    with pytest.raises(FileNotFoundError, match=r"manifest.json"):
        make_codebook(arguments(guide, tmp_path, out))
    with pytest.raises(FileExistsError, match=r"exists: name a new folder"):
        make_codebook(arguments(guide, data, made[0]))
    with pytest.raises(ValueError, match=r"is a tokenizer of 12 codes: name the guide"):
        make_codebook(arguments(made[0], data, out))
    assert list(tmp_path.iterdir()) == []


def test_failure_leaves_nothing_behind_and_is_one_line(
    guide: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(codebook, "write_codebook", full)
    assert main(arguments(guide, data, tmp_path / "out")) == 1
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err.splitlines()[-1] == "error: No space left on device"
