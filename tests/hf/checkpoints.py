"""Models of Megatron-Core with random weights, saved as the checkpoint of a run."""

from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from mone_model.config import ComputeConfig, ModelConfig, ParallelConfig
from mone_model.megatron.gpt import build_gpt
from tests.tiny import TINY_MODEL, facts_of
from train.checkpoint import Saver
from train.config_sections import CheckpointConfig

TOKENS = torch.randint(0, 60, (3, 16), generator=torch.Generator().manual_seed(1))


def model_of(**options: Any) -> ModelConfig:
    """A tiny model whose vocabulary is padded and whose heads share keys."""
    tiny = TINY_MODEL | {"vocab_size": 60, "num_attention_heads": 4, "num_query_groups": 2, "activation_ratio": 1.0}
    return ModelConfig(**tiny | options)


def build(model: ModelConfig, **compute: Any) -> GPTModel:
    """The model with weights that are large enough for differences to show, norms and biases included."""
    gpt = build_gpt(model, ParallelConfig(), ComputeConfig(**{"experts": "loop"} | compute), seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in gpt.parameters():
            mean, std = (0.0, 0.15) if weight.dim() > 1 else (1.0, 0.2)
            weight.copy_(torch.randn(weight.shape, generator=generator) * std + mean)
        for name, buffer in gpt.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
            elif name.endswith("neuron_bias"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) * 0.2)
    return gpt


def save(run: Path, gpt: GPTModel, model: ModelConfig, *, step: int = 1) -> Path:
    """Save a checkpoint as a run does."""
    options = {name: getattr(model, name) for name in model.__dataclass_fields__}
    saver = Saver(run / "checkpoints", CheckpointConfig())
    saver.save(step=step, state=gpt.sharded_state_dict(), facts=facts_of(step, model=options))
    saved = saver.finish(wait=True)
    assert saved is not None
    return saved.path


@torch.no_grad()
def logits_of(gpt: GPTModel, model: ModelConfig, tokens_BS: torch.Tensor = TOKENS) -> torch.Tensor:
    """[B, s, V] without padding, fp32."""
    positions_BS = torch.arange(tokens_BS.size(1))[None].expand(len(tokens_BS), -1)
    logits: torch.Tensor = gpt(tokens_BS, positions_BS, None, runtime_gather_output=True)[..., : model.vocab_size]
    return logits.float()
