"""Does Megatron-Energon read every sample of a data set once? `python energon_reads.py DATA NUM`, as JSON {key:
sha256}.

Runs in an environment of its own (`benchmarks/energon_reads.py` makes it); one process, no workers, no shuffle
buffer. NUM samples are asked for, those of one epoch; the value is the SHA-256 of the image as Energon delivers it.
"""

import hashlib
import json
import sys
from dataclasses import dataclass

from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    Sample,
    WorkerConfig,
    basic_sample_keys,
    get_loader,
    get_train_dataset,
    stateless,
)

IMAGES = ("jpg", "png", "webp")


@dataclass
class Encoded(Sample):
    image: bytes
    record: bytes
    text: bytes | None
    category: bytes | None


@stateless
def cook(sample: dict) -> Encoded:
    (image,) = (sample[name] for name in IMAGES if name in sample)
    return Encoded(
        **basic_sample_keys(sample),
        image=image,
        record=sample["json"],
        text=sample.get("txt"),
        category=sample.get("cls"),
    )


class Encoder(DefaultTaskEncoder):
    decoder = None  # bytes as they are
    cookers = [Cooker(cook)]  # noqa: RUF012  as its documentation has it


def main(folder: str, num: int) -> None:
    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = get_train_dataset(
        folder, batch_size=None, shuffle_buffer_size=None, max_samples_per_sequence=None, worker_config=config,
        task_encoder=Encoder(),
    )  # fmt: skip
    samples = iter(get_loader(dataset))
    read = {}
    for _ in range(num):
        sample = next(samples)
        assert json.loads(sample.record)["sha256"] == hashlib.sha256(sample.image).hexdigest()
        read[sample.__key__] = hashlib.sha256(sample.image).hexdigest()
    print(json.dumps(read))


main(sys.argv[1], int(sys.argv[2]))
