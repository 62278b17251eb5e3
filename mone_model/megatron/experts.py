"""Experts whose neurons are experts: `NeuronExperts`, handed to Megatron-Core's MoELayer, and the shared expert.

    y_ND = sum over kept neurons j of  G_ij(x) (w_up_ij . x) w_down_ij,   G = act(x @ w_gate)

Shapes: N rows (tokens of this rank's experts, sorted by expert), D model width, E experts of this rank, H neurons of an
expert, h of them on this rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

from mone_model.expert_backends import BACKENDS, ExpertOutput, Request, Rule
from mone_model.loss_record import LossRecord
from mone_model.megatron.cpu_support import current_device
from mone_model.neuron_balance import Balance, neuron_balance_loss
from mone_model.neuron_bias import update_neuron_bias
from mone_model.neuron_score import frozen_projection
from mone_model.neuron_selection import TopK, select_and_gate, select_neurons
from mone_model.neuron_stats import NeuronCounters


class NeuronExperts(MegatronModule):
    """The routed experts of one layer on this rank; each token keeps its `active_neurons` best neurons in each expert.

    active_neurons: K, which `set_active_neurons` changes. Equal to H it is a plain MoE: no selection takes place.
    balance_coeff, balance: the neuron balance loss (`mone_model.neuron_balance`).
    bias_rate: step of the neuron bias (`mone_model.neuron_bias`), which `update_bias` changes; None: there is no bias.
    score: by which score neurons are selected (`mone_model.neuron_score`).
    backend: grouped, loop or sparse (`mone_model.expert_backends`).

    Calibration (`mone_model.megatron.calibration`) may set `rule` to thresholds.

    `record` holds the neuron balance loss since it was last read. `counters` holds what each neuron did while
    `counting_neurons` was set. Both count a token once, also with recomputation.
    """

    neuron_bias: torch.Tensor | None

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        active_neurons: int,
        activation: str = "silu",
        balance_coeff: float = 0.0,
        balance: Balance | None = None,
        bias_rate: float | None = None,
        score: str = "abs_gate",
        backend: str = "grouped",
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.etp_group, self.edp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        self.activation, self.backend = activation, backend
        self.top_k = TopK(active_neurons, self.etp_group if self.etp_group.size() > 1 else None)
        self.rule: Rule = self.top_k
        self.balance_coeff, self.balance = balance_coeff, balance or Balance()
        self.num_neurons: int = config.moe_ffn_hidden_size
        width, neurons = config.hidden_size, self.num_neurons // self.etp_group.size()
        options: dict[str, Any] = {"dtype": config.params_dtype, "device": current_device()}
        # Neuron-major: what belongs to a neuron lies together. Gate and up in one tensor: one GEMM for both.
        self.gate_up_weight = torch.nn.Parameter(torch.empty(num_local_experts, 2, neurons, width, **options))
        self.down_weight = torch.nn.Parameter(torch.empty(num_local_experts, neurons, width, **options))
        for weight, axis in ((self.gate_up_weight, 2), (self.down_weight, 1)):
            # Also at expert-parallel size 1, or optimizer state could not move between layouts.
            weight.allreduce = False  # type: ignore[attr-defined]
            # Else the gradient norm takes the experts of one tensor-parallel rank only.
            set_tensor_model_parallel_attributes(tensor=weight, is_parallel=True, dim=axis, stride=1)
            # By the first backward pass of a step, so that it need not be zeroed before (`cpu_overrides.zero_gradients`).
            weight.gradient_is_written_over = backend == "sparse"  # type: ignore[attr-defined]
        self.score = score
        self.frozen_EHD: torch.Tensor | None = None
        if score == "frozen":
            first, part = self.ep_group.rank() * num_local_experts, self.etp_group.rank()
            all_EHD = frozen_projection(range(first, first + num_local_experts), self.num_neurons, width)
            self.frozen_EHD = all_EHD[:, part * neurons : (part + 1) * neurons].to(**options)
        self.bias_rate = bias_rate
        bias_EH = None if bias_rate is None else torch.zeros(num_local_experts, neurons, device=current_device())
        self.register_buffer("neuron_bias", bias_EH)
        self.load_ET: torch.Tensor | None = None
        """[E, h + 1] since `update_bias`: in how many rows each neuron was kept, and the rows."""
        self.record = LossRecord()
        self.counting_neurons = False
        self.counters: NeuronCounters | None = None

    def forward(
        self, x_ND: torch.Tensor, tokens_per_expert_E: torch.Tensor, probs_N: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """[N, D] rows sorted by expert, [E] rows of each, [N] routing weights -> [N, D] weighted outputs, no bias."""
        tokens_E = tokens_per_expert_E.to(x_ND.device)
        # With recomputation the first pass runs without gradients and the second with: either way this counts once.
        observing = self.training and torch.is_grad_enabled()
        assert isinstance(self.rule, TopK) or not observing, "thresholds are for inference"

        rule = self.rule
        if self.score == "random_in_training" and not self.training and isinstance(rule, TopK):
            probs_N = probs_N * (rule.k / self.num_neurons)
            rule = rule._replace(k=self.num_neurons)

        # 1. Select and compute: the backend applies the rule between the gates and the down projection.
        backend = BACKENDS[self.backend]
        request = Request(
            rule,
            self.activation,
            counting=observing and (self.counting_neurons or self.neuron_bias is not None),
            # In both passes of recomputation, which must compute the same.
            balance=self.balance if self.training and self.balance_coeff > 0 else None,
            score=self.score,
            frozen_EHD=self.frozen_EHD,
            bias_EH=self.neuron_bias,
        )
        weights = backend.prepare(self.gate_up_weight, self.down_weight)
        output = backend.compute(weights, x_ND, tokens_E, probs_N, request)

        # 2. Count what each neuron did.
        if request.counting:
            self._count(output, tokens_E)

        # 3. Balance the load among neurons.
        if request.balance and observing:
            return self._attach_balance_loss(output, tokens_E), None
        return output.out_ND, None

    def _count(self, output: ExpertOutput, tokens_E: torch.Tensor) -> None:
        assert output.load_EH is not None
        assert output.threshold_N is not None
        assert output.magnitude_EH is not None
        if self.neuron_bias is not None:
            load_ET = torch.cat([output.load_EH, tokens_E[:, None]], dim=1).double()
            self.load_ET = load_ET if self.load_ET is None else self.load_ET + load_ET
        if not self.counting_neurons:
            return
        if self.counters is None:
            self.counters = NeuronCounters(self.num_local_experts, output.load_EH.size(1), output.load_EH.device)
        self.counters.add(
            tokens_per_expert_E=tokens_E,
            threshold_N=output.threshold_N,
            selected_EH=output.load_EH,
            magnitude_EH=output.magnitude_EH,
        )

    def _attach_balance_loss(self, output: ExpertOutput, tokens_E: torch.Tensor) -> torch.Tensor:
        """The outputs, whose backward pass adds the gradient of the loss. Dropped neurons count too."""
        assert output.sizes_EH is not None
        assert output.load_EH is not None
        share = neuron_balance_loss(
            sizes_EH=output.sizes_EH,
            load_EH=output.load_EH.float(),
            tokens_per_expert_E=tokens_E,
            k=self.top_k.k,
            stride=self.balance.stride,
            data_group=self.edp_group,
            expert_group=self.ep_group,
            tensor_group=self.top_k.group,
        )
        self.record.add("neuron_balance_loss", share)
        # DDP averages gradients over data-parallel ranks, but the shares of the ranks add up.
        replicas = parallel_state.get_data_parallel_world_size()
        return MoEAuxLossAutoScaler.apply(output.out_ND, self.balance_coeff * replicas * share)

    def set_active_neurons(self, k: int) -> None:
        """Keep another number of neurons from now on; also replaces thresholds."""
        self.rule = self.top_k = self.top_k._replace(k=k)

    def update_bias(self, *, applied: bool) -> None:
        """Update the neuron bias after a step, or forget the step if it was not applied; a collective on every rank."""
        if self.bias_rate is None or self.neuron_bias is None:
            return
        load_ET, self.load_ET = self.load_ET, None
        if not applied:
            return
        assert load_ET is not None, "the step had no forward pass"
        update_neuron_bias(
            self.neuron_bias,
            load_ET[:, :-1],
            load_ET[:, -1],
            k=self.top_k.k,
            neurons=self.num_neurons,
            rate=self.bias_rate,
            data_group=self.edp_group,
            tensor_group=self.top_k.group,
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "NeuronExperts":
        """Move or convert the module; the bias stays fp32, since bf16 cannot hold its small changes."""
        super()._apply(fn, recurse)
        if self.neuron_bias is not None:
            self.neuron_bias = self.neuron_bias.float()
        return self

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, ShardedTensor]:
        """Experts split over expert-parallel ranks on their first axis, neurons over expert-tensor ranks on theirs."""
        axes = len(sharded_offsets)
        tensors: list[tuple[str, torch.Tensor, int]] = [
            ("gate_up_weight", self.gate_up_weight, 2),
            ("down_weight", self.down_weight, 1),
        ]
        if self.neuron_bias is not None:
            tensors.append(("neuron_bias", self.neuron_bias, 1))
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
            for name, weight, axis in tensors
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
