"""Build the model of one pipeline stage.

model = build_gpt(ModelConfig(...), ParallelConfig(expert=2), ComputeConfig(), seed=1)   # after process groups
logits_or_loss = model(tokens_BS, position_ids_BS, None, labels=labels_BS)
"""

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer

from mone_model.config import ComputeConfig, ModelConfig, ParallelConfig
from mone_model.expert_backends import choose_backend
from mone_model.megatron import cpu_support
from mone_model.megatron.experts import NeuronExperts
from mone_model.megatron.initial_weights import fill_weights
from mone_model.megatron.layer_spec import block_spec
from mone_model.megatron.router import Router
from mone_model.megatron.transformer_config import transformer_config
from mone_model.weight_sources import RandomWeights, WeightSource


def build_gpt(
    model: ModelConfig,
    parallel: ParallelConfig,
    compute: ComputeConfig,
    *,
    seed: int,
    weights: WeightSource | None = None,
    vp_stage: int | None = None,
    meta: bool = False,
) -> GPTModel:
    """Build the GPTModel of this rank's pipeline stage (and virtual stage), in compute.dtype.

    seed: of random initial weights, which are the same on every layout.
    weights: gives the initial weights instead, such as those of an imported model.
    meta: build on the meta device, without memory, to count parameters.
    """
    config = transformer_config(model, parallel, compute)
    backend = "grouped" if meta else choose_backend(model, parallel, compute)
    with _on_meta_device() if meta else contextlib.nullcontext():
        gpt = GPTModel(
            config=config,
            transformer_layer_spec=block_spec(model, compute, config, backend=backend, vp_stage=vp_stage),
            vocab_size=model.padded_vocab_size,
            max_sequence_length=model.seq_length,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=model.rotary_base,
            vp_stage=vp_stage,
        )
    if gpt.post_process and model.vocab_size is not None and model.vocab_size < model.padded_vocab_size:
        gpt.output_layer.register_forward_hook(functools.partial(_mask_padding, model.vocab_size, model.padded_vocab_size))
    set_active_neurons([gpt], model)
    if not meta:
        device = next(gpt.parameters()).device
        fill_weights(gpt, weights or RandomWeights(model, seed=seed, device=device))
    return gpt


def _mask_padding(vocab_size: int, padded_size: int, layer: Any, inputs: Any, output: tuple[torch.Tensor, Any]) -> None:
    """Set the logits of the padding of the vocabulary to the smallest number, in place.

    Their probability is then exactly 0, and so is their gradient. Not -inf: a rank may hold only padding, and -inf minus
    its largest logit is NaN.
    """
    logits = output[0]
    width = logits.size(-1)
    first = 0 if width == padded_size else parallel_state.get_tensor_model_parallel_rank() * width
    tokens = max(0, vocab_size - first)
    if tokens < width:
        # Outside autograd, which would copy the gradient of all logits.
        logits.detach()[..., tokens:] = torch.finfo(logits.dtype).min


@contextlib.contextmanager
def _on_meta_device() -> Iterator[None]:
    device = torch.device("meta")
    # Megatron-Core's layers call torch.cuda.current_device and ignore the default device.
    with device, mock.patch.object(cpu_support.cuda(), "current_device", return_value=device):
        yield


def set_active_neurons(modules: Iterable[torch.nn.Module], model: ModelConfig) -> None:
    """Let the experts of every layer keep as many neurons as the model says (`ModelConfig.at_step`)."""
    by_layer = model.active_neurons_by_layer
    for module in modules:
        for layer, experts, _ in moe_layers(module):
            experts.set_active_neurons(by_layer[layer])


def update_neuron_biases(modules: Iterable[torch.nn.Module], *, applied: bool) -> None:
    """After each step: `NeuronExperts.update_bias` of every layer; a collective on every rank."""
    for module in modules:
        for _, experts, _ in moe_layers(module):
            experts.update_bias(applied=applied)


def moe_layers(model: torch.nn.Module) -> Iterator[tuple[int, NeuronExperts, Router]]:
    """The layer index (from 0, over all stages), experts and router of each layer that this rank holds."""
    for module in model.modules():
        if isinstance(module, MoELayer) and isinstance(module.experts, NeuronExperts):
            yield module.layer_number - 1, module.experts, module.router
