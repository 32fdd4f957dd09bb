"""Does the dense probe measure what lies below tokens, and is its mean IoU the textbook's?"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score

from pretrain.checkpoint import load_towers
from pretrain.data.faults import BadSample
from pretrain.data.views import center_mask, center_view
from pretrain.evaluate import dense
from pretrain.evaluate.asked import Protocols
from pretrain.evaluate.dense import DenseFeatures, Sampling, dense_probe, token_shares
from pretrain.evaluate.features import Pictures, extract
from pretrain.evaluate.masks import read_mask
from pretrain.evaluate.protocols import evaluate_checkpoint
from pretrain.evaluate.regions import count_pixels, score_regions
from pretrain.evaluate.result import table
from tests.evaluate.sets import COLORS, write_set

KINDS = ("ant", "bee")
NAMES = ("ground", *KINDS)
GRID, PATCH = 4, 8


def bands(n: int, seed: int, share_of_ground: int = 1) -> torch.Tensor:
    """Class maps of upright bands, one or more tokens wide, int16 [n, 32, 32]."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.tensor([0] * share_of_ground + [1, 2], dtype=torch.int16)
    columns = classes[torch.randint(len(classes), (n, 1, GRID), generator=generator)]
    return columns.repeat_interleave(PATCH, 2).expand(-1, GRID * PATCH, -1).contiguous()


def features(classes: torch.Tensor, tokens: torch.Tensor, kinds: tuple[str, ...] = KINDS) -> DenseFeatures:
    places = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    return DenseFeatures(tokens, places, classes, kinds, GRID)


def one_hot(classes: torch.Tensor) -> torch.Tensor:
    cells = classes[:, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH].flatten(1).long()
    return torch.nn.functional.one_hot(cells, 3).float()


def test_mean_iou_by_hand() -> None:
    # Truth 0 0 1 1 / 2 2 0 0, said 0 1 1 1 / 2 0 0 0: IoU 3/5, 2/3, 1/2.
    truth = torch.tensor([[[0, 0, 1, 1], [2, 2, 0, 0]]])
    said = torch.tensor([[[0, 1, 1, 1], [2, 0, 0, 0]]])
    counts = count_pixels(said, truth, 4)
    assert counts.tolist() == [[[3, 2, 1, 0], [4, 3, 1, 0], [4, 2, 2, 0]]]
    row = score_regions(counts, (*NAMES, "absent"))
    assert row["iou"] == pytest.approx({"ground": 3 / 5, "ant": 2 / 3, "bee": 1 / 2})  # absent: left out
    assert row["accuracy"] == pytest.approx((3 / 5 + 2 / 3 + 1 / 2) / 3)
    assert row["pixel_accuracy"] == pytest.approx(6 / 8) and row["metric"] == "mIoU" and row["n"] == 1
    # Ground everywhere: 4 of 8 pixels, nothing of the other two classes.
    assert row["chance"] == row["majority"] == pytest.approx(4 / 8 / 3)


def test_mean_iou_agrees_with_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    said, truth = (torch.randint(5, (7, 9, 9), generator=generator) for _ in range(2))
    row = score_regions(count_pixels(said, truth, 5), "abcde")
    theirs = jaccard_score(truth.flatten().numpy(), said.flatten().numpy(), average="macro")
    assert row["accuracy"] == pytest.approx(theirs)


def test_interval_is_the_spread_of_resampled_images() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(3, (40, 8, 8), generator=generator)
    is_right = torch.rand(40, 8, 8, generator=generator) < torch.rand(40, 1, 1, generator=generator)
    counts = count_pixels(torch.where(is_right, truth, (truth + 1) % 3), truth, 3)
    draw = np.random.default_rng(1)
    values = []
    for _ in range(2000):  # one by one, by the definition
        right, said, true = counts[draw.integers(0, 40, 40)].sum(0).double()
        values.append(float((right / (said + true - right)).mean()))
    row = score_regions(counts, NAMES)
    # Two bootstraps of 1000 and 2000 draws place a 2.5 % quantile within about a tenth of the interval.
    slack = 0.1 * (row["interval"][1] - row["interval"][0])
    assert row["interval"] == pytest.approx(np.quantile(values, [0.025, 0.975]).tolist(), abs=slack)
    assert row == score_regions(counts, NAMES)  # seeded


def test_a_single_image_has_no_interval_and_the_table_says_why() -> None:
    told = "no interval, which takes 2 images or more, and 1 was tested on"
    row, two = (score_regions(count_pixels(bands(n, 0), bands(n, 1), 3), NAMES) for n in (1, 2))
    assert row["interval"] is None and row["n"] == 1 and row["no_interval"] == told
    assert len(two["interval"]) == 2 and "no_interval" not in two
    *_, cells, note = table({"checkpoints": {"step_1": {"dense": row}}}).splitlines()
    assert cells.endswith(f" {100 * row['accuracy']:.1f}") and note == f"dense probe, mIoU, step_1: {told}"


def test_features_that_are_the_class_give_one() -> None:
    train, heldout = bands(60, 0), bands(20, 1)
    counts, names = dense_probe(features(train, one_hot(train)), features(heldout, one_hot(heldout)))
    row = score_regions(counts, names)
    assert names == NAMES and row["accuracy"] == row["pixel_accuracy"] == 1.0


def test_constant_features_give_the_ground_alone() -> None:
    train, heldout = bands(60, 0, share_of_ground=3), bands(20, 1, share_of_ground=3)
    constant = torch.full((60, GRID**2, 3), 0.3)
    counts, names = dense_probe(features(train, constant), features(heldout, constant[:20]))
    row = score_regions(counts, names)
    assert row["accuracy"] == row["chance"] == pytest.approx(float((heldout == 0).double().mean()) / 3)


def test_kinds_are_matched_by_name_and_unknown_ones_count_as_missed() -> None:
    train, heldout = bands(60, 0), bands(20, 1)
    other = torch.tensor([0, 2, 1], dtype=torch.int16)[heldout.int()]  # the same pixels, numbered bee, ant
    counts, names = dense_probe(
        features(train, one_hot(train)), features(other, one_hot(heldout), ("bee", "ant"))
    )
    assert score_regions(counts, names)["accuracy"] == 1.0
    counts, names = dense_probe(
        features(train, one_hot(train)), features(heldout, one_hot(heldout), ("ant", "cow"))
    )
    row = score_regions(counts, names)
    assert names == ("ground", "ant", "bee", "cow") and row["iou"] == {
        "ground": 1,
        "ant": 1,
        "bee": 0,
        "cow": 0,
    }


def test_fit_agrees_with_scikit_learn_on_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(200, 5, generator=generator)
    tokens = (tokens - tokens.mean(0)) / tokens.std(0, correction=0)
    pixels = torch.randint(3, (200, 8), generator=generator)  # eight pixels below each token
    pixels[tokens[:, 0] > 0.5] = 2
    shares = torch.nn.functional.one_hot(pixels, 3).float().mean(1)
    ours = dense.fit(tokens, shares).logits(tokens).softmax(1)
    # scikit-learn's C weighs the sum of the losses, PENALTY the mean: C = 1 / (PENALTY x examples).
    theirs = LogisticRegression(C=1 / (dense.PENALTY * 1600), tol=1e-8, max_iter=5000)
    theirs.fit(tokens.repeat_interleave(8, 0).double().numpy(), pixels.flatten().numpy())
    probabilities = torch.from_numpy(theirs.predict_proba(tokens.double().numpy())).float()
    # L-BFGS in float32 stops at a gradient of 1e-5.
    torch.testing.assert_close(ours, probabilities, rtol=0, atol=2e-3)


def test_token_shares_are_those_of_its_pixels() -> None:
    classes = torch.randint(3, (2, 6, 6), generator=torch.Generator().manual_seed(0))
    shares = token_shares(classes, 3, 3)
    for image in range(2):
        for row in range(3):
            for column in range(3):
                below = classes[image, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                plain = [float((below == kind).double().mean()) for kind in range(3)]
                assert shares[image, 3 * row + column].tolist() == plain


@pytest.mark.parametrize(("height", "width"), [(50, 73), (73, 50), (32, 32), (20, 31)])
@pytest.mark.parametrize("is_upright", [True, False])
def test_mask_is_cropped_as_its_image(height: int, width: int, is_upright: bool) -> None:
    # A bright band with straight edges: every pixel of the view is brighter than half if and only if its centre
    # lies in the band, however the view was resized.
    mask = torch.zeros(height, width, dtype=torch.int16)
    if is_upright:
        mask[:, 3 * width // 7 : 5 * width // 7] = 1
    else:
        mask[3 * height // 7 : 5 * height // 7] = 1
    image = (255 * mask)[..., None].expand(-1, -1, 3).to(torch.uint8)
    assert torch.equal(center_mask(mask, 32), (center_view(image, 32)[0] > 127).to(torch.int16))


def test_mask_that_fits_no_image_or_record_is_refused() -> None:
    png = io.BytesIO()
    Image.fromarray(np.full((40, 50), 2, np.uint8)).save(png, "PNG")
    record = json.dumps({"objects": [{"name": "ant"}, {"name": "bee"}]}).encode()
    members = {"mask.png": png.getvalue(), "json": record}
    assert read_mask(members, 40, 50, 16).kinds == KINDS and read_mask({"json": record}, 40, 50, 16) is None
    for bad in (
        {"json": b'{"objects": [{"name": "ant"}]}'},
        {"json": b"{}"},
        {"mask.png": png.getvalue()[:40]},
    ):
        with pytest.raises(BadSample) as error:
            read_mask(members | bad, 40, 50, 16)
        assert error.value.reason == "bad_mask"
    with pytest.raises(BadSample, match="40 x 51 pixels"):
        read_mask(members, 40, 51, 16)


def test_tokens_are_those_of_the_encoder_at_their_places(run_folder: Path, data: Path) -> None:
    run, _, towers = load_towers(run_folder / "checkpoints" / "step_000003")
    device = torch.device("cpu")
    few, every = (
        extract(
            towers,
            run,
            data / "heldout",
            device=device,
            workers=0,
            title="test",
            dense=Sampling(images, tokens),
        )
        for images, tokens in ((5, 3), (20, None))
    )
    assert few.dense.tokens.shape[:2] == (5, 3) and every.dense.places[0].tolist() == list(range(16))
    chosen = every.dense.tokens[::4]  # five of twenty, evenly spread
    for row in range(5):
        assert torch.equal(few.dense.tokens[row], chosen[row, few.dense.places[row]])
    torch.testing.assert_close(every.dense.tokens.mean(1), every.tokens)
    # The ground is the left 20 of 56 columns, of which the view shows the middle 40 as 64 pixels.
    picture = Pictures(data / "heldout", run.views.size, masked=frozenset({0}))[0]
    assert picture.mask.kinds == ("red",) and (picture.mask.numbers == 0).sum(1).tolist() == [19] * 64
    dark = picture.view.float().amax(0) < 100
    assert (dark == (picture.mask.numbers == 0)).float().mean() > 0.97  # the edge is blurred and noisy


def test_data_without_masks_is_not_measured(run_folder: Path, tmp_path: Path) -> None:
    train, heldout = (
        write_set(tmp_path / split, split, 3, masks=False, seed=seed)
        for seed, split in enumerate(("train", "heldout"))
    )
    step = run_folder / "checkpoints" / "step_000003"
    rows = evaluate_checkpoint(step, train, heldout, Protocols(probes=("dense",), ks=(1,)))
    assert rows["dense"] == {"accuracy": None, "reason": "the data set has no masks"}


def test_colors_on_black_are_segmented_even_by_an_untrained_encoder(run_folder: Path, data: Path) -> None:
    step = run_folder / "checkpoints" / "step_000003"
    rows = evaluate_checkpoint(step, data / "train", data / "heldout", Protocols(probes=("dense",)))
    assert set(rows) == {"dense", "dropped"} and set(rows["dense"]["iou"]) == {"ground", *COLORS}
    assert rows["dense"]["accuracy"] > 2 * rows["dense"]["chance"]
    assert json.loads(json.dumps(rows)) == rows
