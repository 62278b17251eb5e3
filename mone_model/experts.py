"""Experts whose neurons are experts: `NeuronExperts`, handed to Megatron-Core's MoELayer, and the shared expert.

    y_ND = sum over kept neurons j of  G_ij(x) (w_up_ij . x) w_down_ij,   G = act(x @ w_gate)

Shapes: N rows (tokens of this rank's experts, sorted by expert), D model width, E experts of this rank, H neurons of an
expert, h of them on this rank.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

from mone_model.loss_record import LossRecord
from mone_model.neuron_balance import neuron_balance_loss
from mone_model.neuron_selection import Selection, select_neurons
from mone_model.neuron_stats import NeuronCounters


def expert_gemm(x_NK: torch.Tensor, weight_EMK: torch.Tensor, tokens_E: torch.Tensor) -> torch.Tensor:
    """One grouped GEMM: rows of expert e times weight[e] transposed. [N, K], [E, M, K], [E] -> [N, M]."""
    if len(x_NK) == 0:
        # The grouped GEMM's backward refuses an empty batch; this keeps the weights in the graph.
        return x_NK @ weight_EMK[0].T
    offsets_E = tokens_E.cumsum(0).to(device=x_NK.device, dtype=torch.int32)
    return F.grouped_mm(x_NK, weight_EMK.transpose(1, 2), offs=offsets_E)


def expert_gemm_loop(x_NK: torch.Tensor, weight_EMK: torch.Tensor, tokens_E: torch.Tensor) -> torch.Tensor:
    """What `expert_gemm` means: one GEMM for each expert."""
    rows = x_NK.split(tokens_E.tolist())
    return torch.cat([x @ weight.T for x, weight in zip(rows, weight_EMK, strict=True)])


class NeuronExperts(MegatronModule):
    """The routed experts of one layer on this rank; each token keeps its `active_neurons` best neurons in each expert.

    active_neurons: K. Equal to H it is a plain MoE: no selection takes place.
    balance_coeff, balance_form: the neuron balance loss (`mone_model.neuron_balance`).
    gemm: "grouped" or "loop".

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
        balance_coeff: float = 0.0,
        balance_form: str = "normalised",
        gemm: str = "grouped",
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.active_neurons, self.balance_coeff, self.balance_form = active_neurons, balance_coeff, balance_form
        self.gemm = {"grouped": expert_gemm, "loop": expert_gemm_loop}[gemm]
        self.ep_group, self.etp_group, self.edp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        self.num_neurons: int = config.moe_ffn_hidden_size
        width, neurons = config.hidden_size, self.num_neurons // self.etp_group.size()
        options: dict[str, Any] = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        # Neuron-major, gate and up in one tensor: one GEMM for both, and the rows of a neuron lie together.
        self.gate_up_weight = torch.nn.Parameter(torch.empty(num_local_experts, 2, neurons, width, **options))
        self.down_weight = torch.nn.Parameter(torch.empty(num_local_experts, width, neurons, **options))
        for weight in (self.gate_up_weight, self.down_weight):
            # Also at expert-parallel size 1, or optimizer state could not move between layouts.
            weight.allreduce = False  # type: ignore[attr-defined]
            # Else the gradient norm takes the experts of one tensor-parallel rank only.
            set_tensor_model_parallel_attributes(tensor=weight, is_parallel=True, dim=2, stride=1)
        self.record = LossRecord()
        self.counting_neurons = False
        self.counters: NeuronCounters | None = None

    def forward(
        self, x_ND: torch.Tensor, tokens_per_expert_E: torch.Tensor, probs_N: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """[N, D] rows sorted by expert, [E] rows of each, [N] routing weights -> [N, D] weighted outputs, no bias."""
        tokens_E = tokens_per_expert_E.to(x_ND.device)
        gate_up_NH = self.gemm(x_ND, self.gate_up_weight.flatten(1, 2), tokens_E)
        gate_NH, up_NH = gate_up_NH.chunk(2, dim=-1)
        gate_NH = self.config.activation_func(gate_NH)
        hidden_NH = gate_NH * up_NH
        kept = None
        if self.active_neurons < self.num_neurons:
            kept = select_neurons(gate_NH, self.active_neurons, self._split_group)
            hidden_NH = hidden_NH * kept.mask_NH
        hidden_NH = (hidden_NH * probs_N[:, None]).to(x_ND.dtype)
        output_ND = self.gemm(hidden_NH, self.down_weight, tokens_E)
        # With recomputation the first pass runs without gradients and the second with: either way this runs once.
        if self.training and torch.is_grad_enabled():
            output_ND = self._observe(output_ND, gate_NH, kept, tokens_E)
        return output_ND, None

    @property
    def _split_group(self) -> Any:
        """The ranks that hold the other neurons of these experts, or None if all are here."""
        return self.etp_group if self.etp_group.size() > 1 else None

    def _observe(
        self, output_ND: torch.Tensor, gate_NH: torch.Tensor, kept: Selection | None, tokens_E: torch.Tensor
    ) -> torch.Tensor:
        """Count what the neurons did and attach their balance loss to the output."""
        balance = self.balance_coeff > 0
        if not (balance or self.counting_neurons):
            return output_ND
        if kept is None:
            smallest_N = gate_NH.detach().abs().amin(-1)
            if self._split_group is not None:
                dist.all_reduce(smallest_N, op=dist.ReduceOp.MIN, group=self._split_group)
            kept = Selection(torch.ones_like(gate_NH, dtype=torch.bool), smallest_N)
        if self.counting_neurons:
            if self.counters is None:
                self.counters = NeuronCounters(self.num_local_experts, gate_NH.size(1), gate_NH.device)
            self.counters.add(
                gate_NH=gate_NH.detach(),
                mask_NH=kept.mask_NH,
                threshold_N=kept.threshold_N,
                tokens_per_expert_E=tokens_E,
            )
        if balance:
            share = neuron_balance_loss(
                gate_NH=gate_NH,
                mask_NH=kept.mask_NH,
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
            output_ND = MoEAuxLossAutoScaler.apply(output_ND, self.balance_coeff * replicas * share)
        return output_ND

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
                (axes + 2, self.etp_group.rank(), self.etp_group.size()),
                replica_id=(0, 0, self.edp_group.rank()),
                prepend_axis_num=axes,
            )
            for name, weight in (("gate_up_weight", self.gate_up_weight), ("down_weight", self.down_weight))
        }


class SharedNeuronExpert(SharedExpertMLP):
    """The shared expert, with the same selection of neurons as the routed ones; active_neurons: K of all its neurons."""

    def __init__(self, config: TransformerConfig, *args: Any, active_neurons: int, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # keeps a copy of the config of its own
        activation = config.activation_func
        neurons: int = config.moe_shared_expert_intermediate_size
        group = self.tp_group if self.tp_group.size() > 1 else None

        def activate_and_select(gate: torch.Tensor) -> torch.Tensor:
            gate = activation(gate)
            kept = select_neurons(gate.flatten(0, -2), active_neurons, group)
            return gate * kept.mask_NH.view_as(gate)

        if active_neurons < neurons:
            self.config.activation_func = activate_and_select
            self.activation_func = activate_and_select
