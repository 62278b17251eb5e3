"""Experts whose neurons are experts: `NeuronExperts`, handed to Megatron-Core's MoELayer, and the shared expert.

    y_ND = sum over kept neurons j of  G_ij(x) (w_up_ij . x) w_down_ij,   G = act(x @ w_gate)

Shapes: N rows (tokens of this rank's experts, sorted by expert), D model width, E experts of this rank, H neurons of an
expert, h of them on this rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

from mone_model.expert_backends import GEMMS
from mone_model.kernels.cpu import experts as cpu
from mone_model.loss_record import LossRecord
from mone_model.neuron_balance import neuron_balance_loss, sum_by_expert
from mone_model.neuron_selection import Selection, scores_of, select_and_gate, select_neurons, unpack
from mone_model.neuron_stats import NeuronCounters


class NeuronExperts(MegatronModule):
    """The routed experts of one layer on this rank; each token keeps its `active_neurons` best neurons in each expert.

    active_neurons: K. Equal to H it is a plain MoE: no selection takes place.
    balance_coeff, balance_form: the neuron balance loss (`mone_model.neuron_balance`).
    method: grouped, loop or sparse (`mone_model.expert_backends`).

    `threshold` and `max_decode_rows` are for inference (`mone_model.megatron.inference`): with a threshold, all neurons are
    kept whose |gate| reaches it; up to so many rows, only what is kept is read.

    `record` holds the neuron balance loss since it was last read, `counters` what each neuron did, as long as
    `counting_neurons` is set; both count a token once, also under recomputation.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        active_neurons: int,
        activation: str = "silu",
        balance_coeff: float = 0.0,
        balance_form: str = "normalised",
        method: str = "grouped",
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.active_neurons, self.activation = active_neurons, activation
        self.balance_coeff, self.balance_form = balance_coeff, balance_form
        self.method = method
        self.threshold: float | None = None
        self.max_decode_rows = 0
        self.ep_group, self.etp_group, self.edp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        self.num_neurons: int = config.moe_ffn_hidden_size
        width, neurons = config.hidden_size, self.num_neurons // self.etp_group.size()
        options: dict[str, Any] = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        # Neuron-major: what belongs to a neuron lies together. Gate and up in one tensor: one GEMM for both.
        self.gate_up_weight = torch.nn.Parameter(torch.empty(num_local_experts, 2, neurons, width, **options))
        self.down_weight = torch.nn.Parameter(torch.empty(num_local_experts, neurons, width, **options))
        for weight, axis in ((self.gate_up_weight, 2), (self.down_weight, 1)):
            # Also at expert-parallel size 1, or optimizer state could not move between layouts.
            weight.allreduce = False  # type: ignore[attr-defined]
            # Else the gradient norm takes the experts of one tensor-parallel rank only.
            set_tensor_model_parallel_attributes(tensor=weight, is_parallel=True, dim=axis, stride=1)
            # By the first of a step, so that it need not be zeroed before (`mone_model.megatron.cpu_overrides`).
            weight.gradient_is_written_over = method == "sparse"  # type: ignore[attr-defined]
        self.record = LossRecord()
        self.counting_neurons = False
        self.counters: NeuronCounters | None = None

    def forward(
        self, x_ND: torch.Tensor, tokens_per_expert_E: torch.Tensor, probs_N: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """[N, D] rows sorted by expert, [E] rows of each, [N] routing weights -> [N, D] weighted outputs, no bias."""
        tokens_E = tokens_per_expert_E.to(x_ND.device)
        weights, k = (self.gate_up_weight, self.down_weight), self.active_neurons
        if len(x_ND) <= self.max_decode_rows and not torch.is_grad_enabled():
            decoded = cpu.decode(x_ND, *weights, probs_N, tokens_E, k, self.activation, threshold=self.threshold)
            return decoded.out_ND, None
        # With recomputation the first pass runs without gradients and the second with: either way this counts once.
        observing = self.training and torch.is_grad_enabled()
        assert self.threshold is None or not observing, "thresholds are for inference"
        counting, balancing = observing and self.counting_neurons, observing and self.balance_coeff > 0
        if self.method == "sparse" and self.threshold is None:
            kept = cpu.experts(
                x_ND, *weights, probs_N, tokens_E, k, self.activation, counting=counting or balancing, with_gates=balancing
            )
            output_ND, load_EH = kept.out_ND, kept.counts_E2H[:, 0]
            if counting:
                self._count(tokens_E, kept.threshold_N, load_EH, kept.counts_E2H[:, 1])
            if balancing:
                # The loss sees dropped neurons too, and sends them gradients.
                active_NH, mask_NH = self.config.activation_func(kept.gate_NH), unpack(kept.masks_NW, self.num_neurons)
                output_ND = self._attach_balance_loss(output_ND, active_NH, mask_NH, load_EH.float(), tokens_E)
            return output_ND, None
        gemm = GEMMS["loop" if self.method == "sparse" else self.method]
        selecting = self.threshold is not None or k < self.num_neurons
        gate_NH, up_NH = gemm(x_ND, self.gate_up_weight.flatten(1, 2).transpose(1, 2), tokens_E).chunk(2, dim=-1)
        if selecting and self.threshold is None and self._split_group is None and self.balance_coeff == 0:
            hidden_NH, masks_NW, threshold_N = select_and_gate(gate_NH, up_NH, probs_N, k, self.activation)
            if counting:
                active_NH, mask_NH = self.config.activation_func(gate_NH.detach()), unpack(masks_NW, self.num_neurons)
        else:
            active_NH = self.config.activation_func(gate_NH)
            hidden_NH = (active_NH * up_NH * probs_N[:, None]).to(x_ND.dtype)
            if selecting or counting or balancing:
                mask_NH, threshold_N = self._select(active_NH)
            if selecting:
                hidden_NH = hidden_NH * mask_NH
        output_ND = gemm(hidden_NH, self.down_weight, tokens_E)
        if counting or balancing:
            load_EH = sum_by_expert(mask_NH.float(), tokens_E)
            if counting:
                self._count(tokens_E, threshold_N, load_EH, sum_by_expert(active_NH.detach().float().abs(), tokens_E))
            if balancing:
                output_ND = self._attach_balance_loss(output_ND, active_NH, mask_NH, load_EH, tokens_E)
        return output_ND, None

    def _select(self, active_NH: torch.Tensor) -> Selection:
        """The neurons kept, over all ranks that share the experts."""
        if self.threshold is not None:
            return Selection(scores_of(active_NH) >= self.threshold, active_NH.new_full(active_NH.shape[:1], self.threshold))
        if self.active_neurons < self.num_neurons:
            return select_neurons(active_NH, self.active_neurons, self._split_group)
        smallest_N = scores_of(active_NH).amin(-1)
        if self._split_group is not None:
            dist.all_reduce(smallest_N, op=dist.ReduceOp.MIN, group=self._split_group)
        return Selection(torch.ones_like(active_NH, dtype=torch.bool), smallest_N)

    @property
    def _split_group(self) -> Any:
        """The ranks that hold the other neurons of these experts, or None if all are here."""
        return self.etp_group if self.etp_group.size() > 1 else None

    def _count(
        self, tokens_E: torch.Tensor, threshold_N: torch.Tensor, selected_EH: torch.Tensor, magnitude_EH: torch.Tensor
    ) -> None:
        if self.counters is None:
            self.counters = NeuronCounters(self.num_local_experts, selected_EH.size(1), selected_EH.device)
        self.counters.add(
            tokens_per_expert_E=tokens_E, threshold_N=threshold_N, selected_EH=selected_EH, magnitude_EH=magnitude_EH
        )

    def _attach_balance_loss(
        self,
        output_ND: torch.Tensor,
        active_NH: torch.Tensor,
        mask_NH: torch.Tensor,
        load_EH: torch.Tensor,
        tokens_E: torch.Tensor,
    ) -> torch.Tensor:
        share = neuron_balance_loss(
            gate_NH=active_NH,
            mask_NH=mask_NH,
            load_EH=load_EH,
            tokens_per_expert_E=tokens_E,
            k=self.active_neurons,
            form=self.balance_form,
            data_group=self.edp_group,
            expert_group=self.ep_group,
            tensor_group=self._split_group,
        )
        self.record.add("neuron_balance_loss", share)
        # DDP averages gradients over data-parallel ranks, but the shares of the ranks add up.
        replicas = parallel_state.get_data_parallel_world_size()
        return MoEAuxLossAutoScaler.apply(output_ND, self.balance_coeff * replicas * share)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, ShardedTensor]:
        """Experts split over expert-parallel ranks on their first axis, neurons over expert-tensor ranks on theirs."""
        axes = len(sharded_offsets)
        experts = (axes, self.ep_group.rank(), self.ep_group.size())
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                weight,
                *sharded_offsets,
                experts,
                (axes + axis, self.etp_group.rank(), self.etp_group.size()),
                replica_id=(0, 0, self.edp_group.rank()),
                prepend_axis_num=axes,
            )
            for name, weight, axis in (("gate_up_weight", self.gate_up_weight, 2), ("down_weight", self.down_weight, 1))
        }


class SharedNeuronExpert(SharedExpertMLP):
    """The shared expert, with the same selection of neurons as the routed ones; active_neurons: K of all its neurons."""

    def __init__(self, config: TransformerConfig, *args: Any, active_neurons: int, activation: str, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.active_neurons, self.activation = active_neurons, activation

    def forward(self, x_SBD: torch.Tensor) -> torch.Tensor:
        """[s, b, D] -> [s, b, D]."""
        gate_up = self.linear_fc1(x_SBD)[0]
        gate_NH, up_NH = gate_up.flatten(0, -2).chunk(2, dim=-1)
        if self.tp_group.size() == 1:
            ones_N = gate_NH.new_ones(len(gate_NH))
            hidden_NH = select_and_gate(gate_NH, up_NH, ones_N, self.active_neurons, self.activation).hidden_NH
        else:
            active_NH = self.config.activation_func(gate_NH)
            hidden_NH = active_NH * up_NH * select_neurons(active_NH, self.active_neurons, self.tp_group).mask_NH
        output_SBD: torch.Tensor = self.linear_fc2(hidden_NH.unflatten(0, gate_up.shape[:-1]))[0]
        return output_SBD
