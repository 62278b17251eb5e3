"""Let a trained model continue texts.

    mone-sample run=runs/demo 'prompts=["The capital of France", "In the beginning"]'

One process, whatever layout the run had; the newest checkpoint, unless `step` names another.
"""

import io
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from data_prep.tokenizer import Tokenizer
from mone_common.console import UserError, command, to_dataclass
from mone_common.run_folder import CONFIG_FILE, read_file
from train.config import RunConfig
from train.launcher import check_alone
from train.run_tokenizer import find_tokenizer

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


@dataclass
class SampleConfig:
    """What to continue, and how."""

    run: str = MISSING
    """Folder of the run."""
    step: int | None = None
    """Checkpoint to take; null: the newest."""
    prompts: list[str] = field(
        default_factory=lambda: ["The city of", "In the beginning", "The population of", "Mix the flour"]
    )
    """Texts to continue."""
    max_new_tokens: int = 48
    """Tokens to add to each; a continuation ends earlier at the end of a document."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 40
    """Choose among this many likeliest tokens; 0: among all."""
    seed: int = 0
    """Of the choice."""
    thresholds: str | None = None
    """File that train.calibrate wrote: keep the neurons that reach its thresholds; null: the K best of each token."""
    trust: bool = False
    """Load a checkpoint even if it brings pickled code along, which loading then executes."""

    def __post_init__(self) -> None:
        for name, right, does in (
            ("prompts", bool(self.prompts) and all(self.prompts), "must be a list of texts, none of them empty"),
            ("max_new_tokens", self.max_new_tokens >= 1, "must be at least 1"),
            # Beyond, logits divided by it would not be finite, or all alike.
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
            raise UserError(f"prompts={prompt!r}: the tokenizer of the run makes no token of it")
    generator = torch.Generator().manual_seed(options.seed)
    thresholds_L = load_thresholds(Path(options.thresholds), run) if options.thresholds is not None else None
    from mone_model.megatron.inference import prepare_inference
    from train.runtime import distributed

    with distributed(run.parallel, seed=run.run.seed, timeout_minutes=run.run.timeout_minutes):
        model = load_model(run, Path(options.run) / "checkpoints", options.step, trust=options.trust)
        prepare_inference(model, thresholds_L)
        for prompt in options.prompts:
            text = continue_text(model, tokenizer, prompt, options, generator)
            print(f"{prompt} ...{text}\n", flush=True)


def load_thresholds(path: Path, config: RunConfig) -> list[float]:
    """What `train.calibrate` wrote for this model; UserError for anything else."""
    try:
        thresholds_L = json.loads(read_file(path) or b"")["thresholds"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"thresholds={path}: no such file of mone-calibrate ({error})") from error
    if len(thresholds_L) != config.model.num_layers:
        raise UserError(f"thresholds={path}: has {len(thresholds_L)} layers, the run's model {config.model.num_layers}")
    return thresholds_L


def load_run_config(folder: Path) -> RunConfig:
    """The configuration that a run noted in its folder, laid out for one process; UserError if there is none.

    The folder may have been moved since.
    """
    path = folder / CONFIG_FILE
    try:
        text = read_file(path)
        if text is None:
            raise UserError(f"run={folder}: no {CONFIG_FILE} there; give the folder of a run, e.g. run=runs/demo")
        noted = OmegaConf.load(io.StringIO(text.decode()))
        if not noted:
            raise ValueError("it holds no options")
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), noted))
        assert isinstance(config, RunConfig)
    except UserError:
        raise
    except (ValueError, TypeError, RecursionError, YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"run={folder}: {path} is damaged, or of another version ({reason})") from error
    config.parallel = type(config.parallel)()
    cache = Path(config.data.index_cache)
    if cache.is_relative_to(config.run.dir):
        config.data.index_cache = str(folder / cache.relative_to(config.run.dir))
    config.run.dir = str(folder)
    return config


def load_model(config: RunConfig, checkpoints: Path, step: int | None, *, trust: bool) -> "GPTModel":
    """The whole model on this one process with the weights of a checkpoint; UserError if there is no such."""
    from mone_common.run_folder import read_published
    from mone_model.megatron.gpt import build_gpt
    from train.checkpoint_integrity import list_checkpoints, load_newest

    found, problems = list_checkpoints(checkpoints, run=read_published(checkpoints.parent).get("run"))
    asked = [checkpoint for checkpoint in found if step in (None, checkpoint.step)]
    if not asked:
        steps = [checkpoint.step for checkpoint in found]
        also = "".join(f"; {problem}" for problem in problems)
        raise UserError(f"step={step}: {checkpoints} holds checkpoints of steps {steps or 'none'}{also}")
    model = build_gpt(config.model, config.parallel, config.compute, seed=config.run.seed)
    checkpoint, loaded, more = load_newest(asked, lambda: {"model0": model.sharded_state_dict()}, trust=trust, whole=False)
    problems += [problem.replace("checkpoint.trust", "trust") for problem in more]
    if checkpoint is None:
        raise UserError("; ".join(problems))
    for problem in problems:
        print(f"passed over {problem}", file=sys.stderr, flush=True)
    model.load_state_dict(loaded["model0"])
    return model.eval()


@torch.no_grad()
def continue_text(
    model: "GPTModel", tokenizer: Tokenizer, prompt: str, options: SampleConfig, generator: torch.Generator
) -> str:
    """What the model writes after `prompt`."""
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
            unread = tokens[-(window + 1) // 2 :]  # the older half is forgotten
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
    # Decoded as a whole: a continuation on its own would lose the space it begins with.
    return tokenizer.decode(tokens)[len(tokenizer.decode(tokens[:start])) :]


if __name__ == "__main__":
    main()
