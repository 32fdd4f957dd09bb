"""Are versions, arguments, environment and numbers of ranks the same on all nodes?"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pretrain import provenance
from pretrain.preflight.check import Here
from pretrain.preflight.told import WARNING, Judged, Problem, Told, differences, differing, shown

ROOT = Path(__file__).resolve().parent.parent.parent
CODE = ("pretrain", "data_prep")  # folders whose every .py file a rank may import
SMI_SECONDS = 30.0
# What may be another on each node: names of network cards, files, numbers of cores, what is logged.
OF_A_NODE = (
    *("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_TOPO_FILE", "OMP_NUM_THREADS"),
    *("NCCL_DEBUG", "NCCL_DEBUG_FILE", "NCCL_DEBUG_SUBSYS"),
)
PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "FI_", "UCX_")
OURS = "TORCH_NCCL_ASYNC_ERROR_HANDLING"  # the preflight sets it for itself
NAMES = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
OWN_PLACES = ("data", "tokenizer", "guide", "evaluate_data")  # arguments that may be copies of a node's own
NOT_COMPARED = ("local_rank", "help")


def look_at_versions(here: Here) -> dict[str, Any]:
    """Flat: what must be equal. `unlike_requirements` holds packages that are not as requirements.txt pins them."""
    pinned = pinned_versions((ROOT / "requirements.txt").read_text())
    installed = {name: _installed(name) for name in pinned}
    told: dict[str, Any] = {
        "Python": platform.python_version(),
        **{name: installed.get(name) for name in ("torch", "deepspeed", "triton")},
        "CUDA": torch.version.cuda if here.is_gpu else None,
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if here.is_gpu else None,
        "driver": driver() if here.is_gpu else None,
        "device": torch.cuda.get_device_name(here.device) if here.is_gpu else "CPU",
        "commit": provenance.commit(),
        "code": code_digest(ROOT),
        "requirements.txt": hashlib.sha256((ROOT / "requirements.txt").read_bytes()).hexdigest(),
        "other packages": hashlib.sha256(repr(sorted(installed.items())).encode()).hexdigest(),
    }
    unlike = {name: installed[name] for name in pinned if not is_as_pinned(installed[name], pinned[name])}
    return told | {"unlike_requirements": unlike}


def judge_versions(told: Sequence[Told], here: Here) -> Judged:
    keys = [key for key in told[0].value if key not in ("unlike_requirements", "other packages")]
    remedy = "install the same environment and check out the same commit on every node, or use one image"
    problems = differences(told, "", remedy, keys=keys)
    if not problems:  # else it would be told twice
        problems = differences(told, "", remedy, keys=["other packages"])
    usual, others = differing(told, lambda value: value["unlike_requirements"])
    problems += [
        Problem(
            one.place, f"packages unlike requirements.txt: {shown(one.value['unlike_requirements'])}", remedy
        )
        for one in others
    ]
    if usual:
        problems.append(
            Problem(
                None,
                f"most nodes have {shown(usual)}, which requirements.txt pins otherwise",
                "`pip install -r requirements.txt`, unless it is meant",
                status=WARNING,
            )
        )
    first = told[0].value
    value = ", ".join(f"{key} {shown(first[key])}" for key in ("Python", "torch", "deepspeed"))
    value += f", commit {short_commit(first['commit'])}"
    return Judged(value, "equal on all nodes, and as requirements.txt pins them", problems)


def short_commit(commit: str | None) -> str:
    head, sign, changes = (commit or "unknown").partition("+")
    return head[:9] + sign + changes


def pinned_versions(text: str) -> dict[str, str]:
    """Package -> version of every line of a requirements.txt."""
    lines = (line.split("#")[0].strip().partition("==") for line in text.splitlines())
    return {name: version for name, sign, version in lines if sign}


def is_as_pinned(installed: str | None, pinned: str) -> bool:
    """Builds of one version for several CUDA versions differ behind a plus sign."""
    return installed is not None and installed.split("+")[0] == pinned


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def code_digest(root: Path) -> str:
    """SHA-256 of all code that a rank may import: two working trees of one commit may differ."""
    hashed = hashlib.sha256()
    for folder in CODE:
        for path in sorted((root / folder).rglob("*.py")):
            hashed.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return hashed.hexdigest()


def driver() -> str | None:
    """Version of NVIDIA's driver as the kernel module tells it, else nvidia-smi."""
    path = Path("/sys/module/nvidia/version")
    if path.is_file():
        return path.read_text().strip()
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=SMI_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.splitlines() or [""])[0].strip() or None


def look_at_arguments(here: Here) -> dict[str, Any]:
    if here.mistake:
        raise ValueError(here.mistake)
    if here.run is None or here.paths is None:
        return {"arguments": " ".join(here.arguments)}
    told = {key: str(value) for key, value in sorted(vars(here.paths).items()) if key not in NOT_COMPARED}
    told["data"] = " ".join(f"{name}={place}" for name, place in here.paths.data.items())
    digests = {"recipe": here.run.to_json(), "ds config's content": here.paths.ds_config.read_text()}
    return told | {name: hashlib.sha256(text.encode()).hexdigest() for name, text in digests.items()}


def judge_arguments(told: Sequence[Told], here: Here) -> Judged:
    keys = sorted({key for one in told for key in one.value})
    own = [key for key in keys if key in OWN_PLACES]
    problems = differences(
        told, "", "start the same command on every node", keys=[key for key in keys if key not in OWN_PLACES]
    )
    problems += differences(
        told, "--", "fine if these are copies of the same, which is compared below", WARNING, own
    )
    value = f"{here.run.name}, {len(told)} ranks" if here.run else "nothing to train: the machines alone"
    return Judged(value, "the same command, recipe and ds config on all ranks", problems)


def look_at_environment(here: Here) -> dict[str, str]:
    return compared_environment(os.environ)


def compared_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that decide how ranks talk and compute."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if (name.startswith(PREFIXES) or name in NAMES) and name != OURS
    }


def judge_environment(told: Sequence[Told], here: Here) -> Judged:
    names = sorted({name for one in told for name in one.value})
    strict = [name for name in names if name not in OF_A_NODE]
    remedy = "set the same on every node, where the job is started"
    problems = differences(told, "", remedy, keys=strict)
    problems += differences(told, "", remedy, WARNING, [name for name in names if name in OF_A_NODE])
    if here.ranks.nodes > 1:
        problems += [
            Problem(
                one.place,
                f"{name}=lo",
                "name the card that reaches the others, or leave it out",
                rule="no loopback",
            )
            for one in told
            for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
            if one.value.get(name) == "lo"
        ]
    shown_names = [name for name in names if name.startswith(PREFIXES)]
    value = ", ".join(f"{name}={told[0].value.get(name, '')}" for name in shown_names[:3])
    return Judged(
        value or "no NCCL or gloo variables", "NCCL_*, GLOO_* and their like equal on all ranks", problems
    )


def counted(ranks: int, nodes: int) -> str:
    return f"{ranks} rank{'s' * (ranks > 1)} on {nodes} node{'s' * (nodes > 1)}"


def look_at_ranks(here: Here) -> dict[str, Any]:
    ranks = here.ranks
    return {
        "world": ranks.world,
        "ranks of a node": ranks.local_size,
        "nodes": ranks.nodes,
        "expected node": ranks.node_of(ranks.rank),
    }


def judge_ranks(told: Sequence[Told], here: Here) -> Judged:
    remedy = "start as many ranks on every node: the same RANKS, NODES or slots of the hostfile"
    problems = differences(told, "", remedy, keys=["world", "ranks of a node", "nodes"])
    for one in told:
        if one.place.node != one.value["expected node"]:
            wanted = one.value["expected node"]
            problems.append(
                Problem(one.place, f"is node {one.place.node}, by its rank node {wanted}", remedy)
            )
    by_node = Counter(one.place.node for one in told)
    first = told[0].value
    if first["nodes"] * first["ranks of a node"] != first["world"]:
        problems.append(
            Problem(told[0].place, f"{first['nodes']} nodes x {first['ranks of a node']} ranks", remedy)
        )
    value = counted(first["world"], len(by_node))
    return Judged(value, "world size = nodes x ranks of each", problems)
