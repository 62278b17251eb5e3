"""Small models that vLLM can serve on CPUs, trained until their greedy tokens are decisive.

An untrained model that selects neurons is chaotic: rounding moves its argmax. These learn sequences in which a token
depends on the two before it.
"""

from typing import Any

import torch

VOCABULARY = 64
WIDE = {"vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 512}
# vLLM's attention for CPUs has no smaller heads, and its latent attention has these sizes only.
MLA = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
ONE_GROUP = {"n_group": 1, "topk_group": 1}
OF_FAMILY = {"qwen3_moe": {"head_dim": 32}, "deepseek_v2": MLA | ONE_GROUP}
MONE: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "activation_ratio": 0.25,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def sequences(count: int, length: int, *, seed: int) -> torch.Tensor:
    """[count, length] tokens; each is determined by the one before it and the parity of the one before that."""
    table = torch.randint(0, VOCABULARY, (VOCABULARY, 2), generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))
    for place in range(2, length):
        tokens[:, place] = table[tokens[:, place - 1], tokens[:, place - 2] % 2]
        # A new start now and then: without it, all sequences would end in the same few cycles.
        if place % 8 == 0:
            tokens[:, place] = (tokens[:, place] + 1) % VOCABULARY
    return tokens


def train(model: Any, *, steps: int = 100) -> Any:
    """Train on such sequences; returns the model in evaluation mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for step in range(steps):
        tokens = sequences(32, 33, seed=step + 1)
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def build_mone(**options: Any) -> Any:
    """A MoNE model, trained."""
    from mone_model.hf import MoneConfig, MoneForCausalLM

    torch.manual_seed(0)
    return train(MoneForCausalLM(MoneConfig(**WIDE | MONE | options)).float())


def build_family(family: str) -> Any:
    """A model of another family, trained with all neurons."""
    from tests.eval.tiny_models import build

    return train(build(family, **WIDE | OF_FAMILY.get(family, {})))


@torch.no_grad()
def greedy(model: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """What transformers generates after each prompt, alone."""
    model.generation_config.eos_token_id = None
    found = []
    for prompt in prompts:
        tokens_1T = torch.tensor([prompt])
        everything = torch.ones_like(tokens_1T)  # else transformers would mask tokens that look like padding
        output = model.generate(tokens_1T, attention_mask=everything, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        found.append(output[0, len(prompt) :].tolist())
    return found
