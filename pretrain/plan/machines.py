"""What can a GPU and its network do? Published peaks, and what of them a kernel reaches (no torch)."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
# Of the published bandwidth; assumed, as large collectives and streaming kernels usually reach.
ATTAINED_LINK, ATTAINED_NETWORK, ATTAINED_MEMORY, ATTAINED_PCIE = 0.8, 0.9, 0.8, 0.8
RESERVED = 1.5 * GIB  # bytes of the CUDA context, NCCL's buffers and the allocator's gaps; assumed


@dataclass(frozen=True)
class Machine:
    """One GPU: data sheets of its vendor, dense bfloat16 without sparsity."""

    peak: float  # floating-point operations a second
    memory: float  # bytes
    bandwidth: float  # bytes a second, of its own memory
    link: float  # bytes a second to the other GPUs of its node, one direction
    pcie: float = 32e9  # bytes a second to the host, one direction


MACHINES: dict[str, Machine] = {
    "a100": Machine(312e12, 79 * GIB, 2.0e12, 300e9),
    "a100_40gb": Machine(312e12, 39 * GIB, 1.55e12, 300e9),
    "b200": Machine(2250e12, 178 * GIB, 8.0e12, 900e9, 64e9),
    "h100": Machine(989e12, 79 * GIB, 3.35e12, 450e9, 64e9),
    "h200": Machine(989e12, 139 * GIB, 4.8e12, 450e9, 64e9),
    "l40s": Machine(362e12, 44 * GIB, 0.86e12, 32e9),
    "rtx4090": Machine(165e12, 23.5 * GIB, 1.0e12, 32e9),
}


def machine(name: str) -> Machine:
    """ValueError lists what is known."""
    if name not in MACHINES:
        raise ValueError(f"--gpu {name} is unknown; choose from {sorted(MACHINES)}")
    return MACHINES[name]


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind, in nodes that a network joins."""

    gpu: str
    gpus: int
    network: float  # bytes a second that a GPU has to other nodes, one direction
    gpus_per_node: int = 8

    def __post_init__(self) -> None:
        machine(self.gpu)
        if self.gpus < 1 or self.gpus_per_node < 1:
            raise ValueError(
                f"--gpus {self.gpus} and --gpus-per-node {self.gpus_per_node} must be at least 1"
            )
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ValueError(
                f"--gpus {self.gpus} must be a multiple of --gpus-per-node {self.gpus_per_node}: set "
                f"{-(-self.gpus // self.gpus_per_node) * self.gpus_per_node}"
            )
        if not self.network > 0:
            raise ValueError(
                f"--network {self.network / 1e9:g} must be positive: GB/s a GPU, 50 for 400 Gb/s"
            )

    @property
    def one(self) -> Machine:
        return MACHINES[self.gpu]

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    @property
    def gpus_a_node(self) -> int:
        return min(self.gpus, self.gpus_per_node)
