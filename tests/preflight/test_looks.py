"""What do the checks find on this machine, and on one where something is broken?"""

from __future__ import annotations

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from data_prep import places
from pretrain.checkpoint import PLACE_RECORD, record_place
from pretrain.data import store
from pretrain.data.faults import NobodyThere
from pretrain.preflight import check, gpus, machine, network, recipe, same, storage
from pretrain.preflight.check import Check, look_at_all
from pretrain.preflight.clocks import judge_clock, offset
from pretrain.preflight.options import Options
from pretrain.preflight.ranks import Ranks
from pretrain.preflight.told import WARNING, Judged
from pretrain.resume import COUNTED
from tests.data.sets import good_set
from tests.paths import ROOT
from tests.preflight.here import alone, three_nodes, told

CPU = torch.device("cpu")
SMI = """<nvidia_smi_log><gpu id="0"><uuid>GPU-a</uuid>
<ecc_errors><volatile><sram_uncorrectable_parity>{sram}</sram_uncorrectable_parity><dram_correctable>9</dram_correctable>
</volatile><aggregate><dram_uncorrectable>4</dram_uncorrectable></aggregate></ecc_errors>
<retired_pages><pending_retirement>N/A</pending_retirement></retired_pages>
<remapped_rows><remapped_row_pending>{pending}</remapped_row_pending>
<remapped_row_failure>No</remapped_row_failure></remapped_rows>
<clocks_event_reasons><clocks_event_reason_hw_thermal_slowdown>{hot}</clocks_event_reason_hw_thermal_slowdown>
<clocks_event_reason_sw_power_cap>Active</clocks_event_reason_sw_power_cap></clocks_event_reasons>
</gpu></nvidia_smi_log>"""


def fail(here: Any) -> None:
    raise KeyError("x")


def test_a_look_that_raises_or_hangs_keeps_no_other_from_looking(tmp_path: Path) -> None:
    never = threading.Event()
    here = alone(three_nodes(options=Options(check_seconds=0.2)))
    looks = {"raises": fail, "hangs": lambda here: never.wait(), "waits": fail, "looks": lambda here: 7}
    together = ("hangs", "waits")
    checks = {
        name: Check("", look, lambda told, here: Judged("", ""), is_together=name in together)
        for name, look in looks.items()
    }
    found = look_at_all(checks, here)
    never.set()
    assert found["raises"]["error"].startswith("KeyError: 'x' (test_looks.py:")
    assert found["hangs"]["error"] == "no answer within 0.2 s"
    assert found["waits"] == {"skipped": "hangs"}, "who waits for others once more would wait in vain"
    assert found["looks"]["value"] == 7


def test_nobody_waits_for_a_rank_that_left_a_check_by_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "LOOKS_AGAIN", 0.02)
    monkeypatch.setattr(check, "GRACE", 0.02)
    never, first = threading.Event(), three_nodes(options=Options(check_seconds=60.0))
    second = dataclasses.replace(first, ranks=Ranks(rank=1, world=3, nodes=3, node=1))
    looks = {"meets": lambda here: never.wait() if here.ranks.rank else fail(here), "waits": fail}
    checks = {
        name: Check("", look, lambda told, here: Judged("", ""), is_together=True)
        for name, look in looks.items()
    }
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda here: look_at_all(checks, here), (first, second)))
    never.set()
    assert found[0]["meets"]["error"].startswith("KeyError") and found[1]["meets"]["skipped"] == "meets"
    assert [one["waits"] for one in found] == [{"skipped": "meets"}] * 2


def test_versions_tell_packages_unlike_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    here = alone(three_nodes())
    versions = same.look_at_versions(here)
    assert versions["torch"] == torch.__version__.split("+")[0]
    before = versions["unlike_requirements"]
    real = same._installed
    monkeypatch.setattr(same, "_installed", lambda name: "0.1" if name == "timm" else real(name))
    after = same.look_at_versions(here)
    assert after["unlike_requirements"] == before | {"timm": "0.1"}
    assert after["other packages"] != versions["other packages"]


def test_code_that_differs_has_another_digest(tmp_path: Path) -> None:
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "a.py").write_text("x = 1\n")
    before = same.code_digest(tmp_path)
    (tmp_path / "pretrain" / "a.py").write_text("x = 2\n")
    assert same.code_digest(tmp_path) != before != same.code_digest(ROOT)


def test_only_what_decides_communication_is_compared() -> None:
    environment = {"NCCL_ALGO": "Ring", "AWS_SECRET_ACCESS_KEY": "no", "HOME": "/root", same.OURS: "0"}
    assert same.compared_environment(environment) == {"NCCL_ALGO": "Ring"}


def test_faults_of_gpus_are_read_from_what_the_driver_tells() -> None:
    assert gpus.faults(SMI.format(sram=0, pending="No", hot="Not Active")) == {"GPU-a": []}
    assert gpus.faults(SMI.format(sram=2, pending="Yes", hot="Active"))["GPU-a"] == [
        "GPU 0 (GPU-a): 2 uncorrected ECC errors (sram_uncorrectable_parity)",
        "GPU 0 (GPU-a): remapped_row_pending: it wants a reset",
        "GPU 0 (GPU-a): throttled (hw_thermal_slowdown)",
    ]
    assert gpus.faults(SMI.format(sram="N/A", pending="N/A", hot="N/A")) == {"GPU-a": []}


def test_a_fault_of_another_job_s_gpu_is_not_ours() -> None:
    well = {
        "name": "H100",
        "uuid": "a",
        "used": 0,
        "total": 1,
        "faults": {"GPU-a": [], "GPU-z": ["worn out"]},
    }
    here = three_nodes()
    assert not gpus.judge_gpu(told(well), here).problems
    [problem] = gpus.judge_gpu(told(well | {"uuid": "z"}), here).problems
    assert problem.value == "worn out"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_right_here_and_one_wrong_number_is_counted(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpus.wrong_products(CPU, dtype) == 0
    right = gpus.hadamard

    def wrong(*arguments: Any) -> torch.Tensor:
        matrix = right(*arguments)
        matrix[3, 5] *= -1  # as a multiplier that errs
        return matrix

    monkeypatch.setattr(gpus, "hadamard", wrong)
    assert gpus.wrong_products(CPU, dtype) > 0


def test_clocks_are_compared_through_meetings_alone() -> None:
    entered = [[0.0, 0.3, 0.1], [5.0, 5.2, 5.3]]  # true times of three nodes
    values = []
    for node, clock in enumerate((0.0, 0.02, 4.0)):
        times = [[meeting[node] + clock, max(meeting) + 0.01 + clock] for meeting in entered]
        values.append({"times": times, "steps_back": 0, "share": 1.0})
    value, doubt = offset(values[2]["times"], values[0]["times"])
    assert abs(value - 4.0) <= doubt < 0.4
    [problem] = judge_clock(told(*values), three_nodes()).problems
    assert problem.place.node == 2
    assert "s from the others'" in problem.value


def test_shared_memory_is_what_workers_hold_or_what_the_job_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SHM_GIB", raising=False)
    here = alone(three_nodes(tmp_path, workers=2))
    assert machine.wanted_shm(here) == 2 * 3 * machine.batch_bytes(here.run, 1)
    monkeypatch.setenv("SHM_GIB", "8")
    assert machine.wanted_shm(here) == 8 * 2**30


def test_shared_memory_holds_the_files_that_are_left_to_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SHM_GIB", raising=False)
    data = good_set(tmp_path / "data", (3, 4), has_text=False)
    here = alone(three_nodes(tmp_path, workers=2, data={"labelled": data, "captioned": data}))
    here.run = dataclasses.replace(here.run, views=dataclasses.replace(here.run.views, on_device="all"))
    recipe.look_at_data(here)
    of_a_sample = sum(path.stat().st_size for path in data.glob("*.tar")) / 7
    num_files = 2 * 3 * here.run.batch
    least = machine.wanted_shm(here) + num_files * of_a_sample
    assert machine.look_at_shm(here)["files"] == num_files
    for free, is_enough in ((least + 1, True), (least - 1, False)):
        value = machine.look_at_shm(here) | {"free": free}
        judged = machine.judge_shm(told(value), here)
        assert [problem.remedy.endswith("--views.on_device colours") for problem in judged.problems] == [
            True
        ] * (not is_enough)
        assert f"and {num_files} image files of {of_a_sample / 1024:.0f} KiB, which views.on_d" in judged.rule
    monkeypatch.setenv("SHM_GIB", "8")
    assert machine.look_at_shm(here)["files"] == 0, "what is asked for is asked for"


def test_memory_and_cores_of_a_container_are_its_own(tmp_path: Path) -> None:
    meminfo = "MemTotal: 100 kB\nMemAvailable:    4194304 kB\n"
    root, own = tmp_path / "cgroup", "12:cpu:/x\n0::/slurm/job_7/step_0\n"
    job = root / "slurm" / "job_7"
    (job / "step_0").mkdir(parents=True)
    groups = machine.control_groups(own, root)
    assert groups == [job / "step_0", job, job.parent, root]
    assert machine.available(meminfo, groups) == 4 * 2**30
    texts = {"max": "3000", "current": "2500", "stat": "anon 5\ninactive_file 100"}
    for group, most in ((job, "3000"), (job / "step_0", "max"), (root, "9000")):
        for name, text in (texts | {"max": most}).items():
            (group / f"memory.{name}").write_text(text)
    assert machine.available(meminfo, groups) == 600, "what the job may take bounds its steps"
    (job / "cpu.max").write_text("50000 100000\n")
    (root / "cpu.max").write_text("max 100000\n")
    assert machine.usable_cores(groups) == 0.5
    assert machine.control_groups("0::/../../elsewhere\n", root) == [root], "in a container's own name space"
    assert machine.control_groups("12:cpu:/x\n", root) == [root], "the first version's, which has other files"


def test_a_process_that_may_lock_memory_has_no_limit() -> None:
    assert machine.may_lock("Name: x\nCapEff:\t000001ffffffffff\n")
    assert not machine.may_lock("CapEff:\t0000000000000000\n")


def test_room_is_asked_for_every_checkpoint_that_is_kept() -> None:
    spare = storage.SPARE
    assert storage.checkpoint_room(10, keep_last=2, steps=100, keep_every=0) == (10 + spare, 40 + spare)
    assert storage.checkpoint_room(10, keep_last=2, steps=100, keep_every=50) == (10 + spare, 60 + spare)


def test_a_folder_that_takes_no_file_is_told(tmp_path: Path) -> None:
    here = alone(three_nodes(tmp_path))
    assert storage.look_at_disk(here)["--out"] > 0
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "file").write_text("")
    here.paths.out = tmp_path / "file" / "out"
    with pytest.raises(ValueError, match=r"--out .*file/out cannot be written \(Not a directory\): mount it"):
        storage.look_at_disk(here)


def test_a_folder_of_checkpoints_that_is_gone_is_not_made_anew(tmp_path: Path) -> None:
    out, kept = tmp_path / "out", tmp_path / "disk" / "kept"
    out.mkdir()
    (out / PLACE_RECORD).write_text(record_place(out, kept))
    assert storage.look_at_disk(alone(three_nodes(tmp_path, checkpoints=kept))).keys() == {"--out"}
    assert not kept.parent.exists()


def test_an_object_is_written_listed_read_and_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = alone(three_nodes(tmp_path, checkpoints="memory://bucket/run"))
    assert storage.look_at_store(here)["seconds"] > 0
    assert places.place_of("memory://bucket/run").names() == []
    monkeypatch.setattr(places.Place, "names", lambda *_: [])
    with pytest.raises(OSError, match="was written and is not listed: its keys need the rights to list"):
        storage.look_at_store(here)
    monkeypatch.undo()
    assert places.place_of("memory://bucket/run").names() == [], "it is removed all the same"


def test_a_store_that_an_earlier_start_used_and_that_fails_now_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = alone(three_nodes(tmp_path, checkpoints="memory://bucket/run"))
    monkeypatch.setattr(places.Place, "write", Mock(side_effect=OSError("503")))
    with pytest.raises(OSError, match="503"):  # of a new run it may be a mistake
        storage.look_at_store(here)
    monkeypatch.setenv(COUNTED, "1")
    assert storage.look_at_store(here) == {
        "fails": "503"
    }  # training ends with 75 then, and the job counts it
    monkeypatch.delenv(COUNTED)
    here.paths.out.mkdir()
    (here.paths.out / PLACE_RECORD).write_text(record_place(here.paths.out, here.paths.checkpoints))
    (problem,) = storage.judge_store(told(storage.look_at_store(here)), here).problems
    assert (problem.value, problem.status) == ("503", WARNING)
    monkeypatch.setattr(places.Place, "write", Mock(side_effect=PermissionError("refused")))
    with pytest.raises(PermissionError):
        storage.look_at_store(here)


def test_data_is_read_and_a_shard_that_is_cut_is_told(tmp_path: Path) -> None:
    data = good_set(tmp_path / "data", (3, 4), has_text=False)
    here = alone(three_nodes(tmp_path, data={"labelled": data, "captioned": data}))
    found = recipe.look_at_data(here)["sources"]
    assert found["labelled"] == found["captioned"]
    assert (found["labelled"]["shards"], found["labelled"]["samples"]) == (2, 7)
    content = (data / "000000.tar").read_bytes()
    (data / "000000.tar").write_bytes(b"\0" * len(content))
    with pytest.raises(ValueError, match=r"000000.tar does not begin as a tar file: copy it again"):
        recipe.look_at_data(here)
    (data / "000000.tar").write_bytes(content[:512])
    with pytest.raises(ValueError, match=r"000000.tar has 512 bytes, the manifest says"):
        recipe.look_at_data(here)


def test_a_store_of_data_that_fails_now_is_warned_of_and_a_mistake_fails(
    tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "REFUSED_AT_START", 0.0)
    away = f"http://127.0.0.1:{free_port}/set"
    here = alone(three_nodes(tmp_path, data={"labelled": away, "captioned": away}))
    with pytest.raises(NobodyThere, match="mend the address"):  # of a new run it is a wrong address
        recipe.look_at_data(here)
    (tmp_path / "out" / "checkpoints" / "step_000003").mkdir(parents=True)  # with which it has served
    fails = recipe.look_at_data(here)
    small = {name: {"manifest": "1", "shards": 200, "samples": 700} for name in here.paths.data}
    judged = recipe.judge_data(told({"sources": small}, fails), here)
    (problem,) = judged.problems
    assert problem.value.startswith(f"{away} cannot be read, nobody takes connections there")
    assert problem.status == WARNING and "labelled: 700 samples in 200 shards" in judged.value
    assert recipe.judge_data(told(fails), here).value == "fails now"
    monkeypatch.setattr(recipe, "_look_at_sources", lambda here: time.sleep(5))
    here.options = dataclasses.replace(here.options, check_seconds=0.1)
    assert "no answer" in recipe.look_at_data(here)["fails"]
    monkeypatch.undo()
    missing = f"file://{tmp_path}/missing"
    with pytest.raises(FileNotFoundError, match="is missing: name the URL"):
        recipe.look_at_data(alone(three_nodes(tmp_path, data={"labelled": missing, "captioned": missing})))


def test_a_small_data_set_is_warned_of(tmp_path: Path) -> None:
    here = three_nodes(tmp_path)
    small = {"labelled": {"manifest": "1", "shards": 2, "samples": 7}}
    problems = recipe.judge_data(told(*[{"sources": small}] * 3), here).problems
    assert [problem.value for problem in problems] == [
        "labelled has 7 samples, the batch 64",
        "labelled has 2 shards, 3 processes read it",
    ]
    assert {problem.status for problem in problems} == {WARNING}


def test_a_rank_without_the_gpu_that_others_have_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    here = three_nodes()
    here.num_gpus = 2
    with pytest.raises(ValueError, match=r"rank 0 of the node has no GPU, torch sees 0: see nvidia-smi"):
        gpus.look_at_gpu(here)
    with pytest.raises(ValueError, match="2 of 3 ranks have a GPU, all or none must"):
        network.look_at_all_reduce(here)
