"""How does a run become one file with every tensor of its towers, beside the whole recipe and the tokenizer?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from pretrain.data.text import Captions
from pretrain.export.agreement import Agreement, compare, random_images
from pretrain.export.keys import Keys
from pretrain.export.names import NotProven
from pretrain.export.own_features import own_features, texts_of_ones
from pretrain.export.trained import Trained

WEIGHTS = "towers.safetensors"
TOKENIZER = "tokenizer"  # folder, where the run has text


def write(trained: Trained, folder: Path) -> dict[str, Keys]:
    """Writes the weights, the tokenizer, and config.json: recipe, facts of the data, and which of what these are."""
    tensors = {name: tensor.contiguous() for name, tensor in trained.towers.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    run, facts = (json.loads(one.to_json()) for one in (trained.run, trained.facts))
    told = {"which": trained.which, "step": trained.step, "run": run, "facts": facts}
    (folder / "config.json").write_text(json.dumps(told, indent=1) + "\n")
    if trained.tokenizer is not None:
        shutil.copytree(trained.tokenizer, folder / TOKENIZER)
    return {WEIGHTS: Keys({name: name for name in tensors}, {}).require_whole(tensors, tensors)}


class Outputs(nn.Module):
    """What a run's towers say of images [b, 3, s, s] and of texts [b, length], by name."""

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.towers, self.trained = trained.towers, trained

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        towers = self.towers
        tokens = towers.encoder(images)
        outputs = {"tokens": tokens}
        if towers.has_embedding:
            outputs["embedding"] = towers.embed_tokens(tokens)
        if towers.has_categories:
            outputs["logits"] = towers.category(outputs["embedding"])
        if towers.has_texts:
            texts = texts_of_ones(self.trained, len(images))
            outputs["texts"] = towers.embed_texts(texts, texts.bool())
        return outputs


@torch.inference_mode()
def prove(trained: Trained, folder: Path) -> list[Agreement]:
    """Puts the file's tensors, strictly, in place of the towers' and compares every output at two sizes.

    Raises NotProven also where one bit of one tensor differs, or anything that decides the numbers of tokens.
    """
    if trained.tokenizer is not None:
        ours, theirs = (
            Captions(place, trained.run.text.length) for place in (trained.tokenizer, folder / TOKENIZER)
        )
        if ours.sha256 != theirs.sha256:
            raise NotProven(f"{TOKENIZER}/ is another one than that of {trained.step}")
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    ours = trained.towers.state_dict()
    if ours.keys() != tensors.keys():
        raise NotProven(
            f"{WEIGHTS} does not load strictly: {sorted(ours.keys() ^ tensors.keys())[:3]} differ"
        )
    size, stride = trained.run.views.size, trained.towers.encoder.stride
    agreements, model = [], Outputs(trained)
    for side in (size, size + 2 * stride):
        own = own_features(trained, side)
        replaced = {f"towers.{name}": tensor for name, tensor in tensors.items()}
        theirs = functional_call(model, replaced, (random_images(side),), strict=False)
        agreements += [compare(WEIGHTS, key, side, own[key], theirs[key]) for key in theirs]
    if changed := [name for name, tensor in ours.items() if not torch.equal(tensor, tensors[name])]:
        raise NotProven(f"{WEIGHTS} holds other bits of {changed[:3]}")
    return agreements


def how_to_load(trained: Trained) -> str:
    """For the model card."""
    return "\n".join(
        (
            "```python",
            "from safetensors.torch import load_file",
            "",
            f'tensors = load_file("{WEIGHTS}")      # encoder.*, and the heads by name',
            "```",
            "",
            "`config.json` holds the whole recipe (`run`) and what the model knows of its data (`facts`: categories",
            "by number). A run of this project starts from it by `--init FOLDER --init-heads`, and",
            "`python -m pretrain.evaluate FOLDER --data DIR` measures it. Feature norms of pre-training are folded",
            "into the layers before them.",
            *(
                [f"`{TOKENIZER}/` is the captions' own, for transformers' AutoTokenizer."]
                if trained.tokenizer is not None
                else []
            ),
        )
    )
