"""A Mixture of Experts made of a dense model: Sparse Upcycling, arXiv 2212.05055.

    check_upcycles(model, dense_model, splits=2)                     # ValueError if the outputs would not be equal
    source = UpcycledWeights(weights_of_dense_model, model, splits=2, seed=1234)

With `activation_ratio=1` and no noise, the new model computes the same as the dense one, to rounding.
"""

import functools

import torch

from mone_model.config import ModelConfig
from mone_model.weight_sources import NEURON_BIAS, RandomWeights, Wanted, WeightSource, draw

GATE_UP, DOWN = "decoder.layers.mlp.experts.gate_up_weight", "decoder.layers.mlp.experts.down_weight"
ROUTER, EXPERT_BIAS = "decoder.layers.mlp.router.weight", "decoder.layers.mlp.router.expert_bias"


class UpcycledWeights:
    """The weights of experts that are copies of a dense model's MLP; all other weights are those of the dense model.

    dense: gives the weights of a model of one expert. splits: a copy is split into this many narrower experts, which have
    consecutive numbers and the same row of the router, so that a token chooses all of them or none (virtual groups, arXiv
    2410.07524). noise: standard deviation of the noise that is added to each matrix of an expert, as a fraction of the
    standard deviation of that matrix in the dense model.

    The chosen experts' weights add up to w, and those of one copy are equal. So that the outputs add up to that of the dense
    MLP, down projections are multiplied by splits / w. The router's rows are random.
    """

    def __init__(
        self,
        dense: WeightSource,
        model: ModelConfig,
        *,
        splits: int = 1,
        noise: float = 0.0,
        seed: int,
        device: torch.device | None = None,
    ) -> None:
        self.dense, self.splits, self.noise, self.seed = dense, splits, noise, seed
        self.random = RandomWeights(model, seed=seed, device=device)
        self.neurons = model.moe_ffn_hidden_size
        self.down_scale = splits / (model.router_scaling_factor or 1.0)
        # A rank asks for the experts of a layer in turn: these are of its few latest matrices.
        self._std = functools.lru_cache(maxsize=8)(self._std_of)

    def read(self, wanted: Wanted) -> torch.Tensor | None:
        """See `WeightSource`."""
        if wanted.key.endswith((EXPERT_BIAS, NEURON_BIAS)):
            return torch.zeros(wanted.shape)[wanted.part]
        if wanted.key == ROUTER:
            return self._router(wanted)
        if wanted.key not in (GATE_UP, DOWN):
            return self.dense.read(wanted)
        layer, expert, *half = wanted.place
        first = expert % self.splits * self.neurons
        rows, columns = wanted.part
        there = Wanted(
            wanted.key,
            (layer, 0, *half),
            (self.splits * self.neurons, wanted.shape[1]),
            (slice(first + rows.start, first + rows.stop), columns),
        )
        weight = self.dense.read(there)
        assert weight is not None, wanted
        weight = weight.float()
        if self.noise > 0:
            noise = draw(self.seed, wanted, self.random.device).to(weight.device)
            weight = weight + self.noise * self._std(there.key, there.place, there.shape) * noise
        return weight * self.down_scale if wanted.key == DOWN else weight

    def _router(self, wanted: Wanted) -> torch.Tensor:
        experts, width = wanted.shape
        rows, columns = wanted.part
        copies = experts // self.splits
        row_of_copy = self.random.read(Wanted(wanted.key, wanted.place, (copies, width), (slice(0, copies), columns)))
        assert row_of_copy is not None
        return row_of_copy.repeat_interleave(self.splits, dim=0)[rows]

    def _std_of(self, key: str, place: tuple[int, ...], shape: tuple[int, ...]) -> float:
        """Standard deviation of a whole matrix of the dense model."""
        whole = self.dense.read(Wanted(key, place, shape, tuple(slice(0, size) for size in shape)))
        assert whole is not None, key
        return float(whole.float().std())


def check_upcycles(model: ModelConfig, dense: ModelConfig, *, splits: int) -> None:
    """ValueError unless experts made of a dense model's MLP can compute the same as it at activation_ratio=1."""
    problems = []
    if dense.num_experts != 1:
        problems.append(f"init.upcycle=true: needs a dense source; this one has {dense.num_experts} experts")
    if model.moe_ffn_hidden_size * splits != dense.moe_ffn_hidden_size:
        problems.append(
            f"model.moe_ffn_hidden_size={model.moe_ffn_hidden_size}: times init.upcycle_splits={splits} must be "
            f"the source's {dense.moe_ffn_hidden_size}"
        )
    for name in ("num_experts", "router_topk"):
        if getattr(model, name) % splits:
            problems.append(f"model.{name}={getattr(model, name)}: must be a multiple of init.upcycle_splits={splits}")
    if model.shared_expert_ffn_hidden_size:
        problems.append(
            f"model.shared_expert_ffn_hidden_size={model.shared_expert_ffn_hidden_size}: must be 0; the source has no "
            "weights for a shared expert"
        )
    if model.router_score_function == "softmax" and model.router_pre_softmax:
        problems.append("model.router_pre_softmax=true: must be false, or the chosen experts' weights do not add up to 1")
    if model.router_score_function == "sigmoid" and model.router_topk == 1:
        problems.append("model.router_topk=1: must be at least 2 with sigmoid, or the routing weight is not 1")
    if problems:
        raise ValueError("; ".join(problems))
