"""The model in transformers: load, generate, look into it, export it.

    from mone_model.hf import load, record_neurons

    model, tokenizer = load("runs/demo")          # a run, a checkpoint or an exported folder
    with record_neurons(model) as record:
        model.generate(**tokenizer("The city of", return_tensors="pt"), max_new_tokens=20)

Importing this package registers the classes with transformers' Auto classes, so that an exported folder loads without
`trust_remote_code`, and the experts implementation `mone`.
"""

from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from mone_model.hf.configuration_mone import MoneConfig
from mone_model.hf.experts import keep_neurons
from mone_model.hf.modeling_mone import MoneForCausalLM, MoneModel
from mone_model.hf.recording import LayerRecord, record_neurons

AutoConfig.register("mone", MoneConfig, exist_ok=True)
AutoModel.register(MoneConfig, MoneModel, exist_ok=True)
AutoModelForCausalLM.register(MoneConfig, MoneForCausalLM, exist_ok=True)

if TYPE_CHECKING:
    from mone_model.hf.loading import load


def __getattr__(name: str) -> Any:
    # Only when it is used: reading checkpoints needs packages that the plugin's process does not have.
    if name == "load":
        from mone_model.hf.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["LayerRecord", "MoneConfig", "MoneForCausalLM", "MoneModel", "keep_neurons", "load", "record_neurons"]
