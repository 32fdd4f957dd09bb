"""How many samples a second does Megatron-Energon read, and decode? `python energon_rate.py DATA NUM`, as JSON.

Runs in an environment of its own (`benchmarks/loader_peers.py` makes it); one process, no workers.
"""

import json
import sys
import time
from dataclasses import dataclass

import simplejpeg
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


@dataclass
class Encoded(Sample):
    jpg: bytes


@stateless
def cook(sample: dict) -> Encoded:
    return Encoded(**basic_sample_keys(sample), jpg=sample["jpg"])


class Encoder(DefaultTaskEncoder):
    decoder = None  # bytes as they are
    cookers = [Cooker(cook)]  # noqa: RUF012  as its documentation has it


def main(folder: str, num: int) -> None:
    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = get_train_dataset(
        folder,
        batch_size=None,
        shuffle_buffer_size=1000,
        max_samples_per_sequence=100,
        worker_config=config,
        task_encoder=Encoder(),
    )
    samples = iter(get_loader(dataset))
    rates = {}
    for what, work in (
        ("read", lambda content: None),
        ("decode", lambda content: simplejpeg.decode_jpeg(content)),
    ):
        next(samples)
        begun = time.perf_counter()
        for _ in range(num):
            work(next(samples).jpg)
        rates[what] = num / (time.perf_counter() - begun)
    print(json.dumps(rates))


main(sys.argv[1], int(sys.argv[2]))
