"""Is what a run writes down whole or not there, also when the disk is full while it is overwritten?"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from pretrain import evidence, intact, strict_json
from pretrain.guard import Verdict
from pretrain.initial import begun
from pretrain.initial.asked import Init
from pretrain.monitor.log import line_of
from pretrain.paths import Paths
from tests.disk import files_of_at_most
from tests.engine.toy import FACTS, toy_batch, toy_run


def test_a_record_that_finds_no_room_leaves_the_one_before(tmp_path: Path) -> None:
    record = tmp_path / "recipe.json"
    intact.write_text(record, toy_run().to_json())
    before = record.read_text()
    with files_of_at_most(100), pytest.raises(OSError, match="File too large"):
        intact.write_text(record, replace(toy_run(), steps=20).to_json())
    assert record.read_text() == before and [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


def test_half_a_bundle_is_no_bundle(tmp_path: Path) -> None:
    verdict = Verdict(3, 4, 1.0, {"dense": 2.0}, ("gradient norm is 1, above 0.5",))
    bundle = evidence.bundle_of(tmp_path, verdict)
    intact.write_text(tmp_path / "recipe.json", toy_run().to_json())
    intact.write_text(tmp_path / "data.json", json.dumps({"toy": str(tmp_path)}))
    how = {"world": 2, "micro_batches": 1, "compile": False}
    places = {"ds_config": tmp_path, "tokenizer": None, "guide": None, "checkpoints": tmp_path}
    evidence.write_common(bundle, verdict, set(), how, places)
    evidence.write_rank(bundle, 0, toy_batch(4, 4), [], {}, has_images=True)
    with files_of_at_most(1000), pytest.raises(OSError, match="File too large"):
        evidence.write_rank(bundle, 1, toy_batch(4, 4), [], {}, has_images=True)
    with pytest.raises(ValueError, match=r"lacks rank_00001.safetensors, rank_00001.json \(2 files in all\)"):
        evidence.read_bundle(bundle)
    evidence.write_rank(bundle, 1, toy_batch(4, 4), [], {}, has_images=True)
    recorded, run, paths = evidence.read_bundle(bundle)
    assert recorded["batch"] == 4 and run == toy_run() and paths.out == tmp_path


def bundle_with_images(out: Path, batch: int) -> Path:
    bundle = evidence.bundle_of(out, Verdict(batch, batch, 1.0, {}, ("",)))
    evidence.write_rank(bundle, 0, toy_batch(4, 4), [], {}, has_images=True)
    return bundle


def test_images_of_refused_steps_take_no_more_than_their_share_and_leave_room_for_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for batch in range(3):
        bundle = bundle_with_images(tmp_path, batch)
    num_bytes = toy_batch(4, 4).num_bytes
    taken = 2 * (bundle / "rank_00000.safetensors").stat().st_size  # of the others
    monkeypatch.setattr(evidence.shutil, "disk_usage", lambda path: Mock(free=num_bytes + 5))
    assert evidence.without_images(bundle, num_bytes, taken + num_bytes, 5) == ""
    told = evidence.without_images(bundle, num_bytes, taken + num_bytes - 1, 5)
    assert (
        "those of 2 others 0.00, and guard.evidence_gib is" in told and "raise it, or remove bundles" in told
    )
    assert "that are free the next checkpoint takes" in evidence.without_images(bundle, num_bytes, 2**30, 6)


def test_a_bundle_without_images_keeps_its_samples_and_is_whole(tmp_path: Path) -> None:
    bundle = bundle_with_images(tmp_path, 4)
    for name in ("recipe.json", "data.json"):
        (bundle / name).touch()
    evidence.write_rank(bundle, 1, toy_batch(4, 4), [{"position": 7}], {}, has_images=False)
    assert evidence.missing_from(bundle, 2) == []
    assert evidence.read_batch(bundle, 0) is not None and evidence.read_batch(bundle, 1) is None
    assert json.loads((bundle / "rank_00001.json").read_text())["samples"] == [{"position": 7}]


def strictly(text: str) -> object:
    """What a reader makes of it that knows JSON alone."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_none_are_written_as_json_and_read_again(tmp_path: Path) -> None:
    verdict = Verdict(3, 4, math.inf, {"dense": math.nan}, ("gradient norm is inf",))
    journal, bundle = evidence.Journal(tmp_path), evidence.bundle_of(tmp_path, verdict)
    journal.refused(verdict, bundle)
    for name in ("recipe.json", "data.json"):
        (tmp_path / name).write_text(toy_run().to_json() if name == "recipe.json" else "{}")
    how = {"world": 1, "micro_batches": 1, "compile": False}
    places = {"ds_config": tmp_path, "tokenizer": None, "guide": None, "checkpoints": tmp_path}
    evidence.write_common(bundle, verdict, set(), how, places)
    evidence.write_rank(bundle, 0, toy_batch(4, 4), [], {"dense": -math.inf}, has_images=True)
    written = [tmp_path / "guard.jsonl", bundle / "refused.json", bundle / "rank_00000.json"]
    assert strictly(written[0].read_text())["norm"] == "Infinity"
    assert strictly(written[1].read_text())["losses"] == {"dense": "NaN"}
    assert strictly(written[2].read_text())["losses"] == {"dense": "-Infinity"}
    recorded, _, _ = evidence.read_bundle(bundle)
    assert recorded["norm"] == math.inf and math.isnan(recorded["losses"]["dense"])
    assert strictly(line_of({"step": 1, "collapse": {"dense": {"std": math.nan}}}).decode())
    written[0].write_text(json.dumps({"event": "refused", "batch": 9, "norm": math.nan}))  # as it was
    assert evidence.Journal(tmp_path).left_out() == {9}
    assert math.isnan(strict_json.loads('{"a": [NaN]}')["a"][0])


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_a_damaged_record_of_the_first_weights_is_told_with_what_to_do(tmp_path: Path, content: str) -> None:
    (tmp_path / "init.json").write_text(content)
    paths = Paths({}, tmp_path, tmp_path, init=Init(tmp_path / "weights.safetensors"))
    with pytest.raises(ValueError, match=r"init.json is damaged .*: it must name .*; delete it, then"):
        begun.beginning(toy_run(), paths, FACTS, tmp_path / "step_000003")
