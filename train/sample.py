"""Generate text with a trained model.

    mone-sample run=runs/demo 'prompts=["The capital of France", "In the beginning"]'

The command runs in one process, for runs of any layout. It loads the newest checkpoint, unless `step` is given.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from data_prep.tokenizer import Tokenizer
from mone_common.console import UserError, command, to_dataclass
from mone_model import megatron
from train.launcher import check_alone
from train.run_tokenizer import find_tokenizer
from train.trained_model import load_model, load_run_config, load_thresholds, one_process

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


@dataclass
class SampleConfig:
    """Options of mone-sample."""

    run: str = MISSING
    """Folder of the run."""
    step: int | None = None
    """Step of the checkpoint to load; null: the newest."""
    prompts: list[str] = field(
        default_factory=lambda: ["The city of", "In the beginning", "The population of", "Mix the flour"]
    )
    """Texts to continue."""
    max_new_tokens: int = 48
    """Maximum number of tokens per continuation; an end-of-document token ends it earlier."""
    temperature: float = 0.8
    """Sampling temperature, which divides the logits; 0: always choose the most probable token."""
    top_k: int = 40
    """Sample from this many most probable tokens; 0: from all."""
    seed: int = 0
    """Seed of the sampling."""
    thresholds: str | None = None
    """Output file of mone-calibrate: keep the neurons that reach its thresholds; null: keep the K best of each token."""
    trust: bool = False
    """Also load checkpoints that contain pickled code. Loading executes that code: use only with trusted checkpoints."""

    def __post_init__(self) -> None:
        for name, right, does in (
            ("prompts", bool(self.prompts) and all(self.prompts), "must be a list of texts, none of them empty"),
            ("max_new_tokens", self.max_new_tokens >= 1, "must be at least 1"),
            # Outside this range, the scaled logits would not be finite, or would all be equal.
            ("temperature", self.temperature == 0 or 1e-6 <= self.temperature <= 1e6, "must be 0, or from 1e-6 to 1e6"),
            ("top_k", self.top_k >= 0, "must be at least 1, or 0 for all tokens"),
            ("seed", 0 <= self.seed < 2**63, "must be at least 0 and below 2^63"),
        ):
            if not right:
                raise UserError(f"{name}={getattr(self, name)}: {does}")


ConfigStore.instance().store(name="sample_schema", node=SampleConfig)


@command("sample")
def main(hydra_config: DictConfig) -> None:
    """Print a continuation of each prompt."""
    check_alone("train.sample")
    options = to_dataclass(hydra_config, SampleConfig)
    run = load_run_config(Path(options.run))
    tokenizer = find_tokenizer(Path(options.run), run)
    for prompt, tokens in zip(options.prompts, tokenizer.encode(options.prompts), strict=True):
        if not tokens:
            raise UserError(f"prompts={prompt!r}: the tokenizer of the run encodes it as no tokens")
    generator = torch.Generator().manual_seed(options.seed)
    thresholds_L = load_thresholds(Path(options.thresholds), run) if options.thresholds is not None else None
    megatron.prepare()
    from mone_model.megatron.inference import prepare_inference

    with one_process(run):
        model = load_model(run, step=options.step, trust=options.trust)
        prepare_inference(model, thresholds_L)
        for prompt in options.prompts:
            text = continue_text(model, tokenizer, prompt, options, generator)
            print(f"{prompt} ...{text}\n", flush=True)


@torch.no_grad()
def continue_text(
    model: "GPTModel", tokenizer: Tokenizer, prompt: str, options: SampleConfig, generator: torch.Generator
) -> str:
    """The model's continuation of `prompt`."""
    from megatron.core.inference.contexts import StaticInferenceContext

    device = next(model.parameters()).device
    tokens: list[int] = tokenizer.encode([prompt])[0]
    start = len(tokens)
    window = model.max_sequence_length
    cache = StaticInferenceContext(max_batch_size=1, max_sequence_length=window)
    unread = tokens[-window:]
    while len(tokens) - start < options.max_new_tokens:
        if cache.sequence_len_offset + len(unread) > window:
            cache.reset()
            unread = tokens[-(window + 1) // 2 :]  # drop the older half of the context
        tokens_BS = torch.tensor([unread], device=device)
        positions_BS = cache.sequence_len_offset + torch.arange(len(unread), device=device)[None]
        logits_BSV = model(tokens_BS, positions_BS, None, inference_context=cache, runtime_gather_output=True)
        cache.sequence_len_offset += len(unread)
        logits_V = logits_BSV[0, -1, : tokenizer.vocab_size].float().cpu()
        if options.temperature == 0:
            token = int(logits_V.argmax())
        else:
            if options.top_k > 0:
                weakest = logits_V.topk(min(options.top_k, len(logits_V))).values[-1]
                logits_V[logits_V < weakest] = float("-inf")
            token = int(torch.multinomial((logits_V / options.temperature).softmax(-1), 1, generator=generator))
        if token == tokenizer.eod_id:
            break
        tokens.append(token)
        unread = [token]
    # Decode the whole text: a separately decoded continuation would lose its leading space.
    return tokenizer.decode(tokens)[len(tokenizer.decode(tokens[:start])) :]


if __name__ == "__main__":
    main()
