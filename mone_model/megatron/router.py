"""Megatron-Core's top-k router, with auxiliary losses that do not depend on how the batch is spread over ranks."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, z_loss_func
from megatron.core.transformer.moe.router import TopKRouter

from mone_model.loss_record import LossRecord


class Router(TopKRouter):
    """`TopKRouter` whose losses have the same value and gradient on every layout.

    Megatron-Core takes the Switch loss over each rank's own tokens, so that it changes with the data-parallel size, and
    the gradient of its global loss is divided by that size (Megatron-LM #3672, #5047). Here the Switch loss counts the
    tokens of the global micro-batch, and whatever is summed over data-parallel ranks is scaled back by their number,
    because DDP averages gradients over them.

    Its buffers, the expert bias and what counts tokens, stay in fp32 when a model is cast to bf16, which counts to 256.

    `record` holds the losses since they were last read, without coefficients.
    """

    tp_cp_group: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.record = LossRecord()

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        # Every cast of a module comes here: Megatron-Core's Float16Module casts buffers too, and so does DeepSpeed.
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
