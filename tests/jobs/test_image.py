"""Does the image's recipe keep its promises, and do its scripts say what is wrong before they start?"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.paths import ROOT

IMAGE = ROOT / "jobs" / "image"
ECHO = 'echo "$(basename "$0")" "$@"'


def stages() -> list[str]:
    """Instructions of each stage of the Dockerfile, its FROM first; comments and folds of lines removed."""
    text = re.sub(r"^ *#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return ["FROM " + stage for stage in text.split("\nFROM ")[1:]]


def run(
    script: Path, *arguments: object, tools: dict[str, str] | None = None, folder: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The script with PATH, HOME and `environment` alone; `tools`: programs in FOLDER/bin, which comes first."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in (tools or {}).items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    return subprocess.run(
        [str(script), *map(str, arguments)],
        env={"PATH": f"{folder}/bin:{os.environ['PATH']}", "HOME": str(folder)} | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_what_runs_has_no_cuda_image_below_it_and_is_not_root() -> None:
    *_, builder, last = stages()
    assert builder.startswith("FROM compilers-${DEVICE} AS builder\n")
    assert last.startswith("FROM ${BASE_IMAGE}\n")
    assert "nvcc" not in last and "g++" not in last
    users = re.findall(r"^USER (.*)$", last, re.MULTILINE)
    assert users == ["10001:10001"], "a number, so that runAsNonRoot can tell"
    assert last.index("\nUSER ") < last.index("\nENTRYPOINT ")


def test_a_changed_line_of_code_keeps_the_layer_of_packages() -> None:
    *_, builder, last = stages()
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", builder, re.MULTILINE)
    assert copied == ["requirements.txt Makefile", "jobs/image/compile_ops.sh"]
    assert last.index("COPY --from=builder /opt/venv /opt/venv") < last.index("COPY --chown=10001:10001 . .")
    before = last[: last.index("COPY --chown")]
    assert "REVISION" not in before and "CREATED" not in before, "these differ with every commit"


def test_labels_say_what_the_image_is() -> None:
    last = stages()[-1]
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]+)"', last))
    assert {"title", "description", "licenses", "revision", "version", "created", "source"} == set(labels)
    for name in ("revision", "version", "created", "source"):
        assert labels[name] == f"${{{name.upper()}}}"
        assert f"\nARG {name.upper()}=" in last
    assert "M3I_COMMIT=${REVISION}" in last, "pretrain/provenance.py reads it where git is not"


def test_the_image_is_healthy_by_the_self_test_of_the_kernels() -> None:
    last = stages()[-1]
    assert re.search(r'^HEALTHCHECK .*CMD \["m3i", "kernels", "--quick"\]$', last, re.MULTILINE)
    assert 'ENTRYPOINT ["tini", "-s", "--", "m3i"]' in last
    assert "/workspace/jobs/image/m3i.sh /usr/local/bin/m3i" in last


def test_data_runs_and_secrets_stay_out_of_the_image() -> None:
    ignored = set((ROOT / ".dockerignore").read_text().split())
    assert {".git", "data", "runs", ".venv", ".env*"} <= ignored


@pytest.mark.parametrize(
    ("words", "started"),
    [
        ("prepare build scenes", "python -m data_prep build scenes"),
        ("evaluate runs/a --out b", "python -m pretrain.evaluate runs/a --out b"),
        ("codebook --help", "python -m pretrain.codebook --help"),
        ("env python x", "python x"),
    ],
)
def test_a_word_starts_a_command_of_the_project_or_a_program(
    tmp_path: Path, words: str, started: str
) -> None:
    ended = run(IMAGE / "m3i.sh", *words.split(), tools={"python": ECHO}, folder=tmp_path)
    assert ended.stdout.strip() == started


def test_pretrain_goes_through_the_job_script(tmp_path: Path) -> None:
    ended = run(IMAGE / "m3i.sh", "pretrain", folder=tmp_path)
    assert ended.returncode == 2 and "jobs/local/pretrain.sh" in ended.stderr


def test_no_word_lists_every_command_and_a_strange_one_too(tmp_path: Path) -> None:
    listed = run(IMAGE / "m3i.sh", folder=tmp_path).stdout.splitlines()[0].split()
    packages = {path.parent.name for path in (ROOT / "pretrain").glob("*/__main__.py")}
    assert {"prepare", "pretrain", "codebook", *packages} <= set(listed)
    assert not {"main", "config", "engine"} & set(listed)
    strange = run(IMAGE / "m3i.sh", "evalute", folder=tmp_path)
    assert strange.returncode == 127 and "evalute" in strange.stderr and "evaluate" in strange.stderr


def test_the_project_is_found_from_any_folder_and_by_any_user(tmp_path: Path) -> None:
    told = run(IMAGE / "m3i.sh", "env", folder=tmp_path, HOME="/nowhere").stdout
    found = dict(line.split("=", 1) for line in told.splitlines())
    assert found["PYTHONPATH"] == str(ROOT)
    assert os.access(found["HOME"], os.W_OK) and found["USER"]
    os.rmdir(found["HOME"])


def test_operators_are_those_that_deepspeed_knows() -> None:
    package = importlib.util.find_spec("deepspeed")
    assert package is not None and package.origin is not None
    builders = "\n".join(
        path.read_text() for path in (Path(package.origin).parent / "ops" / "op_builder").glob("*.py")
    )
    known = dict(re.findall(r'BUILD_VAR = "(\w+)"\n    NAME = "(\w+)"', builders))
    script = (IMAGE / "compile_ops.sh").read_text()
    variables = dict(re.findall(r"\[(\w+)\]=(DS_BUILD_\w+)", script))
    assert variables and all(known[variable] == name for name, variable in variables.items())
    default = re.search(r'^ARG DS_OPS="([^"]*)"$', (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert default is not None and set(default[1].split()) == set(variables)


def test_operators_that_need_nvcc_are_left_out_where_it_is_not(tmp_path: Path) -> None:
    places = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "CUDA_HOME": "/nowhere"}
    script = IMAGE / "compile_ops.sh"
    ended = run(script, tmp_path, "quantizer", tools={"python": ECHO}, folder=tmp_path, **places)
    assert ended.returncode == 0 and "leaves quantizer out" in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "which virtual environment"),
        (("/nowhere",), "/nowhere/bin/python"),
        (("{venv}", "cpu_adam"), "cpu_adam"),
    ],
)
def test_the_compiler_of_operators_says_what_is_wrong(
    tmp_path: Path, arguments: tuple[str, ...], named: str
) -> None:
    words = [argument.format(venv=tmp_path) for argument in arguments]
    ended = run(IMAGE / "compile_ops.sh", *words, tools={"python": ECHO}, folder=tmp_path, CUDA_ARCHS="9.0")
    assert ended.returncode != 0 and named in ended.stderr


def test_venv_for_a_cpu_asks_for_nothing_of_cuda(tmp_path: Path) -> None:
    pip = f'while [[ $1 != -r ]]; do shift; done; cp "$2" {tmp_path}/asked; echo "${{@:3}}"'
    ended = run(
        Path("/usr/bin/make"),
        *(
            "-C",
            ROOT,
            "venv",
            f"VENV={tmp_path}",
            "PYTHON=python3",
            "DEVICE=cpu",
            "TORCH_INDEX=https://index.example/cpu",
        ),
        tools={"python": pip},
        folder=tmp_path,
    )
    assert "--extra-index-url https://index.example/cpu" in ended.stdout, ended.stderr
    asked = {
        line.split()[0]
        for line in (tmp_path / "asked").read_text().splitlines()
        if "==" in line.split("#")[0]
    }
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    everything = {line.split()[0] for line in lines if "==" in line.split("#")[0]}
    assert not [line for line in asked if line.startswith(("triton", "nvidia", "cuda"))]
    left_out = {line for line in everything - asked if not line.startswith(("triton", "nvidia", "cuda"))}
    assert left_out == {line.removesuffix("+cpu") for line in asked - everything}
    assert {line.split("==")[0] for line in left_out} == {"torch", "torchvision"}


def test_the_build_names_what_it_needs_before_it_starts(tmp_path: Path) -> None:
    tools = {"debootstrap": "exit 9", "buildah": "exit 9", "df": "echo Avail; echo 90000000"}
    ended = run(
        IMAGE / "build_on_debian.sh",
        tools=tools,
        folder=tmp_path,
        MOUNTS="/nowhere/pip.conf",
        STORE=str(tmp_path / "s"),
    )
    assert ended.returncode == 1
    if os.geteuid() == 0:
        assert "MOUNTS names /nowhere/pip.conf" in ended.stderr
        full = run(
            IMAGE / "build_on_debian.sh",
            tools=tools | {"df": "echo Avail; echo 9"},
            folder=tmp_path,
            STORE=str(tmp_path / "full"),
        )
        assert full.returncode == 1 and "set STORE" in full.stderr
        foreign = run(IMAGE / "build_on_debian.sh", tools=tools, folder=tmp_path, STORE=str(tmp_path))
        assert foreign.returncode == 1 and "holds other files" in foreign.stderr
    else:
        assert "needs root" in ended.stderr
