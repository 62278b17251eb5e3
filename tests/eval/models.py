"""Small models with random weights, and a tokenizer, as folders."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from mone_model.hf.tokenizer import write_tokenizer
from tests.hf.checkpoints import build, model_of, save

SIZES: dict[str, Any] = {
    "vocab_size": 800,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
"""Weights that are large enough for predictions to differ."""


def write_llama(folder: Path, tokenizer: Path, *, seed: int = 0, context: int = 64) -> Path:
    """A dense model."""
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**SIZES | {"max_position_embeddings": context})).save_pretrained(folder)
    write_tokenizer(tokenizer, folder, context=context)
    return folder


def write_mixtral(folder: Path, tokenizer: Path) -> Path:
    """A mixture of four experts."""
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)).save_pretrained(folder)
    write_tokenizer(tokenizer, folder, context=64)
    return folder


def make_run(folder: Path, tokenizer: Path, **options: Any) -> Path:
    """A run with one checkpoint and a tokenizer; needs the groups of Megatron-Core."""
    model = model_of(vocab_size=800, seq_length=64, **options)
    save(folder, build(model), model)
    shutil.copytree(tokenizer, folder / "tokenizer")
    return folder
