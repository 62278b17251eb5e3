"""The tensors of a Hugging Face model, made one after the other from a checkpoint.

conversion = Conversion(CheckpointWeights(checkpoint), model, "mone")     # UserError unless every tensor is accounted for
for tensor in conversion.tensors:
conversion.read(tensor)          # one layer's largest tensor is in memory beside the result
"""

import torch

from mone_common.console import UserError
from mone_model.config import ModelConfig
from mone_model.hf.checkpoint import CheckpointWeights
from mone_model.hf.weight_map import LAYERS, NAMES, Tensor, tensors_of, weight_map


class Conversion:
    """How the tensors of a format are made from the weights of a checkpoint."""

    def __init__(self, weights: CheckpointWeights, model: ModelConfig, format: str) -> None:
        self._weights = weights
        check_complete(weights, model)
        self.tensors = list(tensors_of(weight_map(model, NAMES[format])))
        """All tensors of the format, in the order of the layers."""
        if format == "glm4_moe" and not model.expert_bias:  # its class always has a bias
            name = NAMES[format].expert_bias
            for layer in range(model.num_layers):
                self.tensors.append(Tensor(f"model.layers.{layer}.{name}", (model.num_experts,), ()))
        self._held: tuple[tuple[str, int | None], torch.Tensor] | None = None

    def dtype(self, tensor: Tensor) -> torch.dtype:
        """The data type of the weights that a tensor is made of."""
        return self._weights.dtype(tensor.pieces[0].weight.key) if tensor.pieces else torch.float32

    def read(self, tensor: Tensor) -> torch.Tensor:
        """A tensor of the format, contiguous, in the data type of the checkpoint."""
        out = torch.empty(tensor.shape, dtype=self.dtype(tensor))
        self.read_into(tensor, out)
        return out

    def read_into(self, tensor: Tensor, out: torch.Tensor) -> None:
        """Write a tensor of the format to `out`, which has its shape, in the data type of `out`."""
        if not tensor.pieces:
            out.zero_()
        # The pieces cover the tensor (`weight_map.tensors_of`).
        for weight, start, part in tensor.pieces:
            layered = weight.key.startswith(LAYERS)
            whole = self._read(weight.key, weight.place[0] if layered else None)
            rows = whole[weight.place[1:] if layered else ()][start : start + part.rows]
            there = out[part.at]
            if part.transposed:
                there[:, part.first : part.first + part.rows] = rows.T
            else:
                there[part.first : part.first + part.rows] = rows

    def _read(self, key: str, layer: int | None) -> torch.Tensor:
        # The queries, keys and values of a layer, and all its experts, come from the same tensor.
        if self._held is None or self._held[0] != (key, layer):
            self._held = None  # frees the memory before the next is read
            self._held = ((key, layer), self._weights.read(key, layer))
        return self._held[1]


def check_complete(weights: CheckpointWeights, model: ModelConfig) -> None:
    """UserError unless the checkpoint has exactly the weights of the model, by name and shape."""
    expected: dict[str, tuple[int, ...]] = {}
    for weight in weight_map(model, NAMES["mone"]):
        # The last place of a stack is the largest one.
        expected[weight.key] = (*(at + 1 for at in weight.place), *weight.shape)
    found = weights.shapes
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is not a weight of the model" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} has shape {[*found[name]]}, not {[*shape]}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise UserError(f"{weights.path}: {'; '.join(sorted(problems)[:5])}")
