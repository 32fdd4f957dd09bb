"""Does every DCNv3 path compute the published operator and its derivatives?"""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from torch import Tensor

from pretrain.kernels import dcnv3_gather
from pretrain.kernels.dcnv3 import PATHS, dcnv3, dcnv3_packed
from pretrain.kernels.dcnv3_sparse import _dot_gathered, _dot_sampled
from tests.paths import SHARED, needs_shared

PLAIN = ("reference", "sparse")  # paths without a compilation of many seconds, in every dtype
GOLDEN = SHARED / "golden"

# torch.compile looks at the .grad of its inputs and hides the warning from all but a filter that raises it:
# torch/_dynamo/variables/builder.py, safe_has_grad.
# torch 2.11 uses what it deprecates when it first compiles: torch/utils/mkldnn.py, script_method.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]


def inputs(
    seed: int = 0, spread: float = 1.0, dtype: torch.dtype = torch.float32, points: int = 9
) -> list[Tensor]:
    """value [3, 5, 7, 8], offset and mask of 2 groups, and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    value, grad = torch.randn(2, 3, 5, 7, 8, generator=generator, dtype=dtype)
    offset = torch.randn(3, 5, 7, 4 * points, generator=generator, dtype=dtype) * spread
    mask = torch.rand(3, 5, 7, 2, points, generator=generator, dtype=dtype).softmax(-1).flatten(-2).clone()
    return [value.requires_grad_(), offset.requires_grad_(), mask.requires_grad_(), grad]


def derivatives(
    path: str, value: Tensor, offset: Tensor, mask: Tensor, grad: Tensor, **options
) -> list[Tensor]:
    out = dcnv3(value, offset, mask, groups=2, path=path, **options)
    return [out.detach(), *torch.autograd.grad(out, (value, offset, mask), grad)]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@needs_shared
@pytest.mark.parametrize("path", PATHS)
# 5 before the others: no two of its sizes are equal, so that what is compiled for it serves them too, but for 1.
@pytest.mark.parametrize("case", [5, 0, 1, 2, 3, 4])
def test_outputs_and_gradients_equal_the_published_operator(path, case):
    np = pytest.importorskip("numpy")
    options = json.loads((GOLDEN / "dcnv3_op_cases.json").read_text())[case]
    del options["group_channels"]
    with np.load(GOLDEN / "dcnv3_op.npz") as stored:
        golden = {key: torch.from_numpy(stored[f"case{case}_{key}"]) for key in (
            "input", "offset", "mask", "output", "grad_output", "grad_input", "grad_offset", "grad_mask"
        )}  # fmt: skip
    leaves = [golden[key].requires_grad_() for key in ("input", "offset", "mask")]
    out = dcnv3(*leaves, path=path, **options)
    out.backward(golden["grad_output"])
    found = [out.detach(), *(leaf.grad for leaf in leaves)]
    for tensor, key in zip(found, ("output", "grad_input", "grad_offset", "grad_mask"), strict=True):
        assert relative(tensor, golden[key]) < 1e-5, key  # float32 against float64: 8e-7 measured


@pytest.mark.parametrize("largest", [0, 196], ids=["gathered", "dense"])
@pytest.mark.parametrize("spread", [0.0, 1.5, 100.0])
def test_both_compiled_variants_equal_the_reference(monkeypatch, largest, spread):
    monkeypatch.setattr(dcnv3_gather, "MULTIPLIED_POSITIONS", largest)
    arguments = inputs(spread=spread)
    pairs = zip(derivatives("compiled", *arguments), derivatives("reference", *arguments), strict=True)
    for fast, slow in pairs:
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=2e-6)


def test_the_compiled_variant_follows_the_size_of_the_map(monkeypatch):
    asked = []
    monkeypatch.setattr(dcnv3_gather, "_compiled", lambda variant: asked.append(variant) or variant)
    for side in (14, 15):
        value, offset, mask = (
            torch.rand(1, side, side, 2),
            torch.rand(1, side, side, 18),
            torch.rand(1, side, side, 9),
        )
        dcnv3(value, offset, mask, path="compiled")
    assert asked == [dcnv3_gather._dense, dcnv3_gather._gathered]


@pytest.mark.parametrize("variant", [dcnv3_gather._dense, dcnv3_gather._gathered])
def test_a_location_that_is_not_a_number_is_seen_in_the_output(monkeypatch, variant):
    monkeypatch.setattr(dcnv3_gather, "_compiled", lambda _: variant)
    value, offset, mask = torch.rand(1, 3, 3, 2), torch.rand(1, 3, 3, 18), torch.rand(1, 3, 3, 9)
    offset[0, 1, 1, 4] = torch.nan
    out = dcnv3(value, offset, mask, path="compiled")
    assert out[0, 1, 1].isnan().all() and out.isnan().sum() == 2


@pytest.mark.parametrize("path", PLAIN)
def test_maps_that_came_from_channels_first_are_taken(path):
    *leaves, grad = inputs()
    expected = derivatives(path, *leaves, grad)
    turned = [leaf.detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for leaf in leaves]
    found = derivatives(path, *(leaf.requires_grad_() for leaf in turned), grad)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("path", PLAIN)
def test_an_empty_batch_gives_an_empty_map_and_empty_gradients(path):
    *leaves, grad = (tensor[:0] for tensor in inputs())
    found = derivatives(path, *leaves, grad)
    assert [tuple(tensor.shape) for tensor in found] == [tuple(t.shape) for t in (grad, *leaves)]


@pytest.mark.parametrize(("change", "message"), [
    ({"groups": 0}, r"groups=0 must be a whole number of at least 1"),
    ({"stride": 0}, r"stride=0 must be"),
    ({"dilation": 0}, r"dilation=0 must be"),
    ({"value": torch.zeros(2, 5, 7, 8, dtype=torch.int32)}, r"floating point, not torch\.int32"),
    ({"value": torch.zeros(5, 7, 8)}, r"with 3 axes"),
    ({"path": "triton"}, r"path='triton' takes packed rows: call dcnv3_packed"),
])  # fmt: skip
def test_what_cannot_be_sampled_is_named(change, message):
    value, offset, mask, _ = inputs()
    arguments = {"value": value, "offset": offset, "mask": mask, "groups": 2} | change
    with pytest.raises(ValueError, match=message):  # users have no shape checker before it
        inspect.unwrap(dcnv3)(**arguments)


@pytest.mark.parametrize(("packed", "message"), [
    (torch.zeros(1, 3, 3, 1, 24), r"must be \[n, h, w, groups, 32\]"),
    (torch.zeros(1, 3, 3, 32), r"must be \[n, h, w, groups, 32\]"),
    (torch.zeros(1, 3, 3, 1, 32).bfloat16(), r"in torch\.bfloat16, but must be .* torch\.float32"),
    (torch.zeros(1, 3, 3, 0, 32), r"groups=0 must be"),
])  # fmt: skip
def test_packed_rows_that_do_not_fit_are_named(packed, message):
    with pytest.raises(ValueError, match=message):  # users have no shape checker before it
        inspect.unwrap(dcnv3_packed)(torch.zeros(1, 3, 3, 16), packed, has_scale=True)


@pytest.mark.parametrize("spread", [0.0, 1e-9, 1.0, 8.0, 100.0])
def test_sparse_path_equals_the_reference_near_and_far_outside_the_map(spread):
    arguments = inputs(spread=spread)
    pairs = zip(derivatives("sparse", *arguments), derivatives("reference", *arguments), strict=True)
    for fast, slow in pairs:
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("path", PLAIN)
@pytest.mark.parametrize("options", [{}, {"offset_scale": 0.5}, {"remove_center": True}])
def test_gradcheck_in_float64_away_from_integers(path, options):
    value, offset, mask, _ = inputs(dtype=torch.float64, points=9 - options.get("remove_center", False))
    step = 1 / options.get("offset_scale", 1.0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # 0.1 to 0.4 pixels beyond integers (and beyond halves where the grid is halved)
        share = torch.rand(offset.shape, generator=generator, dtype=offset.dtype)
        offset.copy_((offset.floor() + 0.1 + 0.3 * share) * step)
        value, offset, mask = (t[:1, :3, :3] for t in (value, offset, mask))
    leaves = [t.detach().clone().requires_grad_() for t in (value, offset, mask)]
    assert torch.autograd.gradcheck(
        lambda *a: dcnv3(*a, groups=2, path=path, **options), leaves, fast_mode=True
    )


@pytest.mark.parametrize("path", PLAIN)
def test_offset_gradient_at_zero_offsets_is_the_forward_difference(path):
    value, offset, mask, grad = inputs(spread=0.0, dtype=torch.float64)
    _, _, grad_offset, _ = derivatives(path, value, offset, mask, grad)
    step = 1e-6
    with torch.no_grad():
        for place in [(0, 0, 0, 0), (0, 0, 0, 1), (1, 2, 3, 8), (1, 4, 6, 35), (0, 4, 6, 17), (1, 0, 6, 20)]:
            moved = offset.clone()
            moved[place] += step
            change = dcnv3(value, moved, mask, groups=2) - dcnv3(value, offset, mask, groups=2)
            assert float((change * grad).sum() / step) == pytest.approx(float(grad_offset[place]), abs=1e-7)


def test_zero_offsets_and_equal_masks_are_a_box_filter():
    value = torch.randn(1, 6, 4, 8, generator=torch.Generator().manual_seed(0))
    out = dcnv3(value, torch.zeros(1, 6, 4, 36), torch.full((1, 6, 4, 18), 1 / 9), groups=2)
    box = torch.nn.functional.avg_pool2d(value.permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(out, box)


def test_remove_center_equals_a_center_of_weight_zero():
    value, offset, mask, _ = inputs(points=8)
    without = dcnv3(value, offset, mask, groups=2, remove_center=True)
    padded = [torch.cat([a[..., :4, :], torch.zeros_like(a[..., :1, :]), a[..., 4:, :]], -2) for a in (
        offset.unflatten(-1, (2, 8, 2)), mask.unflatten(-1, (2, 8, 1))
    )]  # fmt: skip
    torch.testing.assert_close(without, dcnv3(value, *(p.flatten(3) for p in padded), groups=2))


def test_a_moved_point_samples_x_before_y():
    value = torch.zeros(1, 5, 5, 1)
    value[0, 2, 4] = 1.0  # row 2, column 4
    offset, mask = torch.zeros(1, 5, 5, 18), torch.zeros(1, 5, 5, 9)
    mask[..., 5] = 1.0  # sixth point: column step 0, row step +1
    offset[..., 10], offset[..., 11] = 2.0, -1.0
    out = dcnv3(value, offset, mask)
    assert out[0, 2, 2, 0] == 1 and out.sum() == 1


def test_bfloat16_stays_close_to_float32():
    arguments = [a.detach() for a in inputs()]
    rounded = [a.bfloat16().requires_grad_() for a in arguments[:3]] + [arguments[3].bfloat16()]
    narrow = derivatives("sparse", *rounded)
    wide = derivatives("sparse", *(a.detach().float().requires_grad_() for a in rounded))
    for a, b in zip(narrow, wide, strict=True):
        assert a.dtype == torch.bfloat16
        assert relative(a.float(), b) < 4e-3  # one rounding of the result; all sums are float32


def test_sparse_path_is_deterministic():
    first, second = (derivatives("sparse", *inputs(spread=3.0)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_are_left_out_where_nobody_asks():
    value, offset, mask, grad = inputs()
    for leaf in (value, offset, mask):
        alone = [a if a is leaf else a.detach() for a in (value, offset, mask)]
        found = torch.autograd.grad(dcnv3(*alone, groups=2), leaf, grad)[0]
        expected = torch.autograd.grad(dcnv3(value, offset, mask, groups=2), leaf, grad)[0]
        assert torch.equal(found, expected)


def test_nan_offsets_give_nan_and_no_crash():
    value, offset, mask, grad = inputs()
    with torch.no_grad():
        offset[0, 2, 3, 0] = float("nan")
    out, *_ = derivatives("sparse", value, offset, mask, grad)
    assert out[0, 2, 3].isnan().any() and out[1].isfinite().all()


def test_both_dot_products_agree():
    generator = torch.Generator().manual_seed(0)
    rows, table = torch.randn(6, 4, generator=generator), torch.randn(9, 4, generator=generator)
    index = torch.randint(9, (6, 5), generator=generator, dtype=torch.int32)
    torch.testing.assert_close(_dot_sampled(rows, table, index), _dot_gathered(rows, table, index))


def test_wrong_shapes_and_paths_are_refused_with_the_expected_ones():
    value, offset, mask, _ = inputs()
    with pytest.raises(ValueError, match=r"needs \(3, 5, 7, 36\)"):
        dcnv3(value, mask, mask, groups=2)
    with pytest.raises(ValueError, match="multiple of groups=3"):
        dcnv3(value, offset, mask, groups=3)
    with pytest.raises(ValueError, match="choose from"):
        dcnv3(value, offset, mask, groups=2, path="fastest")
