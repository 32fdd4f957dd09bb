"""Does the benchmark of a save's stall still run? Small, in a process as a rank has it.

`python test_stall_benchmark.py FOLDER` is that process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.engine.launch import start


def test_the_stall_of_a_save_is_measured_on_a_small_model(tmp_path: Path) -> None:
    codes, output = start(tmp_path, world=1, script=Path(__file__))
    assert codes == [0], output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["state_bytes"] == 4 * 16 * (8 * 8 + 8)  # four layers with biases
    assert all(len(values) == 1 and values[0] > 0 for values in found["seconds"].values())
    assert len(found["restore_seconds"]) == len(found["ds_to_universal_seconds"]) == 1


def main() -> None:
    from benchmarks import checkpoint_stall

    folder = Path(sys.argv[1])
    checkpoint_stall.start_distributed()
    found = checkpoint_stall.measured(width=8, rounds=1, place=folder)
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
