"""Is an export whole and proven, or nothing, and does it say what is wrong with bad input?"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data_prep.files import sha256_file
from pretrain.evaluate.evaluation import evaluate
from pretrain.evaluate.probes import PROBES
from pretrain.export import onnx_graph, several
from pretrain.export.__main__ import export_run, main
from pretrain.export.agreement import compare
from pretrain.export.formats import EXPORTERS, export
from pretrain.export.keys import Keys
from pretrain.export.names import NotProven
from pretrain.export.trained import count_samples
from pretrain.intact import COMPLETE, digest, files_in, mark
from pretrain.recipes import load
from tests.disk import files_of_at_most
from tests.evaluate.runs import write_run
from tests.evaluate.sets import COLORS, write_set
from tests.export.conftest import FACTS, last
from tests.fakes import shrink

FILES_OF_WEIGHTS = sorted(EXPORTERS.keys() - {"onnx"})  # a graph has its own test


def test_command_writes_files_card_and_keys(vit_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (exported,) = export_run([str(vit_run), "--to", "timm"])
    assert exported.folder == vit_run / "export" / "timm"
    assert {path.name for path in exported.folder.iterdir()} == {
        "README.md",
        "config.json",
        "keys.json",
        "model.safetensors",
    }
    assert (
        "proven: model.safetensors at 64 px: class token, tokens, pooled features: cosine >= 1.0000000"
        in capsys.readouterr().out
    )


def test_keys_tell_of_every_tensor_of_the_towers(internimage_run: Path, tmp_path: Path) -> None:
    trained = last(internimage_run)
    exported = export(trained, "internimage", tmp_path / "out")
    record = json.loads((exported.folder / "keys.json").read_text())["files"]
    for name, told in record.items():
        state = torch.load(exported.folder / name, weights_only=True)["model"]
        assert {*told["written"], *told["added"]} == set(state)
        assert len(told["written"]) + len(told["skipped"]) == len(trained.towers.state_dict())
        assert all(key.startswith(("text", "image_projection")) for key in told["skipped"])


def test_second_export_replaces_the_first(internimage_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    first = export(last(internimage_run), "internimage", folder)
    (folder / "stale").write_text("of an earlier version")
    second = export(last(internimage_run), "internimage", folder)
    assert not (folder / "stale").exists() and first.keys == second.keys
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_to_a_link_lies_where_it_leads(internimage_run: Path, tmp_path: Path) -> None:
    folder, link = tmp_path / "disk" / "out", tmp_path / "link"
    folder.mkdir(parents=True)
    link.symlink_to(folder)
    export(last(internimage_run), "internimage", link)
    assert link.is_symlink() and (folder / "keys.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


@pytest.mark.parametrize("format_name", FILES_OF_WEIGHTS)
def test_wrong_weights_are_not_proven_and_leave_no_file(
    format_name: str, internimage_run: Path, vit_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_folder = internimage_run if format_name == "internimage" else vit_run
    exporter = EXPORTERS[format_name]

    def write_wrongly(trained, folder):
        told = exporter.write(trained, folder)
        spoil(folder / next(iter(told)))
        return told

    monkeypatch.setitem(EXPORTERS, format_name, dataclasses.replace(exporter, write=write_wrongly))
    with pytest.raises(NotProven, match=r"cosine.*must exceed 0\.9999"):
        export(last(run_folder), format_name, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format_name", FILES_OF_WEIGHTS)
def test_missing_tensor_is_not_proven(
    format_name: str, internimage_run: Path, vit_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_folder = internimage_run if format_name == "internimage" else vit_run
    exporter = EXPORTERS[format_name]

    def write_less(trained, folder):
        told = exporter.write(trained, folder)
        spoil(folder / next(iter(told)), lose=True)
        return told

    monkeypatch.setitem(EXPORTERS, format_name, dataclasses.replace(exporter, write=write_less))
    with pytest.raises(NotProven, match="does not load"):
        export(last(run_folder), format_name, tmp_path / "out")


def test_earlier_export_survives_one_that_is_not_proven(
    vit_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(last(vit_run), "timm", tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def refuse(trained, folder):
        raise NotProven("no")

    monkeypatch.setitem(EXPORTERS, "timm", dataclasses.replace(EXPORTERS["timm"], prove=refuse))
    with pytest.raises(NotProven):
        export(last(vit_run), "timm", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_not_a_number_is_not_agreement() -> None:
    ours = torch.ones(2, 4)
    with pytest.raises(NotProven, match="nan"):
        compare("file", "tokens", 64, ours, torch.full((2, 4), float("nan")))


def test_a_multiple_of_the_features_is_not_agreement() -> None:
    ours = torch.randn(2, 4)
    with pytest.raises(NotProven, match="difference"):
        compare("file", "tokens", 64, ours, 2 * ours)


def test_a_tensor_that_is_not_told_of_is_an_error() -> None:
    with pytest.raises(AssertionError, match="not told of"):
        Keys({"a": "a"}, {}).require_whole(["a", "b"], ["a"])


def test_card_says_what_was_trained_and_measured(vit_run: Path, tmp_path: Path) -> None:
    row = {"accuracy": 0.5, "interval": [0.4, 0.6], "chance": 0.04, "n": 100}
    trained = dataclasses.replace(
        last(vit_run),
        evaluation={
            "checkpoints": {"step_000003": dict.fromkeys(PROBES, row)},
            "data": {"heldout": {"name": "scenes", "num_samples": 1000}},
        },
        num_samples={"imagenet1k": 1_281_167},
        facts=dataclasses.replace(FACTS, sha256={"init": "9f86d0", "data.imagenet1k": "3c59dc"}),
    )
    export(trained, "timm", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in (
        "`m3i.vit_b16`",
        "after 3 of 3 steps",
        "64 x 64 pixels",
        "mean: [0.485, 0.456, 0.406]",
        "[123.675, 116.28, 103.53]",
        "`imagenet1k`: 1,281,167 samples (manifest of SHA-256 3c59dc), supervision category",
        "categories: 5",
        "started from weights of SHA-256 9f86d0",
        "heldout: `scenes`, 1,000 samples",
        "50.0 [40.0, 60.0]",
        'timm.create_model("local-dir:FOLDER", pretrained=True)',
        "cosine >= ",
        "## Licence",
    ):
        assert fact in card, fact


def test_samples_are_those_that_the_checkpoint_tells(tmp_path: Path) -> None:
    write_set(tmp_path / "colors", "train", 3, text=False)
    manifest, place = tmp_path / "colors" / "manifest.json", tmp_path / "data.json"
    place.write_text(json.dumps({"here": str(tmp_path / "colors"), "gone": str(tmp_path / "gone")}))
    sha256 = {"data.here": sha256_file(manifest)}
    told = dataclasses.replace(FACTS, sha256=sha256, num_samples={"here": 7, "gone": 9})
    assert count_samples(told, place) == count_samples(told, tmp_path / "none") == {"here": 7, "gone": 9}
    older = dataclasses.replace(FACTS, sha256=sha256)  # it tells no numbers
    assert count_samples(older, tmp_path / "none") == {} == count_samples(FACTS, place)
    assert count_samples(older, place) == {"here": 3 * len(COLORS)}
    next((tmp_path / "colors").glob("*.tar")).write_bytes(
        b""
    )  # no matter: the card tells of the manifest's number
    assert count_samples(older, place) == {"here": 3 * len(COLORS)}
    shutil.rmtree(tmp_path / "colors")
    write_set(tmp_path / "colors", "train", 4, text=False)  # built again since
    assert count_samples(older, place) == {}
    manifest.write_text("{")
    assert count_samples(older, place) == {}


def test_card_says_when_nothing_was_evaluated(vit_run: Path, tmp_path: Path) -> None:
    export(last(vit_run), "timm", tmp_path / "out")
    assert "Not evaluated at this checkpoint" in (tmp_path / "out" / "README.md").read_text()


def test_card_has_metrics_of_these_weights_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    write_set(data / "train", "train", 2)
    write_set(data / "heldout", "heldout", 2, seed=1)
    run = shrink(load("m3i.vit_b16"))
    facts = dataclasses.replace(FACTS, vocab_size=0)
    here, other = (write_run(tmp_path / name, run, facts, steps=(3,)) for name in ("run", "other"))

    def card() -> str:
        (exported,) = export_run([str(here), "--to", "timm"])
        return (exported.folder / "README.md").read_text()

    result = here / "evaluation.json"
    evaluate([str(here), "--data", str(data), "--probes", "knn", "--k", "2", "--steps", "last"])
    table = "kNN, mean token"
    assert table in card() and "warning" not in capsys.readouterr().err
    whole = result.read_text()
    told = json.loads(whole)
    result.write_text(json.dumps({key: value for key, value in told.items() if key != "weights"}))
    assert "since evaluation.json does not tell of which weights it is: `python" in card()
    assert "warning: the card has no metrics, since evaluation.json does not" in capsys.readouterr().err
    result.write_text(whole)
    shutil.copytree(other / "checkpoints", here / "checkpoints", dirs_exist_ok=True)
    assert table in card()  # of equal weights, made again
    spoil_step(here / "checkpoints" / "step_000003")
    assert "since evaluation.json is of another step_000003: `python" in card() and table not in card()


def spoil_step(step: Path) -> None:
    """Another teacher in place of the one of a checkpoint, as a run makes that begins anew."""
    file = next((step / "teacher").glob("rank_*.safetensors"))
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file({name: 2 * values for name, values in load_file(file).items()}, file, metadata)
    (step / COMPLETE).unlink()
    mark(step, digest(step, files_in(step)))


def test_format_for_another_backbone_is_refused(internimage_run: Path, vit_run: Path) -> None:
    with pytest.raises(
        ValueError, match=r"timm holds backbones of the families .*choose from .*'internimage'.*"
    ):
        export_run([str(internimage_run), "--to", "timm"])
    with pytest.raises(
        ValueError, match=r"internimage holds backbones of the families.*choose from .*'timm'.*"
    ):
        export_run([str(vit_run), "--to", "internimage"])


def test_another_format_in_the_folder_and_an_interpreter_without_use_are_refused(
    vit_run: Path, tmp_path: Path
) -> None:
    (exported,) = export_run([str(vit_run), "--to", "timm", "--out", str(tmp_path / "out")])
    folder = exported.folder
    assert {path.stat().st_mode & 0o044 for path in folder.iterdir()} == {0o044}
    with pytest.raises(FileExistsError, match="holds an export to timm: name another --out for safetensors"):
        export_run([str(vit_run), "--to", "safetensors", "--out", str(folder)])
    with pytest.raises(ValueError, match=r"--python .* would be ignored: no other interpreter proves timm"):
        export_run([str(vit_run), "--to", "timm", "--python", sys.executable])
    with pytest.raises(ValueError, match=r"--out .*model\.safetensors/x cannot be written"):
        export_run([str(vit_run), "--to", "timm", "--out", str(folder / "model.safetensors" / "x")])


def test_several_formats_are_written_from_one_read(
    vit_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reads, read = [], several.read_trained

    def counted(*arguments):
        reads.append(arguments[-1])
        return read(*arguments)

    def refuse(trained, folder):
        raise NotProven("other tokens")

    monkeypatch.setattr(several, "read_trained", counted)
    monkeypatch.setitem(EXPORTERS, "timm", dataclasses.replace(EXPORTERS["timm"], prove=refuse))
    arguments = [str(vit_run), "--out", str(tmp_path), "--to"]
    assert main([*arguments, "timm", "torchvision", "detectron2", "timm"]) == 1  # that which failed, not 3
    assert reads == [{"encoder"}] and {path.name for path in tmp_path.iterdir()} == {
        "torchvision",
        "detectron2",
    }
    assert "was not kept: timm: other tokens" in capsys.readouterr().err
    monkeypatch.setattr(several, "fitting", lambda run: ["onnx", "safetensors", "torchvision"])
    is_last = {}
    for name, prove in (("onnx", onnx_graph.prove), ("torchvision", EXPORTERS["torchvision"].prove)):

        def noting(trained, folder, name=name, prove=prove):
            is_last[name] = trained.is_last
            return prove(trained, folder)

        monkeypatch.setitem(EXPORTERS, name, dataclasses.replace(EXPORTERS[name], prove=noting))
    assert main([*arguments, "all"]) == 0 and reads[1:] == [None]
    assert list(is_last.items()) == [("torchvision", False), ("onnx", True)]  # it lets the towers go
    shutil.rmtree(tmp_path / "onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"torchvision", "detectron2", "safetensors"}
    assert main([*arguments, "all", "timm"]) == 1
    assert "--to all timm names formats beside 'all': give either" in capsys.readouterr().err


def test_unknown_format_names_those_that_fit(vit_run: Path) -> None:
    with pytest.raises(
        ValueError, match=r"'caffe' is unknown; choose from .* \(this run fits \[.*'timm'.*\]\)"
    ):
        export_run([str(vit_run), "--to", "caffe"])


def test_unknown_weights_are_refused(vit_run: Path) -> None:
    with pytest.raises(ValueError, match=r"--which 'pupil' is unknown; choose from \['student', 'teacher'\]"):
        export_run([str(vit_run), "--to", "timm", "--which", "pupil"])


def test_folder_of_other_files_is_not_touched(vit_run: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"is no export.*give an empty or new folder"):
        export_run([str(vit_run), "--to", "timm", "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_full_disk_is_told_before_anything_is_written(
    vit_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(OSError, match=r"0 MiB are free for .*: free space"):
        export(last(vit_run), "timm", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# By torch, safetensors and onnx_ir.
@pytest.mark.parametrize(
    ("name", "run"), [("internimage", "internimage_run"), ("safetensors", "vit_run"), ("onnx", "vit_run")]
)
def test_a_disk_that_is_full_in_the_middle_is_told_and_the_export_before_stays(
    name: str, run: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "keys.json").write_text(json.dumps({"format": name}))
    trained = last(request.getfixturevalue(run))
    with (
        files_of_at_most(2**14),
        pytest.raises(OSError, match=r"no space is left for .*out \(.+\): free space"),
    ):
        export(trained, name, folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "keys.json"]


@pytest.mark.parametrize("step", ["mkdir", "write_text", "rename"])  # of the folder, of keys.json, at the end
def test_an_export_that_fails_leaves_nothing_and_takes_nothing(
    step: str,
    vit_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(path: str | Path, *rest: object, **named: object) -> None:
        if ".partial" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return plain(path, *rest, **named)

    owner = os if step == "rename" else Path
    plain = getattr(owner, step)
    there = tmp_path / "there"
    there.mkdir()
    (there / "keys.json").write_text(json.dumps({"format": "timm"}))
    monkeypatch.setattr(owner, step, full)
    for out in ("new/above/timm", "there"):
        assert main([str(vit_run), "--to", "timm", "--out", str(tmp_path / out)]) == 1
        assert re.search(r"error: no space is left for .*: free space on that disk", capsys.readouterr().err)
    with pytest.raises(OSError, match="no space is left"):
        export(last(vit_run), "timm", tmp_path / "new" / "timm")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["keys.json", "there"]


def test_damaged_evaluation_is_told(vit_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoints").symlink_to(vit_run / "checkpoints")
    (folder / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match=r"evaluation\.json is no result of.*run that again, or delete"):
        export_run([str(folder), "--to", "timm"])


def test_command_exits_non_zero_when_nothing_is_proven(
    vit_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(trained, folder):
        raise NotProven("tokens differ")

    monkeypatch.setitem(EXPORTERS, "timm", dataclasses.replace(EXPORTERS["timm"], prove=refuse))
    arguments = [str(vit_run), "--out", str(tmp_path / "out"), "--to"]
    assert main([*arguments, "timm"]) == 1
    assert capsys.readouterr().err == "error: the export is not proven and was not kept: tokens differ\n"
    assert main([*arguments, "caffe"]) == 1
    assert capsys.readouterr().err.startswith("error: --to 'caffe' is unknown")

    def end(trained, folder):
        raise KeyboardInterrupt

    monkeypatch.setitem(EXPORTERS, "timm", dataclasses.replace(EXPORTERS["timm"], prove=end))
    assert main([*arguments, "timm"]) == 130
    assert capsys.readouterr().err == "\ninterrupted: the folder of the export is as it was\n"
    assert list(tmp_path.iterdir()) == []


def spoil(path: Path, lose: bool = False) -> None:
    """Change one weight matrix of a written file, or take it out."""
    is_pickle = path.suffix == ".pth"
    content = torch.load(path, weights_only=True) if is_pickle else {None: load_file(path)}
    container, state = next(iter(content.items()))
    key = next(key for key, value in state.items() if value.ndim == 4)
    value = state.pop(key)
    if not lose:
        state[key] = value.flip(0)
    torch.save({container: state}, path) if is_pickle else save_file(state, path)
