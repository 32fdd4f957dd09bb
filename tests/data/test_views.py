"""Are the views what the recipe says: crops, flips and colours?"""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision.transforms.v2 import functional as reference

from pretrain.config import Views
from pretrain.data.colour import Change, affine, blur, draw_jitter, solarize
from pretrain.data.views import DrawnView, center_view, cut, draw_crop, draw_views, make_views, resize
from tests.data.sets import picture, recoloured, two_views

PLAIN = Views(size=32, jitter_probability=0.0, grayscale=0.0, blur=(0.0, 0.0), solarize=(0.0, 0.0))


def changed(view: torch.Tensor, **fields: float) -> torch.Tensor:
    return recoloured(view, Change(**fields)).float()


def image_of(seed: int, height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(picture(seed, height, width).copy())


def grained(seed: int, height: int, width: int, grain: int) -> np.ndarray:
    """A picture with so much noise, in levels, of which nothing is clipped: without antialiasing it stays."""
    noise = np.random.RandomState(seed).randint(-grain, grain + 1, (height, width, 3))
    return (picture(seed, height, width) // 4 + 96 + noise).astype(np.uint8)


def test_resize_agrees_with_pillow() -> None:
    image = grained(0, 150, 200, 90)
    pillow = np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC))
    difference = np.abs(resize(torch.from_numpy(image), 64, 64).permute(1, 2, 0).numpy().astype(int) - pillow)
    assert difference.max() <= 6 and difference.mean() < 0.05


def by_pillow(image: Image.Image, drawn: DrawnView, size: int) -> np.ndarray:
    """The view by Pillow's own crop, resize, enhancements, blur and solarize; without hue, which it has not."""
    (top, left, height, width), is_flipped, change = drawn
    whole = ImageOps.mirror(image) if is_flipped else image
    box = (left, top, left + width, top + height)
    view = whole.crop(box).resize((size, size), Image.Resampling.BICUBIC)
    view = ImageEnhance.Brightness(view).enhance(change.brightness)
    view = ImageEnhance.Contrast(view).enhance(change.contrast)
    view = ImageEnhance.Color(view).enhance(change.saturation)
    view = view.filter(ImageFilter.GaussianBlur(change.sigma)) if change.sigma else view
    return np.asarray(ImageOps.solarize(view, 128) if change.solarize else view)


def test_whole_views_agree_with_pillow() -> None:
    settings = Views(size=96, jitter=(0.4, 0.4, 0.2, 0.0), blur_sigma=(0.5, 4.0))
    seen = []
    for seed in range(30):
        image = grained(seed, 150, 200, 8)  # few levels are clipped, where the order of changes counts
        drawn = draw_views(150, 200, settings, Random(seed))
        views, _ = make_views(torch.from_numpy(image), drawn, 96)
        for view, one in zip(views, drawn, strict=True):
            expected = by_pillow(Image.fromarray(image), one, 96).astype(int)
            difference = np.abs(view.permute(1, 2, 0).numpy() - expected)
            # Pillow cuts to whole levels after each change: means of at most 1.6 and single ones of 7 measured
            assert difference.mean() < 2 and difference.max() <= 8
            seen.append(
                (one.is_flipped, one.change.is_recoloured, one.change.sigma > 0, one.change.solarize > 0)
            )
    assert np.array(seen).any(0).all() and not np.array(seen).all(0).any()


def test_a_flipped_view_is_the_crop_of_the_flipped_image() -> None:
    image = image_of(1, 60, 80)
    box = (5, 11, 40, 50)
    first = cut(image, box, True, 32)
    second = cut(image.flip(1).contiguous(), box, False, 32)
    assert int((first.int() - second.int()).abs().max()) <= 1  # mirrored sums round differently


def test_crops_have_the_drawn_share_and_shape_and_lie_inside() -> None:
    generator = Random(0)
    shares, shapes = [], []
    for _ in range(2000):
        top, left, height, width = draw_crop(300, 400, (0.2, 1.0), (3 / 4, 4 / 3), generator)
        assert top >= 0 and left >= 0 and top + height <= 300 and left + width <= 400
        shares.append(height * width / 120_000)
        shapes.append(width / height)
    assert min(shares) > 0.19 and max(shares) > 0.9
    assert min(shapes) > 0.74 and max(shapes) < 1.35
    # uniform share in [0.2, 1] has mean 0.6; large tall boxes do not fit, which lowers it to 0.50
    assert 0.45 < np.mean(shares) < 0.6


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (1, 1)])
def test_an_image_that_no_crop_fits_gives_the_middle(height: int, width: int) -> None:
    top, left, h, w = draw_crop(height, width, (0.9, 1.0), (3 / 4, 4 / 3), Random(0))
    assert h >= 1 and w >= 1 and abs(2 * top + h - height) <= 1 and abs(2 * left + w - width) <= 1
    assert 0.7 < w / h < 1.4
    view = cut(image_of(0, height, width), (top, left, h, w), False, 16)
    assert view.shape == (3, 16, 16)


def test_half_of_the_views_are_flipped_each_on_its_own() -> None:
    image = image_of(2, 40, 40)
    flips = torch.stack([two_views(image, PLAIN, Random(seed))[1][:, 4] for seed in range(400)])
    assert 0.42 < float(flips[:, 0].mean()) < 0.58
    assert 0.42 < float((flips[:, 0] != flips[:, 1]).float().mean()) < 0.58


def test_the_first_view_does_not_depend_on_the_second() -> None:
    image = image_of(3, 60, 60)
    both, boxes = two_views(image, Views(size=32), Random(5))
    alone, box = two_views(image, Views(size=32), Random(5), num_views=1)
    assert torch.equal(both[0], alone[0]) and torch.equal(boxes[0], box[0])
    assert not alone[1].any() and not box[1].any() and both[1].any()


@pytest.mark.parametrize("change", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("factor", [0.7, 1.2])
def test_jitter_agrees_with_torchvision(change: str, factor: float) -> None:
    colours = (image_of(4, 32, 32).permute(2, 0, 1) // 2 + 40).contiguous()  # 40 to 167: nothing is clipped
    expected = getattr(reference, f"adjust_{change}")(colours, factor).float()
    found = changed(colours, **{change: factor})
    # torchvision cuts to whole levels, twice for contrast
    assert float((found - expected).abs().max()) <= 2


def test_hue_turns_as_in_hsv() -> None:
    colours = torch.tensor([200, 90, 60], dtype=torch.uint8)[:, None, None].expand(3, 4, 4).contiguous()
    for turns in (-0.1, -0.05, 0.05, 0.1):
        expected = reference.adjust_hue(colours, turns)[:, 0, 0].float()
        found = changed(colours, hue=turns)[:, 0, 0]
        # the luma stays in YIQ and changes in HSV: compare the direction of the colour
        cosine = torch.nn.functional.cosine_similarity(
            expected - expected.mean(), found - found.mean(), dim=0
        )
        assert float(cosine) > 0.95
    assert torch.equal(changed(colours, hue=1e-9), colours.float())


def test_all_changes_at_once_equal_one_after_the_other_in_any_order() -> None:
    colours = (image_of(5, 16, 16).numpy() / 3 + 80).reshape(-1, 3)
    change = Change(brightness=1.1, contrast=0.8, saturation=0.7, hue=0.05)

    def after(colours: np.ndarray, change: Change) -> np.ndarray:
        matrix = affine(change, colours.mean(0).tolist())
        return colours @ matrix[:, :3].T + matrix[:, 3]

    for names in permutations(("brightness", "contrast", "saturation", "hue")):
        single = colours
        for name in names:
            single = after(single, Change(**{name: getattr(change, name)}))
        np.testing.assert_allclose(after(colours, change), single, rtol=1e-9)


def test_jitter_is_drawn_within_its_bounds() -> None:
    draws = [draw_jitter((0.4, 0.4, 0.2, 0.1), Random(seed)) for seed in range(500)]
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
    ):
        values = [getattr(draw, name) for draw in draws]
        assert low <= min(values) < low + 0.02 and high - 0.02 < max(values) <= high


@pytest.mark.parametrize(("sigma", "taps"), [(0.2, 3), (1.3, 7), (2.0, 13)])
def test_blur_agrees_with_torchvision(sigma: float, taps: int) -> None:
    levels = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = reference.gaussian_blur(levels.float(), [taps, taps], [sigma, sigma])
    found = torch.from_numpy(blur(levels.permute(1, 2, 0).contiguous().numpy(), sigma)).permute(2, 0, 1)
    # rounded to whole levels, from float32 sums of 169 terms
    torch.testing.assert_close(found.float(), expected, atol=0.501, rtol=0)


def test_solarize_inverts_bright_levels() -> None:
    view = torch.arange(256, dtype=torch.uint8)[:255].view(3, 85, 1).expand(3, 85, 85).contiguous()
    assert np.array_equal(solarize(view.numpy()), reference.solarize(view, 128).numpy())


@pytest.mark.parametrize("what", ["jitter_probability", "grayscale", "blur", "solarize"])
def test_each_change_happens_by_its_own_field(what: str) -> None:
    image = image_of(7, 40, 40)
    always = (1.0, 1.0) if what in ("blur", "solarize") else 1.0
    settings = replace(PLAIN, blur_sigma=(7.0, 9.0), **{what: always})  # 1 to 1.3 pixels here
    results = torch.stack([two_views(image, settings, Random(seed), 1)[0][0] for seed in range(5)])
    unchanged = torch.stack([two_views(image, PLAIN, Random(seed), 1)[0][0] for seed in range(5)])
    assert (results != unchanged).flatten(1).any(1).all()
    if what == "grayscale":
        assert int((results.int() - results[:, :1].int()).abs().max()) <= 1


def test_the_second_view_has_probabilities_of_its_own() -> None:
    image = image_of(8, 40, 40)
    settings = replace(PLAIN, solarize=(0.0, 1.0), flip=0.0, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    views, _ = two_views(image, settings, Random(0))
    assert np.array_equal(solarize(views[0].numpy()), views[1].numpy())


@pytest.mark.parametrize(("height", "width"), [(50, 100), (100, 50), (33, 34), (20, 20), (3, 500)])
def test_center_view_is_the_middle_square(height: int, width: int) -> None:
    image = torch.zeros(height, width, 3, dtype=torch.uint8)
    image[..., 0] = (torch.arange(height) * 255 // height)[:, None]
    image[..., 1] = torch.arange(width) * 255 // width
    view = center_view(image, 32).float()
    assert view.shape == (3, 32, 32)
    assert (
        abs(float(view[0].mean()) - 127) < 4 + 255 / height
        and abs(float(view[1].mean()) - 127) < 4 + 255 / 32
    )
