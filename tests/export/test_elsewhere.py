"""Are checkpoints found that a run keeps elsewhere, and is no more of them read than the format holds?"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import fsspec
import pytest
from torch.nn.modules.module import register_module_module_registration_hook

from pretrain.checkpoint import PLACE_RECORD, load_towers, record_place
from pretrain.checkpoint.fetch import fetched
from pretrain.checkpoint.stores import Remote, store_at
from pretrain.evaluate.checkpoints import find_checkpoint
from pretrain.export.__main__ import export_run, main
from pretrain.export.formats import EXPORTERS
from pretrain.export.trained import read_trained
from pretrain.intact import files_in, sha256
from tests.evaluate.runs import resealed
from tests.export.conftest import last


def kept_at(run: Path, place: Path | str) -> Path:
    """A run's folder whose record tells that its checkpoints lie elsewhere."""
    run.mkdir()
    (run / PLACE_RECORD).write_text(json.dumps({"checkpoints": str(place)}))
    return run


@pytest.fixture
def url(vit_run: Path) -> str:
    """The checkpoints of a run in a store."""
    memory = fsspec.filesystem("memory")
    memory.rm("/bucket", recursive=True) if memory.exists("/bucket") else None
    for name in files_in(vit_run / "checkpoints"):
        memory.pipe_file(f"/bucket/vit/{name}", (vit_run / "checkpoints" / name).read_bytes())
    return "memory://bucket/vit"


def test_checkpoints_in_another_folder_are_found(vit_run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(vit_run / "checkpoints", elsewhere)
    run = kept_at(tmp_path / "run", elsewhere)
    assert find_checkpoint(run, "last") == elsewhere / "step_000003"
    assert find_checkpoint(run, "first") == elsewhere / "step_000000"
    with pytest.raises(
        FileNotFoundError, match=r"there is none: choose one of the whole ones, steps \[0, 3\]"
    ):
        find_checkpoint(run, "2")


def test_checkpoints_behind_a_url_are_exported(vit_run: Path, url: str, tmp_path: Path) -> None:
    run = kept_at(tmp_path / "run", url)
    (there,) = export_run([str(run), "--to", "timm", "--step", "3", "--which", "student"])
    (here,) = export_run(
        [str(vit_run), "--to", "timm", "--which", "student", "--out", str(tmp_path / "here")]
    )
    assert sha256(there.folder / "model.safetensors") == sha256(here.folder / "model.safetensors")
    copied = {path.name for path in (run / "fetched" / "step_000003").iterdir()}
    assert "student" in copied and not copied & {"teacher", "optimizer", "random"}


@pytest.mark.parametrize("name", ["../../escaped", "teacher/../../escaped", "ABSOLUTE"])
def test_a_name_that_leads_out_of_the_folder_is_not_copied(
    name: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, outside = f"{url}/step_000003", tmp_path / "escaped"
    listed = store_at(step).sizes() | {str(outside) if name == "ABSOLUTE" else name: 3}
    monkeypatch.setattr(Remote, "sizes", lambda store: listed)  # a file system in memory resolves such names
    monkeypatch.setattr(Remote, "read", lambda store, *_: bytearray(b"bad"))
    with pytest.raises(ValueError, match=r"escaped', which would be written outside .*remove that object"):
        fetched(step, "teacher", tmp_path / "a" / "b")
    assert not list(tmp_path.rglob("escaped")) and not (tmp_path / "a").exists()


def test_a_store_that_fails_midway_leaves_no_part_of_a_file(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Remote.read

    def failing(store: Remote, name: str, *where: int) -> bytearray:
        if where:
            raise OSError("the store is gone")
        return read(store, name)

    monkeypatch.setattr(Remote, "read", failing)
    with pytest.raises(OSError, match="the store is gone"):
        fetched(f"{url}/step_000003", "teacher", tmp_path / "copy")
    assert not files_in(tmp_path)


def test_what_was_copied_is_copied_again_only_when_the_store_has_another(url: str, tmp_path: Path) -> None:
    run = kept_at(tmp_path / "run", url)
    layout = find_checkpoint(run, "last") / "teacher" / "layout.json"
    layout.touch()
    before = layout.stat().st_mtime_ns
    find_checkpoint(run, "last")
    assert layout.stat().st_mtime_ns == before
    memory = fsspec.filesystem("memory")
    mark = "/bucket/vit/step_000003/COMPLETE"
    memory.pipe_file(mark, memory.cat_file(mark) + b" ")
    find_checkpoint(run, "last")
    assert layout.stat().st_mtime_ns > before


def test_own_checkpoints_that_the_record_does_not_mean_are_told(
    vit_run: Path, url: str, tmp_path: Path
) -> None:
    run = kept_at(tmp_path / "run", url)
    shutil.copytree(vit_run / "checkpoints", run / "checkpoints")
    with pytest.raises(ValueError, match=r"holds checkpoints, and .* keeps them in memory://.*: delete"):
        find_checkpoint(run, "last")
    (run / PLACE_RECORD).write_text(record_place(run, run / "checkpoints"))
    moved = run.rename(tmp_path / "moved")
    assert find_checkpoint(moved, "last") == moved / "checkpoints" / "step_000003"


def test_the_newest_checkpoint_is_no_older_one_when_it_is_damaged(
    vit_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = kept_at(tmp_path / "run", tmp_path / "kept")
    shutil.copytree(vit_run / "checkpoints", tmp_path / "kept")
    newest = tmp_path / "kept" / "step_000003"
    shutil.copytree(newest, tmp_path / "kept" / "step_000004")
    (tmp_path / "kept" / "step_000004" / "COMPLETE").unlink()  # it is being written
    assert find_checkpoint(run, "3") == newest and not capsys.readouterr().err
    assert find_checkpoint(run, "last") == newest
    told = capsys.readouterr().err
    assert "step_000004 in " in told and "still being written" in told and "step_000003 is used" in told
    (newest / "facts.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"facts\.json has 2 bytes .* whole ones, steps \[0\]"):
        find_checkpoint(run, "last")


def test_damaged_record_of_the_place_is_told(tmp_path: Path) -> None:
    run = kept_at(tmp_path / "run", "x")
    (run / PLACE_RECORD).write_text("{}")
    with pytest.raises(ValueError, match=r"checkpoints\.json is damaged .* it must say"):
        find_checkpoint(run, "last")


def test_only_what_the_format_holds_is_read(internimage_run: Path, vit_run: Path) -> None:
    for run, name in ((vit_run, "timm"), (internimage_run, "internimage")):
        step = find_checkpoint(run, "last")
        towers = read_trained(run, step, "teacher", EXPORTERS[name].parts).towers
        whole = last(run).towers.state_dict()
        real = {key: value for key, value in towers.state_dict().items() if not value.is_meta}
        assert all(value.equal(whole[key]) for key, value in real.items())
        assert {key.split(".")[0] for key in real} <= set(EXPORTERS[name].parts or ())
        assert towers.state_dict().keys() == whole.keys() and len(real) < len(whole)


def test_a_header_that_is_too_long_is_not_taken_memory_for(vit_run: Path, tmp_path: Path) -> None:
    step = tmp_path / "step_000003"
    shutil.copytree(vit_run / "checkpoints" / "step_000003", step)
    file = step / "teacher" / "rank_00000.safetensors"
    file.write_bytes(struct.pack("<Q", 2**62) + file.read_bytes()[8:])
    with pytest.raises(ValueError, match=r"begins with a header of 4611686018427387904 bytes, more than"):
        load_towers(resealed(step))


def test_facts_that_the_weights_do_not_know_take_no_memory(vit_run: Path, tmp_path: Path) -> None:
    """An embedding of 10^11 tokens would be 13 TB."""
    step = tmp_path / "step_000003"
    shutil.copytree(vit_run / "checkpoints" / "step_000003", step)
    facts = json.loads((step / "facts.json").read_text())
    (step / "facts.json").write_text(json.dumps(facts | {"vocab_size": 10**11}))
    with pytest.raises(
        ValueError, match=r"describes a model of .* tensors, .* MiB and more, where its weights are"
    ):
        load_towers(resealed(step))


@pytest.mark.parametrize(("changed", "told"), [
    ({"layers": 3_000}, r"a model of .* tensors, .* MiB and more, where its weights are .* take both"),
    ({"width": 2**60}, r"the recipe of .* describes no model .* take another checkpoint"),
    ({"ffn": 10**30}, r"the recipe of .* describes no model .* take another checkpoint"),
])  # fmt: skip
def test_a_recipe_is_built_as_far_as_the_weights_explain_it(
    vit_run: Path, tmp_path: Path, changed: dict[str, int], told: str
) -> None:
    step = tmp_path / "step_000003"
    shutil.copytree(vit_run / "checkpoints" / "step_000003", step)
    recipe = json.loads((step / "run.json").read_text())
    (step / "run.json").write_text(json.dumps(recipe | {"text": recipe["text"] | changed}))
    names: list[str] = []
    counting = register_module_module_registration_hook(lambda module, name, child: names.append(name))
    try:
        with pytest.raises(ValueError, match=told):
            load_towers(resealed(step))
    finally:
        counting.remove()
    assert len(names) < 10_000  # of 60,000


def test_a_layout_of_more_than_the_files_takes_no_memory(vit_run: Path, tmp_path: Path) -> None:
    step = tmp_path / "step_000003"
    shutil.copytree(vit_run / "checkpoints" / "step_000003", step)
    layout = json.loads((step / "teacher" / "layout.json").read_text())
    layout["parameters"]["more"] = {"shape": [2**40], "parts": [[0, 0, 2**40]]}
    (step / "teacher" / "layout.json").write_text(json.dumps(layout))
    with pytest.raises(ValueError, match=r"layout.json tells of .* bytes of values, where its files have"):
        load_towers(resealed(step))


def test_an_unfinished_checkpoint_is_not_exported(
    vit_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = tmp_path / "checkpoints" / "step_000003"
    shutil.copytree(vit_run / "checkpoints" / "step_000003", step)
    (step / "teacher" / "buffers.safetensors").unlink()
    assert main([str(tmp_path), "--to", "timm", "--step", "3"]) == 1
    told = capsys.readouterr().err
    assert (
        "cannot be used, since teacher/buffers.safetensors is missing: the run holds no whole checkpoint"
        in told
    )
    assert not (tmp_path / "export").exists()
