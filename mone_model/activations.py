"""Gate activations: function, gradient and number in the CPU kernels, one row each.

    ACTIVATIONS["silu"].function(x)               # silu(x)
    ACTIVATIONS["silu"].gradient(gradient, x)     # gradient * silu'(x)

To add one, write a row here, its name in `mone_model.config.ACTIVATIONS`, and its formula in the kernels:
`kernels/cpu/csrc/vectors.h` and `kernels/triton/selection.py`. `tests/unit/test_neuron_selection.py` checks all of them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Activation(NamedTuple):
    """An elementwise gate activation."""

    function: Callable[[torch.Tensor], torch.Tensor]
    """act(x)."""
    gradient: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """(gradient of act(x), x) -> gradient of x; for operators, which autograd cannot look into."""
    kernel_id: int
    """Its number in `dispatch` of `kernels/cpu/csrc/vectors.h`."""


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    """ReLU(x)^2, elementwise; Primer, arXiv 2109.08668."""
    return F.relu(x).square()


ACTIVATIONS = {
    "silu": Activation(F.silu, lambda gradient, x: torch.ops.aten.silu_backward(gradient, x), 0),
    "gelu": Activation(F.gelu, lambda gradient, x: torch.ops.aten.gelu_backward(gradient, x), 1),
    "relu": Activation(F.relu, lambda gradient, x: torch.ops.aten.threshold_backward(gradient, x, 0), 2),
    "sigmoid": Activation(torch.sigmoid, lambda gradient, x: torch.ops.aten.sigmoid_backward(gradient, x.sigmoid()), 3),
    "relu_squared": Activation(relu_squared, lambda gradient, x: 2 * gradient * x.relu(), 4),
}
