"""How far are the planned bytes of a step's collectives from those that ranks send?

    OMP_NUM_THREADS=1 python benchmarks/plan_traffic.py

On two and on four ranks over gloo: a small M3I with teacher, batch norms over all ranks and contrastive captions,
under each ZeRO stage of tests/plan/counted.py; bytes by collective, counted where torch hands them to the network.
Then what the plan makes of clusters of up to 1,024 GPUs: a simulation. Writes benchmarks/results/plan_traffic.json.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.record import keep  # noqa: E402
from pretrain.plan.machines import Cluster  # noqa: E402
from pretrain.plan.plan import make_plan  # noqa: E402
from pretrain.plan.scaling import weak_scaling  # noqa: E402
from pretrain.plan.settings import Setting, read  # noqa: E402
from pretrain.plan.sizes import assumed_facts, sizes_of  # noqa: E402
from pretrain.plan.step_time import ASSUMPTIONS  # noqa: E402
from pretrain.plan.traffic import traffic  # noqa: E402
from pretrain.recipes import load  # noqa: E402
from tests.engine.launch import start  # noqa: E402
from tests.fakes import FACTS  # noqa: E402
from tests.plan.counted import OPERATIONS, VARIANTS, counted_run, parts_of  # noqa: E402

WORLD = 2
SECONDS = 1800  # of a busy machine; a quiet one needs less than a minute
NETWORKS = {"400 Gb/s a GPU": 50e9, "100 Gb/s a GPU": 12.5e9, "100 Gb/s a node": 12.5e9 / 8}  # bytes a second
IMAGES = 312  # a GPU: 40,000 on 128


def counted(world: int) -> dict[str, Any]:
    """What tests/plan/counted.py tells, by variant."""
    with tempfile.TemporaryDirectory() as work:
        script = ROOT / "tests" / "plan" / "counted.py"
        codes, output = start(Path(work), world=world, script=script, timeout=SECONDS)
        if any(codes):
            raise SystemExit(output)
        return json.loads((Path(work) / "result.json").read_text())


def setting_of(variant: str) -> Setting:
    """The plan's view of a variant."""
    file, changes = VARIANTS[variant]
    return Setting(file, read()[file] | changes, micro_batches=parts_of(variant))


def on_ranks(world: int) -> dict[str, Any]:
    """Bytes by variant and collective, counted, planned and their ratio."""
    run, found = counted_run(world), {}
    for variant, one in counted(world).items():
        sent: dict[str, float] = defaultdict(float)
        for operation, number in one["sent"].items():
            sent[OPERATIONS[operation]] += number
        planned: dict[str, float] = defaultdict(float)
        for message in traffic(run, FACTS, sizes_of(run, FACTS), setting_of(variant), world):
            planned[message.by] += message.bytes
        found[variant] = {
            by: {
                "counted": sent[by],
                "planned": planned[by],
                "planned_over_counted": round(planned[by] / sent[by], 5),
            }
            for by in sent
        }
    return found


def simulated() -> dict[str, Any]:
    """Weak scaling of InternImage-H on H200s, by network and ds config, without checkpointing."""
    found: dict[str, Any] = {}
    for network, speed in NETWORKS.items():
        cluster = Cluster("h200", 128, speed)
        run = dataclasses.replace(load("m3i.internimage_h"), batch=IMAGES * cluster.gpus)
        plan = make_plan(run, assumed_facts(run), cluster)
        found[network] = {
            one.setting.file: {
                grown.gpus: round(grown.efficiency, 4) for grown in weak_scaling(plan, one.setting)
            }
            for one in plan.planned
            if one.setting.checkpoint == "none"
        }
    return found


def main() -> None:
    result = {
        "unit": "bytes of whole messages",
        "goal": "within 1 %",
        "two_ranks": on_ranks(2),
        "four_ranks": on_ranks(4),
        "simulated_weak_scaling": simulated(),
        "assumptions": list(ASSUMPTIONS),
    }
    print(json.dumps(result, indent=1))
    keep("plan_traffic", __doc__.splitlines()[0], torch.device("cpu"), **result)


if __name__ == "__main__":
    main()
