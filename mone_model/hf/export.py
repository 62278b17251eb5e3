"""Write a trained model as a folder that transformers loads.

    mone-export run=runs/demo output=exported
    model = AutoModelForCausalLM.from_pretrained("exported", trust_remote_code=True)      # in Python, with transformers

Weights are converted one tensor at a time, so a model larger than memory can be exported.
"""

import errno
import json
import logging
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from mone_common.checkpoint_folder import Checkpoint
from mone_common.console import UserError, command, to_dataclass
from mone_common.files import writing_folder
from mone_common.run_folder import DamagedFile
from mone_common.text import clock
from mone_common.threshold_file import read_thresholds
from mone_model.config import ModelConfig
from mone_model.hf.card import write_card
from mone_model.hf.checkpoint import CheckpointWeights, find_checkpoint, model_of
from mone_model.hf.conversion import Conversion
from mone_model.hf.formats import CLASSES, choose_format, config_of, why_not
from mone_model.hf.shards import Spec, plan_shards, write_index, write_shard
from mone_model.hf.tokenizer import write_tokenizer
from mone_model.hf.weight_map import BIASES

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B", re.IGNORECASE)
PROGRESS_SECONDS = 5.0


@dataclass
class ExportConfig:
    """Options of mone-export."""

    run: str = MISSING
    """Folder of the run, or of one of its checkpoints."""
    output: str = MISSING
    """Folder to write; it must not exist."""
    step: int | None = None
    """Step of the checkpoint to export; null: the newest."""
    format: str = "auto"
    """auto: a class of transformers that expresses the model exactly, or else mone. mone: this project's class. Or the name
    of a class: qwen3_moe, mixtral, granitemoeshared, glm4_moe."""
    dtype: str | None = None
    """Data type of the weights: float32, bfloat16 or float16; null: that of the checkpoint."""
    max_shard_size: str = "5GB"
    """Largest size of a file, such as 500MB."""
    thresholds: str | None = None
    """Output file of mone-calibrate or mone-sparsify: the model keeps the neurons that reach its thresholds; null: the K
    best."""
    ratio: float | None = None
    """Which thresholds of a file of mone-sparsify, by the share of neurons that they keep; null: the only ones."""
    license: str | None = None
    """License in the model card, such as apache-2.0; null: none is stated."""
    trust: bool = False
    """Also read checkpoints that contain pickled code. Reading executes that code: use only with trusted checkpoints."""

    def __post_init__(self) -> None:
        for name, choices in (("format", ("auto", *CLASSES)), ("dtype", (None, *DTYPES))):
            if getattr(self, name) not in choices:
                names = ", ".join("null" if choice is None else choice for choice in choices)
                raise UserError(f"{name}={getattr(self, name)}: choose from {names}")
        if self.ratio is not None and self.thresholds is None:
            raise UserError(f"ratio={self.ratio}: chooses among the thresholds of a file; give thresholds=FILE")
        _ = self.largest_shard

    @property
    def largest_shard(self) -> int:
        """`max_shard_size` in bytes."""
        match = SIZE.fullmatch(self.max_shard_size.strip())
        size = 0 if match is None else int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))
        if size < 1:
            raise UserError(f"max_shard_size={self.max_shard_size}: give a number and a unit, such as 500MB or 5GB")
        return size


ConfigStore.instance().store(name="export_schema", node=ExportConfig)


@command("export")
def main(hydra_config: DictConfig) -> None:
    """Export a checkpoint."""
    options = to_dataclass(hydra_config, ExportConfig)
    export(options)


def export(options: ExportConfig) -> None:
    """Write the folder `options.output`; UserError if the model cannot be exported. Nothing is left if it fails."""
    output = Path(options.output)
    if output.exists() or output.is_symlink():
        raise UserError(f"output={output}: exists; give another folder or remove it")
    try:
        checkpoint = find_checkpoint(Path(options.run), step=options.step, trust=options.trust, warn=logger.warning)
    except UserError as error:
        raise UserError(f"run={error}") from error
    model = model_of(checkpoint)
    thresholds_L = None
    if options.thresholds is not None:
        try:
            thresholds_L = read_thresholds(Path(options.thresholds), ratio=options.ratio)
        except DamagedFile as error:
            raise UserError(str(error)) from error
    format = options.format if options.format != "auto" else choose_format(model, thresholds_L)
    if obstacles := why_not(model, format, thresholds_L):
        raise UserError(f"format={format}: it cannot express {'; '.join(obstacles)}")
    conversion = Conversion(CheckpointWeights(checkpoint), model, format)
    try:
        with writing_folder(output) as unfinished:
            end = _write_tokenizer(checkpoint, unfinished, model)
            stored = conversion.dtype(conversion.tensors[0])
            dtype = stored if options.dtype is None else DTYPES[options.dtype]
            name = next(name for name, known in DTYPES.items() if known == dtype)
            write_json(unfinished / "config.json", config_of(model, format, end=end, dtype=name, thresholds_L=thresholds_L))
            write_json(unfinished / "generation_config.json", {"eos_token_id": end, "pad_token_id": end, "do_sample": True})
            if format == "mone":
                for file in ("configuration_mone.py", "modeling_mone.py"):
                    shutil.copyfile(Path(__file__).with_name(file), unfinished / file)
            write_card(unfinished / "README.md", checkpoint, model, format, license=options.license)
            write_weights(unfinished, conversion, dtype, options.largest_shard)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EFBIG):
            raise UserError(f"output={output}: cannot be written ({error.strerror})") from error
        raise
    remote = ", trust_remote_code=True" if format == "mone" else ""
    print(f"written: {output}, step {checkpoint.step}, as {CLASSES[format]}")
    print(f'load it: transformers.AutoModelForCausalLM.from_pretrained("{output}"{remote})')


def _write_tokenizer(checkpoint: Checkpoint, output: Path, model: ModelConfig) -> int | None:
    """Write the tokenizer of the run, if it has one; return the token that ends a document."""
    folder = checkpoint.path.parent.parent / "tokenizer"
    if not folder.is_dir():
        logger.warning(f"{folder} is missing: the exported model has no tokenizer")
        return None
    write_tokenizer(folder, output, context=model.seq_length)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(output))
    largest = max(tokenizer.get_vocab().values(), default=-1) + 1
    assert model.vocab_size is not None
    if largest > model.vocab_size:
        raise UserError(f"{folder}: has {largest} tokens; the model has model.vocab_size={model.vocab_size}")
    end: int | None = tokenizer.eos_token_id
    return end


def write_weights(folder: Path, conversion: Conversion, dtype: torch.dtype, largest_shard: int) -> None:
    """Write the safetensors files and their index, and report the progress."""
    sources = {tensor.name: tensor for tensor in conversion.tensors}
    # Biases are added to scores in fp32: bf16 would change which experts and neurons are chosen.
    specs = [Spec(name, tensor.shape, torch.float32 if name.endswith(BIASES) else dtype) for name, tensor in sources.items()]
    total = sum(spec.size for spec in specs)
    done, began = 0, time.monotonic()
    reported = began

    def fill(spec: Spec, out: torch.Tensor) -> None:
        nonlocal done, reported
        if time.monotonic() - reported >= PROGRESS_SECONDS:
            reported = time.monotonic()
            rate = done / (reported - began)
            left = clock((total - done) / rate) if rate else "?"
            logger.info(f"exported {done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s, {left} left")
        done += spec.size
        conversion.read_into(sources[spec.name], out)

    shards = plan_shards(specs, largest=largest_shard)
    for name, shard in shards.items():
        write_shard(folder / name, shard, fill)
    write_index(folder, shards)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
