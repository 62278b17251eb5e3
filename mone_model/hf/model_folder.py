"""A Hugging Face folder that our model can express: its model, and each of its tensors accounted for.

folder = ModelFolder(Path("models/qwen"))        # UserError names fields or tensors that do not fit
folder.model, folder.format                      # ModelConfig, "qwen3_moe"
folder.table(folder.model)                       # where each of our weights is (`weight_map`)
"""

import dataclasses
from pathlib import Path

from mone_common.console import UserError
from mone_model.config import ModelConfig
from mone_model.hf.families import UnknownModel, read_family
from mone_model.hf.safetensors_folder import BYTES, SafetensorsFolder, read_config
from mone_model.hf.weight_map import NAMES, Names, Weight, tensors_of, weight_map

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
COMPUTED = "rotary_emb.inv_freq"
"""End of names of tensors that earlier versions of transformers saved, and that follow from the configuration."""


class ModelFolder:
    """config.json and safetensors files of a model of a known family."""

    def __init__(self, path: Path) -> None:
        self.path = path
        config = read_config(path)
        try:
            family, self.model = read_family(config)
        except UnknownModel as error:
            raise UserError(f"{path / 'config.json'}: {error}") from error
        self.format: str = config["model_type"]
        self.stored = SafetensorsFolder(path)
        self.names = max((NAMES[name] for name in family.names), key=self._matches)
        self._check_tensors()

    def table(self, model: ModelConfig) -> dict[tuple[str, tuple[int, ...]], Weight]:
        """The weight map by key and place, with the padding of `model`'s vocabulary."""
        padded = dataclasses.replace(self.model, vocab_multiple=model.vocab_multiple)
        return {(weight.key, weight.place): weight for weight in weight_map(padded, self.names)}

    def _matches(self, names: Names) -> int:
        """How many tensors of the first layer have these names."""
        layer = weight_map(dataclasses.replace(self.model, num_layers=1), names)
        return sum(tensor.name in self.stored.tensors for tensor in tensors_of(layer))

    def _check_tensors(self) -> None:
        expected = {tensor.name: tensor.shape for tensor in tensors_of(weight_map(self.model, self.names))}
        stored = {name: tensor for name, tensor in self.stored.tensors.items() if not name.endswith(COMPUTED)}
        if self.model.tie_embeddings and {OUTPUT, EMBEDDING} <= stored.keys():
            if not self.stored.equal(OUTPUT, EMBEDDING):
                raise UserError(f"{self.path}: {OUTPUT} differs from {EMBEDDING}, but tie_word_embeddings=true")
            del stored[OUTPUT]
        missing = [name for name in expected if name not in stored]
        unexpected = [name for name in stored if name not in expected]
        problems = [f"{what} {_some(names)}" for what, names in (("lacks", missing), ("also has", unexpected)) if names]
        for name in expected.keys() & stored.keys():
            if stored[name].shape != expected[name]:
                problems.append(f"{name} has shape {[*stored[name].shape]}, not {[*expected[name]]}")
            elif stored[name].dtype not in BYTES:
                problems.append(f"{name} has type {stored[name].dtype}; choose from {', '.join(BYTES)}")
        if problems:
            more = f" (and {len(problems) - 3} more problems)" if len(problems) > 3 else ""
            raise UserError(f"{self.path}: its tensors do not fit its config.json: {'; '.join(problems[:3])}{more}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
