"""How do the published InternImage checkpoints name the tensors, and how do we read and write them?

One hub, the plain layout: the state dict of `InternImageClassifier`, key by key the published one. Every
other layout is a list of renamings from the hub, and `PARTS` cuts the hub into the modules of pre-training.
Nothing is dropped in silence: each function reports or raises.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from pretrain.models.internimage_config import InternImageConfig

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Report:
    """What became of the keys of a checkpoint; `renamed` pairs are (theirs, ours), other keys are theirs.

    `missing` and `reshaped` are our keys: absent there, or present in another shape.
    """

    taken: tuple[str, ...] = ()  # every tensor that was used, renamed or not
    renamed: tuple[tuple[str, str], ...] = ()
    skipped: tuple[str, ...] = ()  # known to the layout, no part of the model: mask token, momentum teacher
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join(f"{len(keys)} {name}" for name, keys in asdict(self).items())

    def require_exact(self) -> Report:
        """Itself when every key found its place; otherwise ValueError naming the first that did not."""
        for name in ("missing", "unexpected", "reshaped"):
            keys = getattr(self, name)
            if keys:
                raise ValueError(
                    f"checkpoint does not fit the model: {len(keys)} {name}, first {keys[0]!r} (in all {self}); "
                    "every tensor must match one of the model: check its size, its layout and the number of classes"
                )
        return self


# Ours -> theirs; the first prefix that fits wins.
RENAMED_PREFIXES: dict[str, tuple[tuple[str, str], ...]] = {
    "plain": (),
    "pretraining": (
        ("patch_embed.", "dcnv3.patch_embed."),
        ("levels.", "dcnv3.levels."),
        ("fc_norm.0.", "clip.classifier_ln."),
        ("head.", "clip.classifier."),
    ),
    "huggingface": (("", "model."),),
}
RENAMED_ENDINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "plain": (),
    "pretraining": (),
    "huggingface": ((".gamma1", ".layer_scale1"), (".gamma2", ".layer_scale2")),
}
SKIPPED_PREFIXES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "pretraining": ("mask_token", "mm_dcnv3."),  # the first is a whole key
    "huggingface": (),
}

# Module of the pre-training model -> (prefix in the hub, prefix in that module's own state dict).
PARTS: dict[str, tuple[tuple[str, str], ...]] = {
    "backbone": (("patch_embed.", "patch_embed."), ("levels.", "levels.")),  # InternImage
    "tokens": (
        ("dcnv3_head_x4.", "dcnv3_head_x4."),
        ("dcnv3_head_x3.", "dcnv3_head_x3."),
    ),  # StrideTokens
    "pool": (("clip_projector.", ""),),  # AttentionPool
    "norm": (("fc_norm.0.", ""),),  # LayerNorm
    "head": (("head.", ""),),  # Linear
    "conv_head": (("conv_head.", ""),),  # 1x1 convolution, BatchNorm of T to XL
}


CONTAINERS = ("state_dict", "model", "module")  # under these keys training codes keep the tensors
WRAPPERS = ("module.", "_orig_mod.", "backbone.")  # of DistributedDataParallel, torch.compile, OpenMMLab
MOST_NESTED = 8  # containers in one another; a pickle may hold itself


def detect_layout(state: Collection[str]) -> str:
    """Name of the layout that the keys speak of."""
    if "mask_token" in state or any(key.startswith("dcnv3.") for key in state):
        return "pretraining"
    if any(key.startswith("model.") for key in state):
        return "huggingface"
    return "plain"


def _unwrapped(state: Mapping[str, Any]) -> State:
    """The tensors of a checkpoint, out of the containers that training codes put them into; ValueError names
    what is no tensor.
    """
    for _ in range(MOST_NESTED):
        inner = next((name for name in CONTAINERS if isinstance(state.get(name), Mapping)), None)
        if inner is None:
            break
        state = state[inner]
    else:
        raise ValueError(
            f"the checkpoint holds more than {MOST_NESTED} containers in one another, or one that holds itself: "
            "pass the mapping of tensors"
        )
    for prefix in WRAPPERS:
        if state and all(key.startswith(prefix) for key in state):
            return _unwrapped({key.removeprefix(prefix): tensor for key, tensor in state.items()})
    odd = [key for key, tensor in state.items() if not isinstance(tensor, Tensor)]
    if odd:
        raise ValueError(
            f"checkpoint entry {odd[0]!r} is {type(state[odd[0]]).__name__}, no tensor: pass the mapping of tensors "
            f"(one under {', '.join(CONTAINERS)} is found by itself)"
        )
    return state


def read(
    state: Mapping[str, Any], model: nn.Module, layout: str | None = None
) -> tuple[dict[str, Tensor], Report]:
    """Checkpoint -> tensors under the names of `model`, an InternImageClassifier, and what became of each.

    Not strict by itself: `model.load_state_dict(tensors)` after `report.require_exact()` is. Containers such as
    {"model": ...} and wrappers' prefixes are looked through. Raises ValueError for what is no tensor.
    """
    state = _unwrapped(state)
    layout = layout or detect_layout(state)
    _check_layout(layout)
    expected = model.state_dict()
    theirs = {to_layout_key(key, layout): key for key in expected}
    skipped = tuple(key for key in state if key not in theirs and _is_skipped(key, layout))
    found = {key: theirs[key] for key in state if key in theirs}
    fits = {key: ours for key, ours in found.items() if state[key].shape == expected[ours].shape}
    present = set(found.values())
    report = Report(
        taken=tuple(fits),
        renamed=tuple((key, ours) for key, ours in fits.items() if key != ours),
        skipped=skipped,
        missing=tuple(key for key in expected if key not in present),
        unexpected=tuple(key for key in state if key not in theirs and key not in skipped),
        reshaped=tuple(ours for key, ours in found.items() if key not in fits),
    )
    return {ours: state[key] for key, ours in fits.items()}, report


def write(state: State, layout: str, mask_token: Tensor | None = None) -> dict[str, Tensor]:
    """Tensors of an InternImageClassifier under the names of a layout; the pre-training one needs a mask token.

    The pre-training layout's first key is `mask_token`: its readers recognise it by that.
    """
    _check_layout(layout)
    if (layout == "pretraining") != (mask_token is not None):
        raise ValueError(
            f"layout={layout!r} with mask_token={'none' if mask_token is None else 'given'}: the pre-training layout "
            "starts with a mask token and no other layout has one"
        )
    first = {} if mask_token is None else {"mask_token": mask_token}
    return first | {to_layout_key(key, layout): tensor for key, tensor in state.items()}


def to_layout_key(key: str, layout: str) -> str:
    """Our name of a tensor -> its name in the layout."""
    for ours, theirs in RENAMED_PREFIXES[layout]:
        if key.startswith(ours):
            key = theirs + key.removeprefix(ours)
            break
    for ours, theirs in RENAMED_ENDINGS[layout]:
        if key.endswith(ours):
            key = key.removesuffix(ours) + theirs
    return key


def split(state: State) -> dict[str, dict[str, Tensor]]:
    """Plain layout -> state dicts of the modules of `PARTS` that it holds."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        part, own_key = _part_of(key)
        parts.setdefault(part, {})[own_key] = tensor
    return parts


def join(parts: Mapping[str, State]) -> dict[str, Tensor]:
    """State dicts of modules of `PARTS` -> plain layout; the inverse of `split`."""
    state = {}
    for part, tensors in parts.items():
        if part not in PARTS:
            raise ValueError(f"InternImage part={part!r} is unknown; choose from {sorted(PARTS)}")
        for own_key, tensor in tensors.items():
            hubs = [hub + own_key.removeprefix(own) for hub, own in PARTS[part] if own_key.startswith(own)]
            if not hubs:
                raise ValueError(
                    f"InternImage part {part!r} has no tensor {own_key!r}: pass the module's state dict"
                )
            state[hubs[0]] = tensor
    return state


PUBLISHED_NEUTRAL = ("num_classes", "with_cp", "out_indices", "init_cfg", "pretrained", "type")
PUBLISHED_CHOICES = {
    "core_op": ("DCNv3", "DCNv3_pytorch"), "norm_layer": ("LN",), "act_layer": ("GELU",), "drop_rate": (0, 0.0),
}  # fmt: skip


def config_from_published(fields: Mapping[str, Any]) -> InternImageConfig:
    """The published constructor's keyword arguments -> our configuration.

    Arguments that change no number of the backbone (PUBLISHED_NEUTRAL) are passed over. Raises ValueError for a
    choice that we have not, TypeError for an unknown argument.
    """
    for name, choices in PUBLISHED_CHOICES.items():
        if fields.get(name, choices[0]) not in choices:
            raise ValueError(f"InternImage {name}={fields[name]!r} is not served; choose from {choices}")
    passed_over = (*PUBLISHED_NEUTRAL, *PUBLISHED_CHOICES)
    fields = {name: value for name, value in fields.items() if name not in passed_over}
    if fields.get("level2_post_norm") and not fields.get("level2_post_norm_block_ids"):
        raise ValueError("level2_post_norm=True needs level2_post_norm_block_ids, the blocks that it follows")
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    if not known.pop("level2_post_norm", "level2_post_norm_block_ids" in known):
        known.pop("level2_post_norm_block_ids", None)
    return InternImageConfig(**known)


def config_to_published(config: InternImageConfig) -> dict[str, Any]:
    """Our configuration -> JSON-ready keyword arguments of the published constructor."""
    fields = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(config).items()}
    return fields | {"level2_post_norm": bool(config.level2_post_norm_block_ids)}


def _part_of(key: str) -> tuple[str, str]:
    for part, prefixes in PARTS.items():
        for hub, own in prefixes:
            if key.startswith(hub):
                return part, own + key.removeprefix(hub)
    raise ValueError(f"{key!r} is no tensor of InternImage's plain layout: `read` the checkpoint first")


def _is_skipped(key: str, layout: str) -> bool:
    return any(
        key.startswith(name) if name.endswith(".") else key == name for name in SKIPPED_PREFIXES[layout]
    )


def _check_layout(layout: str) -> None:
    if layout not in RENAMED_PREFIXES:
        raise ValueError(f"InternImage layout={layout!r} is unknown; choose from {sorted(RENAMED_PREFIXES)}")
