"""Does the evaluation of a run folder hold together, and does it say what is wrong with bad input?"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.schema import Manifest, write_manifest
from pretrain.checkpoint import load_towers
from pretrain.data.decode import decode_image
from pretrain.data.shards import ShardFolder
from pretrain.data.views import center_view
from pretrain.evaluate.__main__ import main
from pretrain.evaluate.arguments import parse, protocols_of, split_folders
from pretrain.evaluate.asked import Protocols
from pretrain.evaluate.evaluation import evaluate
from pretrain.evaluate.features import Pictures, extract, readable
from pretrain.evaluate.fine_tune_recipes import FROZEN
from pretrain.evaluate.protocols import evaluate_checkpoint
from pretrain.evaluate.result import data_of, set_aside, table, write
from pretrain.evaluate.rows import DEFAULT, PROBES, TITLES
from pretrain.evaluate.sets import read_set
from pretrain.evaluate.subjects import find_subjects
from pretrain.facts import DataFacts
from pretrain.models.backbone import InternImageEncoder
from pretrain.models.pixels import normalise
from pretrain.recipes import load
from tests.evaluate.runs import resealed, write_run
from tests.evaluate.sets import COLORS, write_set
from tests.fakes import shrink
from tests.paths import ROOT

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def result(run_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("result") / "evaluation.json"
    evaluate([str(run_folder), "--data", str(data), "--k", "5", "--out", str(out)])
    assert [path.name for path in out.parent.iterdir()] == ["evaluation.json"]
    return json.loads(out.read_text())


def test_every_probe_is_measured_before_and_after(result: dict[str, Any]) -> None:
    assert list(result["checkpoints"]) == ["step_000000", "step_000003"]
    for rows in result["checkpoints"].values():
        for name in DEFAULT:
            low, high = rows[name]["interval"]
            assert 0 <= low <= rows[name]["accuracy"] <= high <= 1, name
            assert rows[name]["n"] == 20, name
        assert rows["knn"]["k"] == 5 and rows["knn"]["chance"] == 1 / len(COLORS)
        assert (rows["knn"]["feature"], rows["knn_embedding"]["feature"]) == ("tokens", "embedding")


def test_colors_are_told_apart_even_by_an_untrained_encoder(result: dict[str, Any]) -> None:
    for rows in result["checkpoints"].values():
        assert rows["knn"]["accuracy"] > 0.9 and rows["linear"]["accuracy"] > 0.9


def test_confusion_counts_every_held_out_image_once(result: dict[str, Any]) -> None:
    counts = torch.tensor(result["confusion"]["counts"])
    assert counts.sum(dim=1).tolist() == [5] * len(COLORS)
    accuracy = result["checkpoints"][result["confusion"]["checkpoint"]]["linear"]["accuracy"]
    assert counts.trace() / counts.sum() == pytest.approx(accuracy)


def test_neighbours_are_samples_of_the_training_set(result: dict[str, Any], data: Path) -> None:
    train = ShardFolder(data / "train")
    for query in result["neighbours"]["queries"]:
        labels = [int(train.sample(index)["cls"]) for index in query["train"]]
        assert labels == query["train_labels"]
        assert query["similarity"] == sorted(query["similarity"], reverse=True)


def test_result_says_what_made_it(result: dict[str, Any], data: Path) -> None:
    assert result["recipe"] == "m3i.internimage_h" and result["categories"] == list(COLORS)
    assert result["data"]["heldout"]["num_samples"] == 20 and "torch" in result["versions"]
    assert {"commit", "hardware", "date", "image_size"} <= result.keys()


def test_features_are_those_of_the_towers(run_folder: Path, data: Path) -> None:
    run, _, towers = load_towers(run_folder / "checkpoints" / "step_000003")
    found = extract(towers, run, data / "heldout", device=CPU, workers=0, title="test")
    sample = ShardFolder(data / "heldout").sample(7)
    view = center_view(decode_image(sample["png"]), run.views.size)[None]
    tokens = towers.encoder(normalise(view, run.views.mean, run.views.std, torch.float32))
    # A batch of one and a batch of twenty sum in another order: float32 rounding.
    torch.testing.assert_close(found.tokens[7], tokens.mean(dim=1)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.embedding[7], towers.embed_tokens(tokens)[0], rtol=1e-4, atol=1e-4)
    assert found.labels[7] == int(sample["cls"]) and found.captions[7] == (sample["txt"].decode(),)
    torch.testing.assert_close(found.projected.norm(dim=1), torch.ones(20))


def test_category_head_is_read_by_name_not_by_number(
    run_folder: Path, data: Path, result: dict[str, Any]
) -> None:
    run, facts, towers = load_towers(run_folder / "checkpoints" / "step_000003")
    found = extract(towers, run, data / "heldout", device=CPU, workers=0, title="test")
    said = [facts.categories[number] for number in found.classified.tolist()]
    truth = [list(COLORS)[number] for number in found.labels.tolist()]
    accuracy = sum(a == b for a, b in zip(said, truth, strict=True)) / len(truth)
    assert result["checkpoints"]["step_000003"]["classifier"]["accuracy"] == pytest.approx(accuracy)


def test_unreadable_image_is_left_out_and_counted(run_folder: Path, tmp_path: Path) -> None:
    run, _, towers = load_towers(run_folder / "checkpoints" / "step_000000")
    folder = write_set(tmp_path / "set", "heldout", 30)
    damage(folder, sample=3)
    found = extract(towers, run, folder, device=CPU, workers=0, title="test")
    assert sum(found.dropped.values()) == 1 and len(found.tokens) == 119 and 3 not in found.index


def test_too_many_unreadable_images_stop_the_evaluation(run_folder: Path, tmp_path: Path) -> None:
    run, _, towers = load_towers(run_folder / "checkpoints" / "step_000000")
    folder = write_set(tmp_path / "set", "heldout", 30)
    for sample in (3, 4, 5):
        damage(folder, sample=sample)
    with pytest.raises(ValueError, match=r"3 of the .* samples read so far are bad.*max_bad"):
        extract(towers, run, folder, device=CPU, workers=0, title="test")


def test_run_without_text_has_no_zero_shot_and_says_why(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = DataFacts(categories=("cat", "dog"), vocab_size=0)
    run = write_run(tmp_path / "run", shrink(load("m3i.vit_b16")), facts, steps=(0,))
    result = evaluate([str(run), "--data", str(data), "--k", "5"])
    rows = result["checkpoints"]["step_000000"]
    assert rows["zero_shot"]["accuracy"] is None and "no text tower" in rows["zero_shot"]["reason"]
    assert rows["classifier"]["accuracy"] is None and "other categories" in rows["classifier"]["reason"]
    assert rows["knn"]["accuracy"] > 0.9
    assert json.loads((run / "evaluation.json").read_text()) == result
    assert "zero-shot by class names: not measured, no text tower" in capsys.readouterr().out


def test_only_the_chosen_protocols_are_measured_and_shown(
    run_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [str(run_folder), "--data", str(data), "--steps", "3", "--out", str(tmp_path / "result.json")]
    result = evaluate([*where, "--probes", "dense, knn", "--fine-tune", "1"])
    rows = result["checkpoints"]["step_000003"]
    assert list(rows) == ["dense", "knn", "fine_tune", "dropped"] and result["confusion"] is None
    assert rows["fine_tune"]["recipe"]["epochs"] == 1
    shown = capsys.readouterr().out.splitlines()[1:4]
    assert [line[:32].strip() for line in shown] == ["kNN, mean token", "dense probe, mIoU", "fine-tuned"]


def test_unknown_probe_is_refused_with_the_choices(run_folder: Path, data: Path) -> None:
    choices = re.escape(str([*PROBES, *FROZEN, "all"]))
    with pytest.raises(ValueError, match=rf"probes \['knm'\] are unknown; choose from {choices}"):
        evaluate([str(run_folder), "--data", str(data), "--probes", "knm,linear"])


def test_one_pass_of_the_encoder_serves_all_probes(
    run_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward = InternImageEncoder.forward

    def count(self: InternImageEncoder, images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(InternImageEncoder, "forward", count)
    step = run_folder / "checkpoints" / "step_000003"
    rows = evaluate_checkpoint(step, data / "train", data / "heldout", Protocols())
    assert list(rows) == [*DEFAULT, "dropped"] and sum(seen) == 40 + 20


def test_first_is_evaluated_once_when_it_is_also_the_last(
    run_folder: Path, data: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "result.json")
    result = evaluate([str(run_folder), "--data", str(data), "--steps", "3,last", "--k", "5", "--out", out])
    assert list(result["checkpoints"]) == ["step_000003"]


def test_missing_run_is_told(data: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent is no folder: name the --out folder"):
        evaluate([str(tmp_path / "absent"), "--data", str(data)])


def test_run_without_checkpoint_is_told(data: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no whole checkpoint: name the --out folder"):
        evaluate([str(tmp_path), "--data", str(data), "--steps", "last"])


def test_missing_checkpoint_names_those_that_are_there(run_folder: Path, data: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"step_000002 cannot be used.*choose one of the whole ones, steps \[0, 3\]"
    ):
        evaluate([str(run_folder), "--data", str(data), "--steps", "2"])
    with pytest.raises(ValueError, match=r"step 'best' is unknown; choose from \['first', 'last'\]"):
        evaluate([str(run_folder), "--data", str(data), "--steps", "best"])


def test_changed_checkpoint_is_refused(run_folder: Path, data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    weights = copy / "checkpoints" / "step_000003" / "teacher" / "rank_00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"rank_00000\.safetensors has changed since it was written"):
        evaluate([str(copy), "--data", str(data), "--steps", "3", "--k", "5"])


def test_weights_that_are_not_finite_are_refused(run_folder: Path, data: Path, tmp_path: Path) -> None:
    """A similarity to NaN is neither larger nor smaller: retrieval would find every caption."""
    step = tmp_path / "step_000003"
    shutil.copytree(run_folder / "checkpoints" / "step_000003", step)
    kept = load_file(file := step / "teacher" / "rank_00000.safetensors")
    name = next(iter(kept))
    save_file(kept | {name: kept[name] * torch.inf}, file)
    told = rf"step_000003: {re.escape(name)} holds other than finite numbers, .*: name an earlier checkpoint"
    with pytest.raises(ValueError, match=told):
        evaluate([str(resealed(step)), "--data", str(data)])


def test_missing_heldout_is_told(run_folder: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "train", tmp_path / "train")
    with pytest.raises(FileNotFoundError, match=r"heldout is no folder.*--heldout"):
        evaluate([str(run_folder), "--data", str(tmp_path)])
    with pytest.raises(ValueError, match="no train data set is named: give --data DIR"):
        evaluate([str(run_folder)])


def test_testing_on_the_training_images_is_refused(run_folder: Path, data: Path) -> None:
    train = str(data / "train")
    with pytest.raises(ValueError, match=r"--train and --heldout are both .*; name two data sets"):
        evaluate([str(run_folder), "--train", train, "--heldout", train])


def test_splits_with_different_categories_are_refused(run_folder: Path, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "heldout"
    shutil.copytree(data / "heldout", other)
    manifest = Manifest.read(other)
    changed = {**vars(manifest), "categories": (*manifest.categories[:-1], "pink")}
    write_manifest(other, Manifest(**changed))
    with pytest.raises(ValueError, match=r"must be the same \(differing: \['gray', 'pink'\]\)"):
        evaluate([str(run_folder), "--train", str(data / "train"), "--heldout", str(other)])


def test_command_exits_non_zero_with_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "absent"), "--data", str(data)]) == 1
    assert re.fullmatch(r"error: .*absent is no folder: .*\n", capsys.readouterr().err)


def test_too_many_neighbours_are_told_and_the_others_measured(run_folder: Path, data: Path) -> None:
    step = run_folder / "checkpoints" / "step_000003"
    protocols = Protocols(probes=("knn",), ks=(41, 40))
    row = evaluate_checkpoint(step, data / "train", data / "heldout", protocols)["knn"]
    assert row["accuracy"] is None and row["reason"].startswith("k=41 is more than the 40 labelled training")
    assert row["by_k"]["40"]["accuracy"] is not None
    shown = table(
        {"checkpoints": {"last": {"knn": row | row["by_k"]["40"] | {"by_k": {"40": {}, "41": row}}}}}
    )
    assert "k = 41 - (k=41 is more than the 40" in shown


def test_nothing_measured_is_no_success(
    run_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [str(run_folder / "checkpoints" / "step_000003"), "--data", str(data), "--probes", "knn"]
    asked = [*where, "--out", str(tmp_path / "result.json"), "--k"]
    with pytest.raises(
        ValueError, match=r"nothing of what was asked .*k=41 is more than .*give smaller --k.*result"
    ):
        evaluate([*asked, "41"])
    assert (tmp_path / "result.json").is_file() and "not measured, k=41" in capsys.readouterr().out
    evaluate([*asked, "41,40"])


def test_images_that_cannot_be_read_are_told_beside_the_table() -> None:
    row = {"accuracy": 0.5, "chance": 0.2, "interval": [0.4, 0.6]}
    good, bad = ({"knn": row, "dropped": {"train": {}, "heldout": counts}} for counts in ({}, {"decode": 2}))
    told = "step_1, step_2: 2 images of the heldout set are left out (decode 2)"
    assert table({"checkpoints": {"step_0": good, "step_1": bad, "step_2": bad}}).splitlines()[-1] == told
    assert "left out" not in table({"checkpoints": {"step_0": good}})


def test_a_result_of_other_rows_or_data_is_kept(tmp_path: Path) -> None:
    out, data = tmp_path / "evaluation.json", {"heldout": {"folder": "photos"}}
    rows = {"first": {"knn": {}, "dropped": {}}, "last": {"knn": {}, "linear": {}}}
    write(out, {"data": data, "checkpoints": rows})
    same = (["first", "last"], ["linear", "knn"])
    assert set_aside(out, *same, data) is None and out.is_file()
    kept = set_aside(out, ["last"], ["linear", "knn"], data)
    assert kept is not None and kept.is_file() and not out.exists()
    assert set_aside(out, ["last"], ["knn"], data) is None
    kept.rename(out)
    assert set_aside(out, *same, {"heldout": {"folder": "drawings"}}) == kept


def test_data_that_were_built_anew_are_other_data(tmp_path: Path) -> None:
    places = {"train": tmp_path / "train", "heldout": tmp_path / "heldout"}
    image = places["heldout"] / "cats" / "0.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"12")
    (image.parent / "1.png").symlink_to("nowhere")
    found = []
    for seed in (0, 0, 1):
        shutil.rmtree(places["train"], ignore_errors=True)
        write_set(places["train"], "train", 1, seed=seed, text=False)
        found.append(data_of(places, {split: read_set(folder) for split, folder in places.items()}))
    image.write_bytes(b"123")
    found.append(data_of(places, {split: read_set(folder) for split, folder in places.items()}))
    assert found[0] == found[1] and len({str(data) for data in found}) == 3
    assert found[2]["train"] == found[3]["train"] and found[1]["heldout"] == found[2]["heldout"]


def test_the_readme_tells_how_all_there_is_is_measured() -> None:
    (words,) = re.findall(r"(--probes all,[^;]*) is all there is", (ROOT / "README.md").read_text())
    assert set(protocols_of(parse(["RUN", *words.split()])).rows) == TITLES.keys()
    assert protocols_of(parse(["RUN", "--probes", "all"])).rows == tuple(PROBES)


def test_heldout_images_may_lie_in_val(tmp_path: Path) -> None:
    for name in ("train", "test", "val"):
        (tmp_path / name).mkdir()
    assert split_folders(tmp_path, None, None)["heldout"] == tmp_path / "val"
    (tmp_path / "heldout").mkdir()
    assert split_folders(tmp_path, None, None)["heldout"] == tmp_path / "heldout"


@pytest.mark.parametrize("text", ["notes", "[1]", '{"name": "a run"}', '{"checkpoints": {"last": 3}}'])
def test_a_file_that_is_no_result_is_not_overwritten(run_folder: Path, tmp_path: Path, text: str) -> None:
    out = tmp_path / "mine.json"
    out.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.json is there and is no result .*: name another file"):
        evaluate([str(run_folder), "--data", str(tmp_path), "--out", str(out)])
    assert out.read_text() == text


def test_a_size_of_images_is_not_asked_of_a_run(run_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"--image-size tells images of 5000 pixels .* give another number"):
        find_subjects(run_folder, ["last"], 5000)
    with pytest.raises(ValueError, match="--image-size 64 is of published models"):
        find_subjects(run_folder, ["last"], 64)


def test_options_that_would_be_ignored_are_refused(run_folder: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text("{}")
    for place, kind in ((run_folder / "checkpoints" / "step_000003", "checkpoint"), (tmp_path, "model")):
        told = rf"--steps first would be ignored, .* is one {kind}: leave it out, or name the run"
        with pytest.raises(ValueError, match=told):
            evaluate([str(place), "--data", str(data), "--steps", "first"])
    with pytest.raises(
        ValueError, match=r"--fine-tune-recipe paper would be ignored, .*: add --fine-tune, or"
    ):
        evaluate([str(run_folder), "--data", str(data), "--fine-tune-recipe", "paper"])


def test_numbers_that_cannot_be_are_refused(run_folder: Path, data: Path) -> None:
    with pytest.raises(ValueError, match=r"--k '5,many' must be whole numbers with commas between"):
        evaluate([str(run_folder), "--data", str(data), "--k", "5,many"])
    with pytest.raises(ValueError, match=r"--k \(0,\) must be positive"):
        evaluate([str(run_folder), "--data", str(data), "--k", "0"])
    with pytest.raises(ValueError, match="--workers -1 must not be negative: 0 decodes in this process"):
        evaluate([str(run_folder), "--data", str(data), "--workers", "-1"])


def test_an_image_that_cannot_be_read_is_told_by_its_place(data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "photos" / "cats" / "x.png"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no picture")
    shutil.copytree(data / "heldout", tmp_path / "shards")
    damage(tmp_path / "shards", sample=3)
    for name, told in (("photos", str(broken)), ("shards", f"{tmp_path}/shards/000000.tar sample 3")):
        with pytest.raises(ValueError, match=rf"the last: {told}: .*mend or remove such images of a folder"):
            list(readable(Pictures(tmp_path / name, 32), Counter(), limit=0.001, workers=0, title="test"))


def damage(folder: Path, sample: int) -> None:
    """Overwrite the image bytes of a sample; the size of the shard stays."""
    shards = ShardFolder(folder)
    content = shards.sample(sample)["png"]
    tar = folder / "000000.tar"
    tar.write_bytes(tar.read_bytes().replace(content, b"\0" * len(content)))
