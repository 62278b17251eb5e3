"""The machines that a run is planned for.

cluster = ClusterConfig(gpu="h100", nodes=8)
cluster.world_size, cluster.usable_gib, cluster.tflops
"""

from dataclasses import dataclass

from mone_common.checks import check


@dataclass(frozen=True)
class Device:
    """One accelerator: peak rates from its data sheet (dense, without sparsity) and the usual network."""

    memory_gib: float
    bf16_tflops: float | None
    """With fp32 accumulation; None: the device has no bf16."""
    fp32_tflops: float
    """Without TF32, which is off by default in torch."""
    node_gb_per_second: float
    """From one device to others in its node, one direction: NVLink, else PCIe."""
    network_gb_per_second: float
    """From one device to other nodes, one direction."""


DEVICES = {
    "a100_40gb": Device(40, 312, 19.5, 300, 25),
    "a100": Device(80, 312, 19.5, 300, 25),
    "h100": Device(80, 989, 67, 450, 50),
    "h200": Device(141, 989, 67, 450, 50),
    "b200": Device(180, 2250, 75, 900, 50),
    "rtx_3090": Device(24, 71, 35.6, 32, 1.25),
    "rtx_4090": Device(24, 165, 82.6, 32, 1.25),
    "rtx_5090": Device(32, 210, 105, 64, 1.25),
    "t4": Device(16, None, 8.1, 16, 3),
    "v100_16gb": Device(16, None, 15.7, 150, 6.25),
    "v100": Device(32, None, 15.7, 150, 6.25),
    "a10": Device(24, 125, 31.2, 32, 6.25),
    "l4": Device(24, 121, 30.3, 32, 6.25),
    "l40s": Device(48, 362, 91.6, 32, 25),
    # One core with AVX-512. bf16 is no faster than fp32 there.
    "cpu": Device(12, 0.1, 0.1, 2, 1),
}


WITH_BF16 = [name for name, device in DEVICES.items() if device.bf16_tflops is not None]


@dataclass
class ClusterConfig:
    """The machines of the run."""

    gpu: str = "h100"
    """a100_40gb, a100, h100, h200, b200, rtx_3090, rtx_4090, rtx_5090, t4, v100_16gb, v100, a10, l4, l40s, or cpu (one core
    a process)."""
    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 8
    """Processes on each."""
    mfu: float = 0.3
    """Model FLOPs utilization: the share of the device's peak that training will reach. Measure it with a short run:
    speed/flops_per_second of metrics.jsonl divided by the peak."""
    memory_gib: float | None = None
    """Memory of a device; null: from the data sheet."""
    reserve_gib: float = 6.0
    """Memory of a device that is not available to the model: driver, NCCL buffers, fragmentation."""
    peak_tflops: float | None = None
    """Peak of a device in compute.precision; null: from the data sheet."""

    def __post_init__(self) -> None:
        check(self.gpu in DEVICES, "cluster.gpu", self.gpu, f"choose from {', '.join(DEVICES)}")
        for name in ("nodes", "gpus_per_node"):
            check(getattr(self, name) >= 1, f"cluster.{name}", getattr(self, name), "must be at least 1")
        check(0 < self.mfu <= 1, "cluster.mfu", self.mfu, "must be in (0, 1]")
        for name in ("memory_gib", "peak_tflops"):
            value = getattr(self, name)
            check(value is None or value > 0, f"cluster.{name}", value, "must be null or positive")
        check(
            0 <= self.reserve_gib < self.total_gib,
            "cluster.reserve_gib",
            self.reserve_gib,
            f"must be less than the device's {self.total_gib:g} GiB",
        )

    @property
    def device(self) -> Device:
        """The data sheet of `gpu`."""
        return DEVICES[self.gpu]

    @property
    def is_cpu(self) -> bool:
        """Whether there are no GPUs."""
        return self.gpu == "cpu"

    @property
    def world_size(self) -> int:
        """Processes."""
        return self.nodes * self.gpus_per_node

    @property
    def total_gib(self) -> float:
        """Memory of a device, GiB."""
        return self.memory_gib or self.device.memory_gib

    @property
    def usable_gib(self) -> float:
        """Memory of a device that is available to the model, GiB."""
        return self.total_gib - self.reserve_gib

    def tflops(self, precision: str) -> float:
        """Peak of a device, TFLOP/s; ValueError if it lacks this precision."""
        peak = self.device.bf16_tflops if precision == "bf16" else self.device.fp32_tflops
        if peak is None:
            raise ValueError(
                f"compute.precision={precision}: cluster.gpu={self.gpu} has no {precision}; "
                f"compute.precision=fp32, or one of {', '.join(WITH_BF16)}"
            )
        return self.peak_tflops or peak

    def gb_per_second(self, span: int) -> float:
        """Bandwidth of a device within a group that spans `span` consecutive ranks."""
        inside = span <= self.gpus_per_node
        return self.device.node_gb_per_second if inside else self.device.network_gb_per_second
