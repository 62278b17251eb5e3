"""Where the first weights of a model come from: one interface for random numbers, imported models and upcycling.

    source = RandomWeights(model, seed=1234)
    source.read(Wanted("decoder.layers.mlp.experts.down_weight", (0, 3), (512, 256), (slice(0, 256), slice(0, 256))))

`mone_model.megatron.initial_weights` asks a source for each matrix and vector that a rank holds. `mone_model.hf.sources`
reads Hugging Face folders and our checkpoints, `mone_model.upcycling` makes experts of dense models.
"""

import hashlib
import math
from typing import NamedTuple, Protocol

import torch

from mone_model.config import ModelConfig

NEURON_BIAS = "experts.neuron_bias"
INTO_THE_RESIDUAL_STREAM = ("linear_proj.weight", "linear_fc2.weight", "experts.down_weight")


class Wanted(NamedTuple):
    """A part of one matrix or vector of the model."""

    key: str
    """Its name in our checkpoints."""
    place: tuple[int, ...]
    """Its position in the stack of that name: layer, expert, and 0 for gates or 1 for ups, as far as they apply."""
    shape: tuple[int, ...]
    """Shape of the whole: [rows, columns], or [length]."""
    part: tuple[slice, ...]
    """The part: a slice with start and stop for each axis."""


class WeightSource(Protocol):
    """Gives weights by name and place, so that they do not depend on the layout."""

    def read(self, wanted: Wanted) -> torch.Tensor | None:
        """The numbers of that part, of any floating-point type and on any device; None: keep what the module starts with."""
        ...


def draw(seed: int, wanted: Wanted, device: torch.device) -> torch.Tensor:
    """The part, from a standard normal distribution; each matrix has a random stream of its own."""
    place = list(wanted.place)
    digest = hashlib.sha256(f"{seed}/{wanted.key}/{place}".encode()).digest()
    generator = torch.Generator(device=device).manual_seed(int.from_bytes(digest[:7]))
    return torch.randn(wanted.shape, generator=generator, device=device)[wanted.part]


class RandomWeights:
    """Initial weights of a new model.

    Matrices are normal with standard deviation init_std, and init_std / sqrt(2 num_layers) for projections into the residual
    stream (GPT-2). Norms keep 1, and biases 0, with which their modules start.
    """

    def __init__(self, model: ModelConfig, *, seed: int, device: torch.device | None = None) -> None:
        self.model, self.seed, self.device = model, seed, device or torch.device("cpu")

    def read(self, wanted: Wanted) -> torch.Tensor | None:
        """See `WeightSource`."""
        if len(wanted.shape) < 2 or wanted.key.endswith(NEURON_BIAS):
            return None
        std = self.model.init_std
        if wanted.key.endswith(INTO_THE_RESIDUAL_STREAM):
            std /= math.sqrt(2 * self.model.num_layers)
        return draw(self.seed, wanted, self.device) * std
