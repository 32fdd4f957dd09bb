"""Which sections make the page, and what stands where something is missing?"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from pretrain.evaluate.sets import is_set
from pretrain.evaluate.splits import found_in
from pretrain.report import accuracy, curves, header, pairs, provenance, teacher
from pretrain.report.document import Section, document
from pretrain.report.looks import Look, Shown, look, read_images, spread_over_categories
from pretrain.report.record import Record
from pretrain.report.settings import Settings
from pretrain.visualize.markup import Html, element


class Missing(ValueError):
    """A section lacks something; the message says in plain words what to run."""


def page(record: Record, heldout: Path | None, settings: Settings, say: Callable[[str], None]) -> str:
    """The whole file as text. `say` is told what is being drawn."""
    sections = []
    views = _Teacher(record, heldout, settings, say)
    for id_, title, lead, draw in (
        ("accuracy", "Evaluation", None, lambda: _accuracies(record)),
        ("curves", "Curves", None, lambda: _curves(record)),
        ("pairs", "What the network sees", PAIRS_LEAD, lambda: _pairs(record, settings)),
        ("features", "Token features", FEATURES_LEAD, views.components),
        ("gaze", "Where the middle looks", GAZE_LEAD, views.gazes),
        ("neighbours", "Nearest training images", None, views.neighbours),
        ("captions", "Images found by captions", None, views.by_caption),
        ("confusion", "Confusions", None, lambda: _confusion(record)),
        ("zero-shot", "Zero-shot by class names", ZERO_SHOT_LEAD, views.zero_shot),
        ("data", "Data", None, lambda: provenance.data(record, heldout)),
        ("recipe", "Recipe", None, lambda: provenance.recipe(record)),
        ("environment", "Environment", None, lambda: _environment(record)),
    ):
        say(title)
        try:
            content = draw()
        except Missing as missing:
            content = element("p", str(missing), class_="missing")
            lead = None
        sections.append(Section(id_, title, content, lead))
    title = record.folder.resolve().name
    head = [header.header(record, title), header.verdict_box(record)]
    return document(f"{title} · {record.run.name}", head, sections, NAV)


NAV = {
    "pairs": "Inputs",
    "features": "Features",
    "gaze": "Gaze",
    "neighbours": "Neighbours",
    "captions": "Captions",
    "zero-shot": "Zero-shot",
}  # short
PAIRS_LEAD = (
    "The first inputs of the run, drawn by the training loader at the run's settings. Where a target is another "
    "view, the two right pictures show the same patches: in view 2 itself, and where the training geometry puts "
    "them around view 1. Equal colours are equal patches, so what they cover must agree."
)
FEATURES_LEAD = (
    "The teacher's tokens, projected to their first three principal components, fitted for each checkpoint over "
    "all images shown: equal colours within a row mean similar features; rows cannot be compared by colour."
)
GAZE_LEAD = (
    "What the teacher's last block writes in the middle of the image comes from the bright places: the attention of "
    "all heads, or the points that all groups of a deformable convolution sample, with their weights."
)
ZERO_SHOT_LEAD = (
    "The class names whose text lies nearest to the image after training, with their cosines, by the text tower: "
    "the classifier head plays no part."
)


def _accuracies(record: Record) -> Html:
    content = accuracy.accuracies(record)
    if content is None:
        raise Missing(f"{_unevaluated(record)}. Run {_evaluate(record)}, then this report again.")
    if not record.left_out:
        return content
    return element("div", content, element("p", f"{_unevaluated(record)}.", class_="note"))


def _confusion(record: Record) -> Html:
    content = accuracy.confusion(record)
    if content is None:
        why = "The evaluation has no category counts" if record.evaluation else _unevaluated(record)
        raise Missing(f"{why}. Run {_evaluate(record)} on data with categories, then this report again.")
    return content


def _curves(record: Record) -> Html:
    content = curves.curves(record)
    if content is None:
        raise Missing(
            "log.jsonl has no line yet: the run has not reached its first logged step. "
            "Run it on, then this report again."
        )
    return content


def _environment(record: Record) -> Html:
    content = provenance.environment(record)
    if content is None:
        raise Missing("No whole checkpoint records versions yet. Let the run reach its first checkpoint.")
    return content


def _pairs(record: Record, settings: Settings) -> Html:
    if missing := sorted(record.run.data.keys() - record.data.keys()):
        raise Missing(_name_data(record, missing))
    try:
        found = pairs.read_pairs(record.run, record.data, record.tokenizer, settings.pairs)
    except (FileNotFoundError, ValueError) as error:
        raise Missing(f"The data cannot be read: {error}") from error
    return element("div", pairs.legend(record.run), pairs.pair_pictures(found, record.run))


class _Seen(NamedTuple):
    """What the teacher was shown, and what it says of it."""

    heldout: Shown  # what the pictures are of
    train: Shown  # among which neighbours are sought
    gallery: Shown  # held-out images among which captions look
    looks: list[Look]


class _Teacher:
    """The sections that run the teacher; images and features are made once, when the first of them is drawn."""

    def __init__(
        self, record: Record, heldout: Path | None, settings: Settings, say: Callable[[str], None]
    ) -> None:
        self._record, self._heldout, self._settings, self._say = record, heldout, settings, say
        self._made: _Seen | None = None

    def components(self) -> Html:
        seen = self._get()
        try:
            return teacher.components(seen.heldout, seen.looks)
        except ValueError as error:
            raise Missing(f"The features cannot be shown: {error}") from error

    def gazes(self) -> Html:
        seen = self._get()
        content = teacher.gazes(seen.heldout, seen.looks)
        if content is None:
            raise Missing(
                "The last block of this Swin parts the image into windows, so nothing is drawn for it."
            )
        return content

    def neighbours(self) -> Html:
        heldout, train, _, looks = self._get()
        shares = ", ".join(
            f"{100 * teacher.share_of_right_neighbours(heldout, train, lk):.0f} % {teacher.when(lk)}"
            for lk in looks
        )
        note = f"Cosine of the mean token, among {len(train.views):,} training images. "
        if heldout.categories and train.categories:
            note += f"Of these neighbours {shares} are of the image's category (✓)."
        return element("div", element("p", note, class_="lead"), teacher.neighbours(heldout, train, looks))

    def by_caption(self) -> Html:
        heldout, _, gallery, looks = self._get()
        content = teacher.by_caption(heldout, gallery, looks)
        if content is None:
            raise Missing(
                "No caption can look for images: the run has no text source, or the held-out images have no "
                "captions. Train with a captioned source and name captioned images by --heldout."
            )
        shares = ", ".join(
            f"{100 * teacher.share_found_by_caption(heldout, gallery, lk):.0f} % {teacher.when(lk)}"
            for lk in looks
        )
        note = (
            f"Cosine of text and image, among {len(gallery.views):,} held-out images. Of these captions {shares} "
            "find an image that has that caption (✓)."
        )
        return element("div", element("p", note, class_="lead"), content)

    def zero_shot(self) -> Html:
        seen = self._get()
        looks = seen.looks
        content = teacher.zero_shot(seen.heldout, looks)
        if content is None:
            raise Missing(
                "Names cannot be scored: the run has no text source, or the held-out images have no categories. "
                "Train with a captioned source and name labelled images by --heldout."
            )
        count = len(looks[-1].names or ())
        note = f"Among {count} names; bars begin at the image's lowest cosine."
        return element("div", element("p", note, class_="note"), content)

    def _get(self) -> _Seen:
        if self._made is None:
            self._made = self._make()
        return self._made

    def _make(self) -> _Seen:
        record, settings = self._record, self._settings
        train = training_folder(record)
        if not record.checkpoints:
            raise Missing(
                "There is no whole checkpoint yet. Let the run reach its first one, then run this report again."
            )
        if train is None:
            raise Missing(_name_data(record, sorted(record.run.data)))
        if self._heldout is None:
            raise Missing(
                f"No held-out images are known. Run `{_report(record)} --heldout DIR` with a data set folder."
            )
        try:
            many = read_images(self._heldout, record.run.views.size, 20 * settings.images)
            heldout = spread_over_categories(many, settings.images)
            candidates = read_images(train, record.run.views.size, settings.candidates)
        except (FileNotFoundError, ValueError) as error:
            raise Missing(f"The images cannot be read: {error}") from error
        steps = sorted({min(record.checkpoints), max(record.checkpoints)})
        looks = []
        for step in steps:
            self._say(f"teacher of step {step}")
            folder = record.checkpoints[step]
            sets = (heldout, candidates, many)
            try:
                looks.append(look(step, folder, *sets, teacher.NUM_NEIGHBOURS, record.tokenizer))
            except ValueError as error:  # such as weights that are not finite
                raise Missing(f"The teacher cannot be opened: {error}") from error
        return _Seen(heldout, candidates, many, looks)


def training_folder(record: Record) -> Path | None:
    """The data set whose images are the candidates: the first labelled source with a known folder, else any
    source, else what the evaluation trained its probes on.
    """
    evaluated: Mapping[str, str] = (record.evaluation.get("data") or {}).get("train") or {}
    known = [name for name in record.run.data if name in record.data]
    labelled = [name for name in known if record.run.data[name].supervision == "category"]
    folders = [record.data[name] for name in [*labelled, *known]]
    if "folder" in evaluated:
        folders.append(Path(evaluated["folder"]))
    return next(iter(folders), None)


def _unevaluated(record: Record) -> str:
    """Why there are no accuracies, or fewer than the result has."""
    if not record.left_out:
        return "There is no evaluation.json yet"
    return f"{'A part of ' * bool(record.evaluation)}evaluation.json is not shown, since it {record.left_out}"


def _evaluate(record: Record) -> str:
    return f"`python -m pretrain.evaluate {shlex.quote(str(record.folder))} --data DIR`"


def _report(record: Record) -> str:
    return f"python -m pretrain.report {shlex.quote(str(record.folder))}"


def _name_data(record: Record, missing: list[str]) -> str:
    named = " ".join(f"{name}=DIR" for name in missing)
    return f"The folders of {', '.join(missing)} are not known. Run `{_report(record)} --data {named}`."


def heldout_folder(record: Record, named: Path | None) -> Path | None:
    """Held-out images: as named, else those of the evaluation, else those beside a training folder."""
    if named is not None:
        return named
    evaluated: Mapping[str, str] = (record.evaluation.get("data") or {}).get("heldout") or {}
    beside = [found_in(place.parent, "heldout") for place in record.data.values() if isinstance(place, Path)]
    measured = [Path(evaluated["folder"])] if "folder" in evaluated else []
    for folder in measured + beside:
        if is_set(folder):
            return folder
    return None
