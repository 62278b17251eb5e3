"""Megatron-Core's top-k router, with auxiliary losses that do not depend on how the batch is spread over ranks."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, z_loss_func
from megatron.core.transformer.moe.router import TopKRouter

from mone_model.loss_record import LossRecord


class Router(TopKRouter):
    """`TopKRouter` whose losses have the same value and gradient on every layout.

    Megatron-Core computes the Switch loss over the tokens of one rank, so that it depends on the data-parallel size, and
    it divides the gradient of its global loss by that size (Megatron-LM #3672, #5047). Here the Switch loss covers the
    tokens of the global micro-batch. Losses that are summed over data-parallel ranks are multiplied by the number of these
    ranks, because DDP averages gradients over them.

    The buffers (expert bias, token counters) stay in fp32 when the model is cast to bf16, which is exact only up to 256.

    `record` holds the losses since they were last read, without coefficients.
    """

    tp_cp_group: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.record = LossRecord()

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        # Every cast calls this. Megatron-Core's Float16Module and DeepSpeed cast buffers too.
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self.get_buffer(name)
            if after.dtype != buffer.dtype:
                self.register_buffer(name, buffer.to(after.device), persistent=name not in self._non_persistent_buffers_set)
        return self

    def _apply_aux_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        own_group, self.tp_cp_group = self.tp_cp_group, self.tp_dp_cp_group
        try:
            return super()._apply_aux_loss(*args, **kwargs)
        finally:
            self.tp_cp_group = own_group

    def attach_and_log_load_balancing_loss(
        self,
        activation: torch.Tensor,
        aux_loss_coeff: float,
        aux_loss: torch.Tensor,
        aux_loss_name: str,
        reduce_group: Any,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attach the loss to the routing weights; aux_loss is this rank's part of a sum over `reduce_group`."""
        replicas = parallel_state.get_data_parallel_world_size()
        summed_over_replicas = reduce_group is self.tp_dp_cp_group
        share = aux_loss / aux_loss_coeff
        self.record.add(aux_loss_name, share if summed_over_replicas else share / replicas)
        return MoEAuxLossAutoScaler.apply(activation, aux_loss * (replicas if summed_over_replicas else 1))

    def apply_z_loss(self, logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Attach the z-loss to the logits."""
        coeff = self.config.moe_z_loss_coeff
        if coeff is None or not self.training or not torch.is_grad_enabled():
            return logits
        mean = z_loss_func(logits, 1.0) / self.tp_cp_group.size()
        self.record.add("z_loss", mean / parallel_state.get_data_parallel_world_size())
        return MoEAuxLossAutoScaler.apply(logits, mean * coeff)
