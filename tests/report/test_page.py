"""Is the page whole, self-contained and honest about what is missing?"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pretrain.collapse import FEWEST_STEPS
from pretrain.config import Run
from pretrain.data.shards import ShardFolder
from pretrain.report import provenance
from pretrain.report.__main__ import main
from pretrain.report.accuracy import accuracies
from pretrain.report.header import header, verdicts
from pretrain.report.page import _accuracies, heldout_folder
from pretrain.report.record import Record, read_record
from pretrain.report.teacher import NUM_NEIGHBOURS
from tests.report.conftest import CATEGORIES, small_run
from tests.report.fake_run import write_checkpoint, write_log

SECTIONS = ["verdict", "accuracy", "curves", "pairs", "features", "gaze", "neighbours"]
SECTIONS += ["captions", "confusion", "zero-shot", "data", "recipe", "environment"]
VOID = {"img", "br", "meta", "hr", "col"}


class Reader(HTMLParser):
    """Collects elements and checks that every one is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.missing: list[str] = []
        self._in_missing = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in_missing = dict(attrs).get("class") == "missing"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self._in_missing:
            self.missing.append(data)
        self._in_missing = False


def read(path: Path) -> tuple[str, Reader]:
    text = path.read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return text, reader


@pytest.fixture(scope="module")
def page(run_folder: Path) -> tuple[str, Reader]:
    return read(main([str(run_folder), "--candidates", "12"]))


def test_page_needs_nothing_outside_itself(page: tuple[str, Reader]) -> None:
    text, reader = page
    for tag, attributes in reader.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed")
        for name in ("src", "href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/")), f"{tag} {name}={value[:60]}"
    assert "url(" not in text and "@import" not in text


def test_every_section_is_present_and_filled(page: tuple[str, Reader]) -> None:
    _, reader = page
    ids = [attributes["id"] for tag, attributes in reader.elements if tag == "section"]
    assert ids == SECTIONS
    assert reader.missing == []


def test_page_stays_small(page: tuple[str, Reader]) -> None:
    assert len(page[0]) < 3 * 2**20


def test_every_picture_has_words(page: tuple[str, Reader]) -> None:
    _, reader = page
    pictures = [
        attributes.get("alt") or attributes.get("aria-label")
        for tag, attributes in reader.elements
        if tag in ("img", "svg")
    ]
    assert len(pictures) > 40
    assert all(pictures)


def test_headings_descend_in_order(page: tuple[str, Reader]) -> None:
    levels = [int(tag[1]) for tag, _ in page[1].elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_curves_hold_every_loss_of_the_log(run_folder: Path, page: tuple[str, Reader]) -> None:
    record = read_record(run_folder, {})
    labels = [attributes.get("aria-label") or "" for _, attributes in page[1].elements]
    for name in record.names("nats"):
        assert any(label.startswith(f"{name} over steps; at the end {name}") for label in labels), name


def test_curves_tell_sources_parts_and_the_time_of_a_step(run_folder: Path, page: tuple[str, Reader]) -> None:
    labels = " ".join(attributes.get("aria-label") or "" for _, attributes in page[1].elements)
    sources = sorted(read_record(run_folder, {}).run.data)
    for line in (*sources, "encoder", "decoders", "data wait", "backward", "host"):
        assert line in labels, line
    assert "model FLOP/s utilisation" in page[0] and "image_same, by source over steps" in labels


def test_hostile_caption_stays_text(page: tuple[str, Reader]) -> None:
    text, _ = page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;quotes&quot;" in text
    assert "<script" not in text


def test_captions_find_images_and_theirs_are_marked(page: tuple[str, Reader]) -> None:
    text, _ = page
    section = text.split('id="captions"')[1].split("<section")[0]
    rows = section.split('class="neighbours asked"')[1:]
    assert len(rows) == len(set(re.findall(r'class="query">(.*?)</div>', section))) > 1  # each caption once
    for row in rows:
        cosines = [float(found) for found in re.findall(r"held-out image, .*?, cosine (-?[\d.]+)", row)]
        assert len(cosines) == 2 * NUM_NEIGHBOURS  # before and after training
        for found in (cosines[:NUM_NEIGHBOURS], cosines[NUM_NEIGHBOURS:]):
            assert found == sorted(found, reverse=True)
    shares = re.findall(r"Of these captions (\d+) % before training, (\d+) % after", section)
    marked = [["✓" in half for half in re.split(r"after \d+ steps", row)] for row in rows]
    assert shares == [tuple(f"{100 * sum(found) / len(rows):.0f}" for found in zip(*marked, strict=True))]
    assert "✗" in section


def test_empty_run_names_what_to_run(run_folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run_folder / "recipe.json", bare)
    _, reader = read(main([str(bare)]))
    told = " ".join(reader.missing)
    assert "python -m pretrain.evaluate" in told
    assert "--data captioned=DIR labelled=DIR" in told
    assert "log.jsonl" in told and "checkpoint" in told


def test_single_checkpoint_without_text_or_evaluation_works(data: Path, tmp_path: Path) -> None:
    from pretrain.facts import DataFacts

    run, folder = small_run(), tmp_path / "one"
    folder.mkdir()
    (folder / "recipe.json").write_text(run.to_json())
    write_log(folder, run, 1)
    write_checkpoint(folder, run, DataFacts(CATEGORIES, 0), 0)
    arguments = [str(folder), "--heldout", str(data / "heldout"), "--candidates", "5"]
    arguments += ["--data", f"labelled={data / 'train'}", f"captioned={data / 'train'}"]
    text, reader = read(main(arguments))
    assert "before training" in text
    assert any("no text source" in told for told in reader.missing)


def test_held_out_images_may_be_class_folders_of_another_name(
    run_folder: Path, data: Path, tmp_path: Path
) -> None:
    record = read_record(run_folder, dict.fromkeys(small_run().data, tmp_path / "train"))
    record = replace(record, evaluation={})
    assert heldout_folder(record, None) is None
    for number, name in enumerate(CATEGORIES):
        (tmp_path / "val" / name).mkdir(parents=True)
        image = ShardFolder(data / "heldout").sample(number)["png"]
        (tmp_path / "val" / name / "one.png").write_bytes(image)
    assert heldout_folder(record, None) == tmp_path / "val"
    assert "a folder of images for each class" in str(provenance.data(record, tmp_path / "val"))
    assert heldout_folder(replace(record, data={"labelled": "s3://bucket/train"}), None) is None


def test_an_evaluation_of_other_weights_is_not_shown_as_this_runs(run_folder: Path, tmp_path: Path) -> None:
    result, folder = json.loads((run_folder / "evaluation.json").read_text()), tmp_path / "run"
    shutil.copytree(run_folder, folder)

    def read_with(**changed: Any) -> Record:
        (folder / "evaluation.json").write_text(json.dumps({**result, **changed}))
        return read_record(folder, {})

    whole, (first, last) = read_with(), result["checkpoints"]
    assert whole.evaluation == result and not whole.left_out
    one = read_with(weights={**result["weights"], last: "0" * 64})  # as of a run that has begun anew
    assert set(one.evaluation["checkpoints"]) == {first} and one.evaluation["confusion"] is None
    assert one.left_out == f"is of another {last}"
    told = str(_accuracies(one))
    assert f"A part of evaluation.json is not shown, since it is of another {last}." in told
    none = read_with(weights={})
    assert none.evaluation == {} and "does not tell of which weights it is" in verdicts(none)[0].evidence
    with pytest.raises(
        ValueError, match=r"^evaluation\.json is not shown, since it does not tell.*pretrain\.evaluate"
    ):
        _accuracies(none)
    shutil.rmtree(folder / "checkpoints" / first)  # pruned: of one result with what is there
    assert set(read_with().evaluation["checkpoints"]) == {first, last}
    other = read_with(weights=dict.fromkeys(result["weights"], "0" * 64))
    assert other.evaluation == {} and f"is of a {first} that is not there" in other.left_out


def test_half_written_log_line_is_skipped(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text((run_folder / "recipe.json").read_text())
    lines = (run_folder / "log.jsonl").read_text().splitlines()
    (tmp_path / "log.jsonl").write_text("\n".join([*lines[:3], lines[3][:40]]))
    record = read_record(tmp_path, {})
    assert [line["step"] for line in record.log] == [1, 2, 3]
    assert record.num_broken_lines == 1


def test_bad_input_names_the_remedy(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--out folder of a pre-training run"):
        main([str(tmp_path / "nowhere")])
    with pytest.raises(FileNotFoundError, match=r"recipe\.json is missing"):
        main([str(tmp_path)])
    with pytest.raises(ValueError, match="--data 'scenes' must look like NAME=DIR"):
        main([str(run_folder), "--data", "scenes"])
    with pytest.raises(ValueError, match="use these names"):
        main([str(run_folder), "--data", f"nobody={tmp_path}"])
    with pytest.raises(ValueError, match=r"--out /proc/report\.html cannot be written"):
        main([str(run_folder), "--out", "/proc/report.html"])
    with pytest.raises(FileNotFoundError, match="leave the option out"):
        main([str(run_folder), "--heldout", str(tmp_path / "nowhere")])
    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copy(run_folder / "recipe.json", broken)
    (broken / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        main([str(broken)])


def test_named_folder_overrides_the_recorded_one(run_folder: Path, data: Path) -> None:
    recorded = read_record(run_folder, {}).data
    assert recorded == dict.fromkeys(recorded, data / "train")
    changed = read_record(run_folder, {"labelled": data / "heldout"}).data
    assert changed == {**recorded, "labelled": data / "heldout"}


def test_curves_hold_every_measure_of_every_target(run_folder: Path, page: tuple[str, Reader]) -> None:
    text, reader = page
    labels = [attributes.get("aria-label") or "" for _, attributes in reader.elements]
    for name, ends in {
        "image_same": ("0.065", "38", "0.7"),
        "embedding": ("0.072", "25"),
        "text": ("0.072", "25", "2.1"),
    }.items():
        for end in ends:
            assert f"{name} over steps; at the end {name} {end}" in labels, (name, end)
    for title in (
        "Effective rank of the targets",
        "Agreement of prediction and target",
        "Entropy of the codes",
    ):
        assert f"<h3>{title}</h3>" in text
    for level, count in {
        "limit after step 100": 9,
        "spread, 1/√width": 4,
        "even use": 1,
        "constant": 2,
    }.items():
        assert text.count(f">{level}</text>") == count, level


def changed_log(
    run_folder: Path, out: Path, change: Callable[[dict[str, Any]], None], steps: int = 3, begun: int = 0
) -> Record:
    """The run with a change in each line of its log, without an evaluation, as one of so many steps after others."""
    run = json.loads((run_folder / "recipe.json").read_text())
    (out / "recipe.json").write_text(json.dumps(run | {"steps": steps}))
    lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        line["step"] += begun
        change(line)
    (out / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return read_record(out, {})


def test_no_interval_is_no_verdict(run_folder: Path) -> None:
    """Of a single held-out image."""
    record = read_record(run_folder, {})
    for before, holds in ((0.2, None), (0.9, False)):
        rows = [{"dense": {"accuracy": value, "chance": 0.1, "interval": None}} for value in (before, 0.6)]
        one = replace(
            record, evaluation={"checkpoints": dict(zip(("step_000000", "step_000001"), rows, strict=True))}
        )
        told = verdicts(one)[0]
        assert told.holds is holds and "no interval, so that nothing tells" in told.evidence
        shown = accuracies(one).text
        assert "whisker" not in shown and "60.0" in shown and shown.count(" no interval") == 2


def test_a_recipe_is_counted_as_far_as_the_checkpoint_explains_it(run_folder: Path) -> None:
    record = read_record(run_folder, {})
    recipe = json.loads(record.run.to_json())
    hostile = Run.from_json(json.dumps(recipe | {"text": recipe["text"] | {"layers": 3_000}}))
    with pytest.raises(ValueError, match=r"a model of .* tensors, .* MiB and more, where its weights are"):
        header(replace(record, run=hostile), "a run")


def test_hours_are_those_of_gpus_where_there_are_some(run_folder: Path) -> None:
    record = read_record(run_folder, {})
    for more, is_told in (({}, False), ({"memory_bytes": {"allocated": 2**30, "host": 2**30}}, True)):
        last = record.log[-1] | {"gpu_hours": 3.25} | more
        told = header(replace(record, log=(*record.log[:-1], last)), "a run").text
        assert ("GPU-hours" in told) == is_told == ("3.25" in told)


def test_verdict_fails_on_collapse_and_rising_loss(run_folder: Path, tmp_path: Path) -> None:
    def change(line: dict[str, Any]) -> None:
        line["collapse"]["image_same"]["std"] = 0.001
        line["nats"]["text"] = line["step"]

    record = changed_log(run_folder, tmp_path, change, steps=140, begun=FEWEST_STEPS)
    told = {verdict.claim: verdict for verdict in verdicts(record)}
    found = told["Collapsed: image_same"]
    assert found.holds is False
    assert found.evidence == "target image_same: std 0.001, limit 0.0442, since step 101"
    assert told["1 of 4 losses did not fall"].holds is False
    assert told["Evaluation"].holds is None
    text, _ = read(main([str(tmp_path)]))
    assert "<strong>Collapsed: image_same</strong>" in text
    assert ">collapsed below</text>" in text and ">limit after step" not in text


def test_a_run_that_is_too_short_to_tell_has_no_verdict_on_collapse(run_folder: Path, tmp_path: Path) -> None:
    record = changed_log(run_folder, tmp_path, lambda line: line["collapse"]["image_same"].update(std=0.001))
    (told,) = [v for v in verdicts(record) if v.claim == "Collapse"]
    assert told.holds is None
    assert told.evidence.startswith("too short to tell: low values count after step 100, and of 3 fewer")
    text, _ = read(main([str(tmp_path)]))
    assert ">limit after step 100</text>" in text and ">collapsed below" not in text


def test_a_run_that_has_just_begun_has_no_verdict_on_collapse_yet(run_folder: Path, tmp_path: Path) -> None:
    record = changed_log(run_folder, tmp_path, lambda line: None, steps=1000, begun=FEWEST_STEPS - 38)
    (told,) = [v for v in verdicts(record) if v.claim == "Collapse"]
    assert told.holds is None and told.evidence == "fewer than 3 steps are logged after step 100 yet"


def test_verdict_of_spread_features_names_the_lowest_values_and_their_limits(
    run_folder: Path, tmp_path: Path
) -> None:
    record = changed_log(run_folder, tmp_path, lambda line: None, steps=140, begun=FEWEST_STEPS)
    told = {verdict.claim: verdict for verdict in verdicts(record)}
    assert told["No collapse"].holds is True
    assert (
        "image_same std 0.065 (limit 0.0442), effective rank 30.2 (limit 3.15)"
        in told["No collapse"].evidence
    )
    assert "code entropy 2.1 (limit 0.347)" in told["No collapse"].evidence


def test_a_run_on_frozen_features_is_told_that_nothing_can_collapse(run_folder: Path) -> None:
    record = read_record(run_folder, {})
    frozen = {name: replace(target, encoder="frozen") if target.encoder == "ema" else target
              for name, target in record.run.objective.targets.items()}  # fmt: skip
    run = replace(record.run, objective=replace(record.run.objective, targets=frozen))
    log = tuple({**line, "collapse": {"image_same": line["collapse"]["image_same"]}} for line in record.log)
    (told,) = [v for v in verdicts(replace(record, run=run, log=log)) if v.claim == "Collapse"]
    assert told.holds is None and told.evidence.startswith("none is possible")


def test_a_log_without_measured_features_is_told_and_drawn_without_them(
    run_folder: Path, tmp_path: Path
) -> None:
    record = changed_log(run_folder, tmp_path, lambda line: line.pop("collapse"))
    assert [v.holds for v in verdicts(record) if v.claim == "Collapse"] == [None]
    text, _ = read(main([str(tmp_path)]))
    assert "Losses</h3>" in text and "Effective rank of the targets" not in text
