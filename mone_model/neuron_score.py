"""Scores by which a token chooses the neurons of an expert, `model.neuron_score`. The values of neurons do not depend on it.

    score_NH = score_neurons("abs_gate_up", gate_NH=z_NH, active_NH=act(z_NH), up_NH=up_NH)
    kept = select_best(score_NH, k)                           # mone_model.neuron_selection

abs_gate            |act(z)|, the paper's score, with z = W_gate x
gate                act(z), signed
abs_gate_up         |act(z) * (W_up x)|, the size of the neuron's hidden activation
preactivation       |z|
random              a new random number for each token and neuron
random_in_training  the same in training; otherwise all neurons are kept, with their outputs times K / H, as in dropout
frozen              |R x| with a fixed random matrix R for each expert, the same in all layers

Only `abs_gate` has kernels; torch's operations compute the others. They are controls for experiments.

Shapes: N rows, H neurons of an expert, D width, E experts.
"""

import math
from collections.abc import Iterable

import torch

FROZEN_SEED = 251005781


def score_neurons(
    name: str,
    *,
    gate_NH: torch.Tensor,
    active_NH: torch.Tensor,
    up_NH: torch.Tensor,
    frozen_NH: torch.Tensor | None = None,
) -> torch.Tensor:
    """[N, H] scores in fp32, without a gradient. NaN becomes infinity, so that exactly K are kept.

    gate_NH: before the activation. active_NH: after it. frozen_NH: x times the rows of `frozen_projection`.
    """
    with torch.no_grad():
        if name == "abs_gate":
            score_NH = active_NH.float().abs()
        elif name == "gate":
            score_NH = active_NH.float()
        elif name == "abs_gate_up":
            score_NH = (active_NH.float() * up_NH.float()).abs()
        elif name == "preactivation":
            score_NH = gate_NH.float().abs()
        elif name == "frozen":
            assert frozen_NH is not None
            score_NH = frozen_NH.float().abs()
        else:
            assert name in ("random", "random_in_training"), name
            score_NH = torch.rand(active_NH.shape, device=active_NH.device)
        return score_NH.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)


def frozen_projection(experts: Iterable[int], neurons: int, width: int) -> torch.Tensor:
    """[E, H, D] the matrices R of these experts, by their numbers in the whole model; the same on every layout."""
    return torch.stack(
        [
            torch.randn(neurons, width, generator=torch.Generator().manual_seed(FROZEN_SEED + expert)) / math.sqrt(width)
            for expert in experts
        ]
    )
