"""Generate text with a trained model.

    mone-sample run=runs/demo 'prompts=["The capital of France", "In the beginning"]'
    mone-sample run=runs/demo interactive=true

The command runs in one process, for runs of any layout and for folders of mone-export. It loads the newest checkpoint,
unless `step` is given. `transformers` generates.
"""

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from mone_common.console import UserError, command, to_dataclass
from mone_common.run_folder import DamagedFile, read_file
from mone_common.threshold_file import read_thresholds
from train.launcher import check_alone

if TYPE_CHECKING:
    from transformers import GenerationConfig

logger = logging.getLogger(__name__)


@dataclass
class SampleConfig:
    """Options of mone-sample."""

    run: str = MISSING
    """Folder of the run, of one of its checkpoints, or of an exported model."""
    step: int | None = None
    """Step of the checkpoint to load; null: the newest."""
    prompts: list[str] = field(
        default_factory=lambda: ["The city of", "In the beginning", "The population of", "Mix the flour"]
    )
    """Texts to continue."""
    file: str | None = None
    """Text file with a prompt on each line, in place of `prompts`."""
    interactive: bool = False
    """Read prompts from the terminal, one line each, until end of file (Ctrl-D)."""
    max_new_tokens: int = 48
    """Maximum number of tokens per continuation; an end-of-document token ends it earlier."""
    temperature: float = 0.8
    """Sampling temperature, which divides the logits; 0: always choose the most probable token."""
    top_k: int = 40
    """Sample from this many most probable tokens; 0: from all."""
    top_p: float = 1.0
    """Sample from the fewest most probable tokens whose probabilities add up to this; 1: from all."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that occurred before (arXiv 1909.05858); 1: off."""
    seed: int = 0
    """Seed of the sampling."""
    batch_size: int = 8
    """Number of prompts that are continued at the same time."""
    stream: bool = False
    """Print each token when it is chosen; continues one prompt at a time."""
    thresholds: str | None = None
    """Output file of mone-calibrate or mone-sparsify: keep the neurons that reach its thresholds; null: keep the K best of
    each token."""
    ratio: float | None = None
    """Share of an expert's neurons to keep; null: that of the model. With thresholds: which of those in the file."""
    trust: bool = False
    """Also load checkpoints that contain pickled code. Loading executes that code: use only with trusted checkpoints."""

    def __post_init__(self) -> None:
        for name, right, does in (
            ("prompts", bool(self.prompts) and all(self.prompts), "must be a list of texts, none of them empty"),
            ("max_new_tokens", self.max_new_tokens >= 1, "must be at least 1"),
            # Outside this range, the scaled logits would not be finite, or would all be equal.
            ("temperature", self.temperature == 0 or 1e-6 <= self.temperature <= 1e6, "must be 0, or from 1e-6 to 1e6"),
            ("top_k", self.top_k >= 0, "must be at least 1, or 0 for all tokens"),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "must be positive, 1 for none"),
            ("seed", 0 <= self.seed < 2**63, "must be at least 0 and below 2^63"),
            ("batch_size", self.batch_size >= 1, "must be at least 1"),
            ("ratio", self.ratio is None or 0 < self.ratio <= 1, "must be above 0 and at most 1"),
            ("interactive", not (self.interactive and self.file), "give either interactive=true or file"),
        ):
            if not right:
                raise UserError(f"{name}={getattr(self, name)}: {does}")


ConfigStore.instance().store(name="sample_schema", node=SampleConfig)


@command("sample")
def main(hydra_config: DictConfig) -> None:
    """Print a continuation of each prompt."""
    check_alone("train.sample")
    options = to_dataclass(hydra_config, SampleConfig)
    prompts = options.prompts if options.file is None else read_prompts(Path(options.file))
    import transformers

    from mone_model.hf import load

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    thresholds_L = None if options.thresholds is None else load_thresholds(Path(options.thresholds), options.ratio)
    ratio = options.ratio if thresholds_L is None else None
    try:
        model, tokenizer = load(
            options.run, step=options.step, activation_ratio=ratio, thresholds_L=thresholds_L, trust=options.trust
        )
    except UserError as error:
        raise UserError(f"run={error}") from error
    if tokenizer is None:
        raise UserError(f"run={options.run}: has no tokenizer; copy the tokenizer of its data to {options.run}/tokenizer")
    sampler = Sampler(model, tokenizer, options)
    transformers.set_seed(options.seed % 2**32)
    if options.interactive:
        for prompt in typed_prompts():
            sampler.stream(prompt)
    elif options.stream:
        for prompt in prompts:
            sampler.stream(prompt)
    else:
        # Check all prompts before the first is continued.
        for prompt in prompts:
            sampler.encode(prompt)
        for start in range(0, len(prompts), options.batch_size):
            batch = prompts[start : start + options.batch_size]
            for prompt, text in zip(batch, sampler.continue_texts(batch), strict=True):
                print(f"{prompt} ...{text}\n", flush=True)
    if sampler.tokens:
        rate = sampler.tokens / sampler.seconds
        logger.info(f"{sampler.tokens:,} tokens in {sampler.seconds:.1f} s, {rate:,.1f} tokens per second")


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty; UserError if there are none."""
    try:
        lines = (read_file(path) or b"").decode().splitlines()
    except (DamagedFile, UnicodeDecodeError) as error:
        raise UserError(f"file={path}: not a text file in UTF-8 ({error})") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"file={path}: does not exist or has no line with a prompt")
    return prompts


def typed_prompts() -> Iterator[str]:
    """Lines from the terminal, until end of file."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def load_thresholds(path: Path, ratio: float | None) -> list[float]:
    """The thresholds in an output file of mone-calibrate or mone-sparsify; UserError for any other file."""
    try:
        return read_thresholds(path, ratio=ratio)
    except DamagedFile as error:
        raise UserError(str(error)) from error


class Printer:
    """A streamer of transformers that prints a continuation token by token."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._new: list[int] = []
        self._printed = 0

    def put(self, tokens: Any) -> None:
        """Gets the prompt first, [1, s], then each token, [1]."""
        if tokens.dim() == 1:
            self._new += tokens.tolist()
            text = self._decode(self._new)
            # The bytes of a character may be several tokens.
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                print(text[self._printed :], end="", flush=True)
                self._printed = len(text)

    def end(self) -> None:
        """Print what is left, and end the line."""
        print(self._decode(self._new)[self._printed :], flush=True)


class Sampler:
    """A model that continues texts.

    The model reads at most the tokens of its context: a prompt is cut to its last tokens, so that the continuation fits
    behind it.
    """

    def __init__(self, model: Any, tokenizer: Any, options: SampleConfig) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.tokens, self.seconds = 0, 0.0
        context = model.config.max_position_embeddings
        self.new_tokens = min(options.max_new_tokens, context - 1)
        self.longest_prompt = context - self.new_tokens
        if self.new_tokens < options.max_new_tokens:
            logger.warning(
                f"max_new_tokens={options.max_new_tokens}: the model has a context of {context} tokens; "
                f"continuations end after {self.new_tokens}"
            )
        self.generation = self._generation(options)

    def _generation(self, options: SampleConfig) -> "GenerationConfig":
        from transformers import GenerationConfig

        end = self.tokenizer.eos_token_id
        sampling: dict[str, Any] = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
        return GenerationConfig(
            do_sample=options.temperature > 0,
            max_new_tokens=self.new_tokens,
            repetition_penalty=options.repetition_penalty,
            eos_token_id=end,
            pad_token_id=end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id,
            **(sampling if options.temperature > 0 else {}),
        )

    def encode(self, prompt: str) -> list[int]:
        """The last tokens of a prompt that the model can read; UserError if there are none."""
        tokens: list[int] = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if not tokens:
            raise UserError(f"prompts={prompt!r}: the tokenizer of the run encodes it as no tokens")
        return tokens[-self.longest_prompt :]

    def continue_texts(self, prompts: list[str]) -> list[str]:
        """A continuation of each prompt, all at the same time."""
        encoded = [self.encode(prompt) for prompt in prompts]
        longest = max(map(len, encoded))
        written = self._generate(
            [[self.generation.pad_token_id] * (longest - len(tokens)) + tokens for tokens in encoded],
            [[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens in encoded],
        )
        return [self._text_after(tokens, new.tolist()) for tokens, new in zip(encoded, written[:, longest:], strict=True)]

    def stream(self, prompt: str) -> None:
        """Print a continuation while it is written."""
        print(f"{prompt} ...", end="", flush=True)
        tokens = self.encode(prompt)
        self._generate([tokens], [[1] * len(tokens)], streamer=Printer(lambda new: self._text_after(tokens, new)))

    def _generate(self, tokens: list[list[int]], mask: list[list[int]], **more: Any) -> Any:
        import torch

        device = self.model.device
        began = time.monotonic()
        with torch.no_grad():
            written = self.model.generate(
                torch.tensor(tokens, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=self.generation,
                **more,
            )
        self.seconds += max(time.monotonic() - began, math.ulp(1.0))
        self.tokens += int((written[:, len(tokens[0]) :] != self.generation.pad_token_id).sum())
        return written

    def _text_after(self, prompt: list[int], new: list[int]) -> str:
        # Decode the whole text: a separately decoded continuation would lose its leading space.
        end = self.generation.eos_token_id
        new = new[: new.index(end)] if end in new else new
        before: str = self.tokenizer.decode(prompt, skip_special_tokens=True)
        whole: str = self.tokenizer.decode(prompt + new, skip_special_tokens=True)
        return whole[len(before) :]


if __name__ == "__main__":
    main()
