"""Sums of auxiliary losses, kept on the device between two reports.

module.record.add("z_loss", share)                    # every micro-batch: this rank's share of the loss
reduce_losses(records, names=names, num_layers=4)      # at a report, on all ranks: means over micro-batches
"""

import torch
import torch.distributed as dist


class LossRecord:
    """The auxiliary losses of one module since the last `reset`, without coefficients."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, share: torch.Tensor) -> None:
        """Add the share of one micro-batch. The shares of all ranks that compute this layer add up to the loss."""
        self.sums[name] = self.sums.get(name, 0.0) + share.detach().double()
        self.counts[name] = self.counts.get(name, 0) + 1

    def reset(self) -> None:
        """Remove all losses."""
        self.sums, self.counts = {}, {}


def reduce_losses(records: dict[int, list[LossRecord]], *, names: list[str], num_layers: int) -> dict[str, torch.Tensor]:
    """Mean over micro-batches of each named loss, [num_layers] on the CPU; a collective on every rank.

    records: of the layers on this rank, by layer index from 0. names: the same on every rank.
    """
    values_ML = torch.zeros(len(names), num_layers, dtype=torch.float64)
    for layer, of_layer in records.items():
        for record in of_layer:
            for name in record.sums:
                values_ML[names.index(name), layer] += record.sums[name].cpu() / record.counts[name]
    if dist.is_initialized() and names:
        on_device = values_ML.to(torch.cuda.current_device()) if torch.cuda.is_available() else values_ML
        dist.all_reduce(on_device)
        values_ML = on_device.cpu()
    return dict(zip(names, values_ML, strict=True))
