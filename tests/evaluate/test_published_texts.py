"""Are images and captions of a published CLIP embedded as by its own library, and is it said why they are not?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

from pretrain.evaluate.evaluation import evaluate
from pretrain.evaluate.features import Pictures, extract
from pretrain.evaluate.subjects import Subject, embed_with, find_subjects
from pretrain.evaluate.zero_shot import embed_captions
from tests.models.guide_folders import clip_folder, open_clip_folder, pixels, vit_folder

CPU = torch.device("cpu")
CAPTIONS = ["a photo of a red thing", "gray", "a green thing and a blue thing, and many more of both"]
VOCABULARY = 49408  # of CLIP's own tokenizer, which open_clip brings


def opened(folder: Path) -> Subject:
    (named,) = find_subjects(folder, [])
    return named.open()


def vectors_of(subject: Subject, data: Path) -> tuple[Tensor, Tensor]:
    """Of the held-out images, and of CAPTIONS."""
    found = extract(subject.towers, subject.run, data / "heldout", device=CPU, workers=0, title="")
    assert torch.equal(F.normalize(found.embedding, dim=-1), found.projected)
    return found.projected, embed_captions(CAPTIONS, subject.encode, embed_with(subject.towers, CPU))


def seen(subject: Subject, data: Path) -> Tensor:
    pictures = Pictures(data / "heldout", subject.run.views.size)
    return pixels(torch.stack([pictures[i].view for i in range(len(pictures))]))


@torch.inference_mode()
def test_open_clip_folder_is_embedded_as_open_clip_does(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    model = open_clip_folder(folder, vocab=VOCABULARY)
    images, texts = vectors_of(subject := opened(folder), data)
    theirs = model.encode_image(seen(subject, data), normalize=True)
    torch.testing.assert_close(images, theirs, rtol=1e-4, atol=1e-5)
    tokens = open_clip.SimpleTokenizer(context_length=8)(CAPTIONS)
    torch.testing.assert_close(texts, model.encode_text(tokens, normalize=True), rtol=1e-4, atol=1e-5)
    assert (texts[0] - texts[1]).abs().max() > 0.01
    where = ["--data", str(data), "--out", str(tmp_path / "out.json"), "--k", "5"]
    rows = evaluate([str(folder), *where, "--probes", "zero_shot,retrieval_text"])["checkpoints"]["clip"]
    assert [rows[name]["n"] for name in ("zero_shot", "retrieval_text")] == [20, 20]


@torch.inference_mode()
def test_hugging_face_clip_is_embedded_as_transformers_does(data: Path, tmp_path: Path) -> None:
    folder, own = tmp_path / "clip", data / "train" / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(own, local_files_only=True)
    end = tokenizer(CAPTIONS[0])["input_ids"][-1]
    model = clip_folder(folder, vocab_size=len(tokenizer), eos_token_id=end, max_position_embeddings=12)
    assert "holds no Hugging Face tokenizer" in opened(folder).without_text  # none was saved beside the model
    for file in own.iterdir():
        shutil.copy(file, folder)
    images, texts = vectors_of(subject := opened(folder), data)
    theirs = model.get_image_features(seen(subject, data)).pooler_output
    torch.testing.assert_close(images, F.normalize(theirs, dim=-1), rtol=1e-4, atol=1e-5)
    for caption, vector in zip(CAPTIONS, texts, strict=True):
        alone = tokenizer(caption, return_tensors="pt", truncation=True, max_length=12)
        alone = {name: alone[name] for name in ("input_ids", "attention_mask")}
        told = F.normalize(model.get_text_features(**alone).pooler_output[0], dim=-1)
        torch.testing.assert_close(vector, told, rtol=1e-4, atol=1e-5)
    assert (texts[0] - texts[1]).abs().max() > 0.01


@torch.inference_mode()
def test_open_clip_folder_with_a_tokenizer_of_its_own_uses_that_alone(data: Path, tmp_path: Path) -> None:
    folder, own = tmp_path / "clip", data / "train" / "tokenizer"
    model = open_clip_folder(folder, vocab=200)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "some/where"  # which is not asked
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    assert "cannot be opened" in opened(folder).without_text
    for file in own.iterdir():
        shutil.copy(file, folder)
    subject = opened(folder)
    texts = embed_captions(CAPTIONS, subject.encode, embed_with(subject.towers, CPU))
    tokenizer = AutoTokenizer.from_pretrained(own, local_files_only=True)
    padded = tokenizer(CAPTIONS, return_tensors="pt", padding="max_length", truncation=True, max_length=8)
    theirs = model.encode_text(padded["input_ids"], normalize=True)
    torch.testing.assert_close(texts, theirs, rtol=1e-4, atol=1e-5)


def test_what_gives_captions_no_vectors_says_why(tmp_path: Path) -> None:
    few = tmp_path / "few"
    open_clip_folder(few)
    assert "has 49408 tokens, its text tower 50" in opened(few).without_text
    config = json.loads((few / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"bpe_path": "/etc/passwd"}
    (few / "open_clip_config.json").write_text(json.dumps(config))
    assert "is told {'bpe_path': '/etc/passwd'}" in opened(few).without_text
    vit_folder(tmp_path / "vit")
    assert opened(tmp_path / "vit").without_text == "no text tower came with the images' one, a vit"
