"""How does a run become the files that InternImage's own code reads?

`internimage.pth` has the plain published layout: what classification, detection and segmentation read.
`internimage_pretraining.pth` has the layout of the released pre-training checkpoints. Both are
torch.save({"model": tensors}). Key names: models/internimage_layouts.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from pretrain.export.agreement import Agreement, compare, random_images
from pretrain.export.keys import Keys
from pretrain.export.names import NotProven
from pretrain.export.own_features import own_features
from pretrain.export.preprocessor import write_preprocessor
from pretrain.export.trained import Trained
from pretrain.models import internimage_layouts as layouts
from pretrain.models.internimage import INTERNIMAGE, InternImage, StrideTokens, stage_maps, stride_tokens
from pretrain.models.internimage_config import InternImageConfig
from pretrain.models.pooling import AttentionPool

FILES = {"internimage.pth": "plain", "internimage_pretraining.pth": "pretraining"}
OURS = {  # part of the published layout -> prefix in our towers
    "backbone": "encoder.dcnv3.",
    "tokens": "encoder.heads.",
    "pool": "pool.",
    "norm": "norm.",
    "head": "category.",
}
EMBEDDED = ("pool", "norm", "head")  # what needs the embedding of the whole image
NO_PLACE = "the layout has no place for it"
OTHER_POOL = "the layout's embedding is pooled by attention, the run's is a mean (pool.kind)"
OTHER_HEAD = "the published model of this size has another head (average pooling)"
MASK_TOKEN = "zeros: readers know the layout by this first key; the decoder's own mask token is not kept"


def write(trained: Trained, folder: Path) -> dict[str, Keys]:
    """Writes FILES, config.json, the published constructor's arguments, and preprocessor_config.json, the pixels.

    Tells what became of every tensor.
    """
    config = INTERNIMAGE[trained.run.backbone.size]
    told = {}
    for name, layout in FILES.items():
        tensors, told[name] = in_layout(trained, layout, config)
        torch.save({"model": tensors}, folder / name)
    fields = layouts.config_to_published(config)
    (folder / "config.json").write_text(json.dumps(fields, indent=1) + "\n")
    write_preprocessor(trained.run.views, folder)
    return told


def in_layout(trained: Trained, layout: str, config: InternImageConfig) -> tuple[dict[str, Tensor], Keys]:
    """The towers' tensors under the names of a layout."""
    plain, hub_names, skipped = {}, {}, {}
    for ours, tensor in trained.towers.state_dict().items():
        part = next((part for part, prefix in OURS.items() if ours.startswith(prefix)), None)
        if part is None:
            skipped[ours] = NO_PLACE
        elif part != "backbone" and layout == "plain" and not config.use_clip_projector:
            skipped[ours] = OTHER_HEAD
        elif part in EMBEDDED and trained.run.pool.kind != "attention":
            skipped[ours] = OTHER_POOL
        else:
            named = layouts.join({part: {ours.removeprefix(OURS[part]): tensor.detach()}})
            hub_names[ours] = next(iter(named))
            plain |= named
    mask_token = torch.zeros(1, 1, trained.towers.encoder.width) if layout == "pretraining" else None
    tensors = layouts.write(plain, layout, mask_token)
    written = {ours: layouts.to_layout_key(hub, layout) for ours, hub in hub_names.items()}
    added = {} if mask_token is None else {"mask_token": MASK_TOKEN}
    return tensors, Keys(written, skipped, added).require_whole(trained.towers.state_dict(), tensors)


@torch.inference_mode()
def prove(trained: Trained, folder: Path) -> list[Agreement]:
    """Loads every file strictly into a fresh model of published names and compares all outputs at two sizes.

    Raises NotProven.
    """
    config = INTERNIMAGE[trained.run.backbone.size]
    sizes = (trained.run.views.size, trained.run.views.size + config.strides[-1])
    agreements = []
    for name, layout in FILES.items():
        model = reload(folder / name, layout, trained)
        for size in sizes:
            ours, theirs = own_features(trained, size), published_outputs(model, random_images(size))
            agreements += [compare(name, key, size, ours[key], theirs[key]) for key in theirs]
        del model  # a size of the backbone
    return agreements


def reload(path: Path, layout: str, trained: Trained) -> nn.Module:
    """The published model with the weights of a file; NotProven unless every key finds its place."""
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["model"]
    config = INTERNIMAGE[trained.run.backbone.size]
    with torch.device("meta"):  # no memory for weights that are replaced at once
        is_backbone_alone = layout == "plain" and not config.use_clip_projector
        model = published_model(trained, config, is_backbone_alone)
    try:
        tensors, report = layouts.read(state, model, layout)
        report.require_exact()
        model.load_state_dict(tensors, strict=True, assign=True)
    except (ValueError, RuntimeError) as error:
        raise NotProven(f"{path.name} does not load strictly: {error}") from error
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return model.eval()


def published_model(trained: Trained, config: InternImageConfig, is_backbone_alone: bool) -> nn.Module:
    """Fresh modules under the published names, with the widths of the run."""
    model, run = nn.Module(), trained.run
    backbone = InternImage(config)
    model.patch_embed, model.levels = backbone.patch_embed, backbone.levels
    if is_backbone_alone:
        return model
    heads = StrideTokens(config, run.backbone.token_width)
    model.dcnv3_head_x4, model.dcnv3_head_x3 = heads.dcnv3_head_x4, heads.dcnv3_head_x3
    if run.pool.kind != "attention":
        return model
    if trained.towers.has_embedding:
        model.clip_projector = AttentionPool(run.backbone.token_width, run.pool.width, run.pool.heads)
        model.fc_norm = nn.Sequential(nn.LayerNorm(run.pool.width, eps=1e-6))
    if trained.towers.has_categories:
        model.head = nn.Linear(run.pool.width, len(trained.facts.categories))
    return model


def published_outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Every output that the model can give, computed from the parts under their published names."""
    maps = stage_maps(model.patch_embed, model.levels, images)
    outputs = {f"stage {index + 1}": stage_map for index, stage_map in enumerate(maps)}
    if hasattr(model, "dcnv3_head_x3"):
        tokens = stride_tokens(model.dcnv3_head_x3, model.dcnv3_head_x4, maps).flatten(1, 2)
        outputs["tokens"] = tokens
    if hasattr(model, "clip_projector"):
        outputs["embedding"] = model.fc_norm(model.clip_projector(tokens))
    if hasattr(model, "head"):
        outputs["logits"] = model.head(outputs["embedding"])
    return outputs


def how_to_load(trained: Trained) -> str:
    """For the model card."""
    config = INTERNIMAGE[trained.run.backbone.size]
    num_stages = config.num_stages
    lines = [
        "`internimage.pth` is for InternImage's code: classification reads it as a checkpoint, its detection and",
        'segmentation code as `backbone=dict(init_cfg=dict(type="Pretrained", checkpoint="internimage.pth"))`.',
        "`config.json` holds the constructor's arguments, `preprocessor_config.json` the size and the statistics of",
        "the pixels. Detection and segmentation load non-strictly, so compare",
        "what they report with `keys.json`. `internimage_pretraining.pth` is the layout of the released",
        "pre-training checkpoints.",
        "",
        "```python",
        "import json",
        "",
        "import torch",
        "from models import InternImage  # of the folder `classification` of InternImage's code",
        "",
        'model = InternImage(**json.load(open("config.json")))',
        'state = torch.load("internimage.pth", weights_only=True)["model"]',
        "model.load_state_dict(state)",
        "```",
    ]
    if not trained.towers.has_embedding:
        lines += [
            "",
            "There is no `clip_projector.*` and no `fc_norm.*`: the run trained no global embedding.",
        ]
    elif trained.run.pool.kind != "attention":
        lines += [
            "",
            "There is no `clip_projector.*`, `fc_norm.*` and `head.*`: they pool by attention, and the run pooled by "
            f"{trained.run.pool.kind} (`pool.kind`).",
        ]
    if not trained.towers.has_categories:
        lines += ["", "There is no `head.*`: the run predicted no categories."]
    if num_stages != 4:
        lines += ["", f"This backbone has {num_stages} stages, where every published one has 4."]
    return "\n".join(lines)
