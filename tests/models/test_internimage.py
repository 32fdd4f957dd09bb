"""Is InternImage the published network: keys, numbers, initialisation, stages?"""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from pretrain.kernels.dcnv3 import dcnv3_packed
from pretrain.kernels.dcnv3_choice import Choice
from pretrain.models import internimage_block
from pretrain.models.internimage import (
    INTERNIMAGE,
    InternImage,
    InternImageClassifier,
    InternImageConfig,
    StrideTokens,
    stage_maps,
    stride_tokens,
)
from pretrain.models.internimage_block import DCNv3
from pretrain.models.internimage_layouts import config_from_published
from pretrain.models.pooling import init_linear_and_norm
from tests.paths import ROOT, SHARED, needs_shared

GOLDEN = SHARED / "golden"
PUBLISHED = [f"internimage_{size}" for size in ("t", "s", "b", "l", "xl", "h", "g")]
TINY = InternImageConfig(channels=16, depths=(1, 1, 2), groups=(1, 2, 4))


def weight_by_rule(key: str, tensor: Tensor) -> Tensor:
    """The weight that the golden values were made with (../shared/golden/README.md)."""
    np = pytest.importorskip("numpy")
    if not tensor.is_floating_point():
        return tensor
    w = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(tensor.shape))
    if key.endswith("running_var"):
        w = 1 + 0.2 * abs(w)
    elif "gamma" in key:
        w = 0.5 + 0.2 * w
    elif w.ndim == 1:
        w = 1 + 0.2 * w if key.endswith("weight") else 0.1 * w
    else:
        w = w / (w.size / w.shape[0]) ** 0.5
    return torch.from_numpy(w.astype("float32"))


@needs_shared
@pytest.mark.parametrize("name", ["tiny_t", "tiny_s", "tiny_xl", "tiny_h", "tiny_g"])
def test_tiny_models_give_the_published_numbers(name):
    np = pytest.importorskip("numpy")
    entry = json.loads((GOLDEN / "internimage_tiny.json").read_text())[name]
    model = InternImageClassifier(config_from_published(entry["config"]), entry["num_classes"]).eval()
    state = {key: weight_by_rule(key, tensor) for key, tensor in model.state_dict().items()}
    assert {key: list(tensor.shape) for key, tensor in state.items()} == entry["state_dict"]
    model.load_state_dict(state)
    images = torch.from_numpy(np.random.RandomState(0).standard_normal((2, 3, 64, 96)).astype("float32"))
    with torch.no_grad():
        maps = stage_maps(model.patch_embed, model.levels, images)
        found = {f"stage{i}": m for i, m in enumerate(maps)} | {"logits": model(images)}
        if model.config.use_clip_projector:
            tokens = stride_tokens(model.dcnv3_head_x3, model.dcnv3_head_x4, maps)
            found |= {"stride16": tokens.permute(0, 3, 1, 2), "pooled": model.features(maps)}
    with np.load(GOLDEN / "internimage_tiny.npz") as stored:
        golden = {k.removeprefix(f"{name}_"): stored[k] for k in stored.files if k.startswith(f"{name}_")}
    assert found.keys() == golden.keys()
    for key, expected in golden.items():
        error = abs(found[key].numpy() - expected).max() / abs(expected).max()
        assert error < 1e-5, key  # float32 against float64: 2e-6 measured


@needs_shared
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_published_keys_shapes_and_parameters(name):
    entry = json.loads((GOLDEN / "internimage_state_dicts.json").read_text())[name]
    assert INTERNIMAGE[name] == config_from_published(entry["config"])
    with torch.device("meta"):
        model = InternImageClassifier(INTERNIMAGE[name], entry["num_classes"])
        backbone = InternImage(INTERNIMAGE[name])
    shapes = [(key, list(tensor.shape)) for key, tensor in model.state_dict().items()]
    assert shapes == list(entry["state_dict"].items())
    assert sum(p.numel() for p in model.parameters()) == entry["parameters"]
    assert sum(p.numel() for p in backbone.parameters()) == entry["backbone_parameters"]


def test_three_stages_give_three_maps_and_tokens_of_stride_8():
    backbone, tokens = InternImage(TINY), StrideTokens(TINY, width=24)
    maps = backbone(torch.randn(2, 3, 64, 32))
    assert [tuple(m.shape) for m in maps] == [(2, 16, 8, 16), (2, 8, 4, 32), (2, 4, 2, 64)]
    assert tokens.stride == 8 and tokens(maps).shape == (2, 8, 4, 24)


def test_tokens_of_one_coarse_position_start_equal():
    heads = StrideTokens(TINY, width=24)
    fine, coarse = torch.zeros(1, 4, 4, 32), torch.randn(1, 2, 2, 64)
    tokens = heads([fine, coarse])
    first = tokens[:, ::2, ::2]
    for y, x in ((0, 1), (1, 0), (1, 1)):
        torch.testing.assert_close(tokens[:, y::2, x::2], first)
    assert first.std(dim=(1, 2)).min() > 0


def test_image_sides_that_break_the_token_grid_are_refused():
    maps = InternImage(TINY)(torch.randn(1, 3, 40, 32))
    with pytest.raises(ValueError, match="multiples of the last stage's stride"):
        StrideTokens(TINY)(maps)


VARIANTS = {
    "pre_norm": TINY,
    "post_norm": replace(TINY, post_norm=True, layer_scale=0.5),
    "res_post_norm": replace(
        TINY, res_post_norm=True, center_feature_scale=True, level2_post_norm_block_ids=(0,), dw_kernel_size=5
    ),
    "remove_center": replace(TINY, remove_center=True, layer_scale=0.1),
}


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_initialisation_leaves_no_parameter_as_it_was(name, head):
    model = InternImageClassifier(replace(VARIANTS[name], use_clip_projector=head), 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.apply(init_linear_and_norm)
    assert [key for key, parameter in model.named_parameters() if not parameter.isfinite().all()] == []


def test_initialisation_is_the_published_one():
    torch.manual_seed(0)
    config = replace(TINY, center_feature_scale=True, layer_scale=0.3, channels=64, groups=(4, 8, 16))
    model = InternImage(config)
    for dcn in (m for m in model.modules() if isinstance(m, DCNv3)):
        for linear in (dcn.offset, dcn.mask):
            assert not linear.weight.any() and not linear.bias.any()
        bound = (6 / sum(dcn.input_proj.weight.shape)) ** 0.5  # Xavier-uniform
        for linear in (dcn.input_proj, dcn.output_proj):
            assert linear.weight.abs().max() <= bound and linear.weight.std() > 0.5 * bound
        assert not dcn.center_feature_scale_proj_weight.any()
    block = model.levels[0].blocks[0]
    assert (block.gamma1 == 0.3).all() and (block.gamma2 == 0.3).all()
    assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert all((m.weight == 1).all() for m in model.modules() if isinstance(m, nn.LayerNorm))
    assert not any(m.bias.any() for m in model.modules() if isinstance(m, (nn.Linear, nn.LayerNorm)))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_receives_a_gradient(name):
    torch.manual_seed(0)
    model = InternImage(VARIANTS[name])
    sum(m.square().sum() for m in model(torch.randn(1, 3, 32, 32))).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("choice", ["selective", "full"])
def test_checkpointed_blocks_give_the_same_gradients(choice):
    torch.manual_seed(0)
    config = replace(
        VARIANTS["res_post_norm"], drop_path_rate=0.3
    )  # the recomputation draws the same branches
    plain, checkpointed = InternImage(config), InternImage(config, activation_checkpoint=choice)
    checkpointed.load_state_dict(plain.state_dict())
    images, gradients = torch.randn(2, 3, 32, 32), []
    for model in (plain, checkpointed):
        torch.manual_seed(1)
        sum(m.square().sum() for m in model(images)).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_drop_path_rests_in_eval_mode():
    torch.manual_seed(0)
    model, images = InternImage(replace(TINY, drop_path_rate=0.9)).eval(), torch.randn(1, 3, 32, 32)
    assert torch.equal(model(images)[-1], model(images)[-1])


def test_an_empty_batch_gives_empty_maps():
    maps = InternImage(TINY)(torch.zeros(0, 3, 32, 32))
    assert [len(stage_map) for stage_map in maps] == [0] * len(maps)


def test_a_model_trains_under_autocast():
    torch.manual_seed(0)
    model = InternImage(TINY)
    with torch.autocast("cpu", torch.bfloat16):
        maps = model(torch.randn(1, 3, 32, 32))
    sum(stage_map.float().square().sum() for stage_map in maps).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_cpu_model_compiles_without_graph_break():
    """In a process without the shape checker, which no compiler can trace."""
    script = str(ROOT / "tests" / "models" / "compiled_model.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert errors.keys() == {"fixed sizes", "any size"}
    assert max(errors.values()) < 1e-4, errors  # float32; 1e-6 measured


def test_an_unknown_activation_checkpoint_lists_the_choices():
    with pytest.raises(
        ValueError, match=r"activation_checkpoint='ful' is unknown; choose from \['full', 'none'"
    ):
        InternImage(TINY, activation_checkpoint="ful")


def test_drop_path_schedules():
    assert replace(TINY, drop_path_rate=0.3).drop_paths == pytest.approx((0.0, 0.1, 0.2, 0.3))
    uniform = replace(TINY, drop_path_rate=0.2, drop_path_type="uniform")
    assert uniform.drop_paths == (0.2,) * 4
    blocks = [block for level in InternImage(uniform).levels for block in level.blocks]
    assert [block.drop_path2.probability for block in blocks] == [0.2] * 4


def test_bfloat16_model_stays_close_to_float32():
    torch.manual_seed(0)
    model, images = InternImage(VARIANTS["res_post_norm"]).eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        wide = model(images)[-1]
        narrow = model.bfloat16()(images.bfloat16())[-1]
    assert narrow.dtype == torch.bfloat16
    # Four residual blocks of rounded activations (2^-9 each), ending in a LayerNorm.
    assert torch.nn.functional.cosine_similarity(narrow.float(), wide, dim=-1).min() > 0.999


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": (3, 2, 4)}, "does not divide the stage width 16"),
        ({"depths": (1, 1)}, "the same number"),
        ({"post_norm": True, "res_post_norm": True}, "excludes"),
        ({"dw_kernel_size": 4}, "must be odd"),
        ({"level2_post_norm_block_ids": (2,)}, "which has 2"),
        ({"drop_path_rate": 1.0}, r"\[0, 1\)"),
        ({"drop_path_type": "cosine"}, "choose from"),
        ({"res_post_norm": True, "layer_scale": 1e-5}, "use None"),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **fields)


@pytest.mark.parametrize("has_scale", [True, False])
def test_packed_projection_gives_what_three_projections_give(monkeypatch, has_scale):
    """The fused path of a GPU, sampled here by the reference: same outputs, same gradient of every parameter."""
    torch.manual_seed(0)
    dcn = DCNv3(replace(TINY, center_feature_scale=has_scale, offset_scale=2.0), stage=1).double()
    for parameter in dcn.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 4, 5, 32, dtype=torch.float64)

    def derivatives() -> list[Tensor]:
        out = dcn(x)
        return [out.detach(), *torch.autograd.grad(out.sin().sum(), list(dcn.parameters()))]

    expected = derivatives()
    packed_shapes = []

    def sampled_by_reference(value: Tensor, packed: Tensor, **options) -> Tensor:
        packed_shapes.append(tuple(packed.shape))
        return dcnv3_packed(value, packed, **options | {"path": "reference"})

    monkeypatch.setattr(internimage_block, "choose_path", lambda call: Choice("triton", "a test"))
    monkeypatch.setattr(internimage_block, "dcnv3_packed", sampled_by_reference)
    for found, wanted in zip(derivatives(), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert packed_shapes == [(2, 4, 5, 2, 32)]
