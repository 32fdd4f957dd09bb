"""Is what a run writes down whole or not there, also when the disk is full while it is overwritten?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain import evidence, intact
from pretrain.guard import Verdict
from pretrain.initial import begun
from pretrain.initial.asked import Init
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
    evidence.write_rank(bundle, 0, toy_batch(4, 4), [], {})
    with files_of_at_most(1000), pytest.raises(OSError, match="File too large"):
        evidence.write_rank(bundle, 1, toy_batch(4, 4), [], {})
    with pytest.raises(ValueError, match=r"lacks rank_00001.safetensors, rank_00001.json \(2 files in all\)"):
        evidence.read_bundle(bundle)
    evidence.write_rank(bundle, 1, toy_batch(4, 4), [], {})
    recorded, run, paths = evidence.read_bundle(bundle)
    assert recorded["batch"] == 4 and run == toy_run() and paths.out == tmp_path


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_a_damaged_record_of_the_first_weights_is_told_with_what_to_do(tmp_path: Path, content: str) -> None:
    (tmp_path / "init.json").write_text(content)
    paths = Paths({}, tmp_path, tmp_path, init=Init(tmp_path / "weights.safetensors"))
    with pytest.raises(ValueError, match=r"init.json is damaged .*: it must name .*; delete it, then"):
        begun.beginning(toy_run(), paths, FACTS, tmp_path / "step_000003")
