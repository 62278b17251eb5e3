"""The model that is evaluated: check its folder before anything long begins, load it, identify it.

check_model("runs/demo", step=None)                   # UserError: no model, or no tokenizer
model, tokenizer = open_model(ModelChoice(model="runs/demo", ratio=0.25))
describe(model)                                       # {"class": "MoneForCausalLM", "fingerprint": "9f...", ...}
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mone_common.console import UserError
from mone_common.run_folder import DamagedFile
from mone_common.threshold_file import read_thresholds

if TYPE_CHECKING:
    import torch

    from mone_eval.documents import Document

DTYPES = ("auto", "float32", "bfloat16", "float16")
ENDS = 4096
"""Numbers at each end of a tensor that its fingerprint includes; an optimizer step changes all."""
LONGEST_WINDOW = 2048
"""Default window of models with a longer context."""
FINGERPRINTED = 16
"""Hexadecimal digits of a fingerprint."""


@dataclass
class ModelChoice:
    """Which model, how it selects neurons, and in what precision it computes."""

    model: str
    """Folder of a run, a checkpoint, or any causal language model of transformers."""
    step: int | None = None
    """Step of the checkpoint of a run; None: the newest."""
    ratio: float | None = None
    """Share of an expert's neurons to keep; None: that of the model. With a file of mone-sparsify: which thresholds."""
    select: str | None = None
    """exact or threshold; None: threshold if `thresholds` is given."""
    thresholds: str | None = None
    """Output file of mone-calibrate or mone-sparsify; None with select=threshold: thresholds.json of the run."""
    dtype: str = "auto"
    """One of DTYPES; auto: that of the weights."""
    device: str = "auto"
    """A device of torch; auto: a GPU if there is one."""
    trust: bool = False
    """Also load checkpoints with pickled code."""

    def __post_init__(self) -> None:
        if self.step is not None and self.step < 0:
            raise UserError(f"step={self.step}: must be at least 0")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise UserError(f"ratio={self.ratio}: must be above 0 and at most 1")
        if self.select not in (None, "exact", "threshold"):
            raise UserError(f"select={self.select}: choose exact or threshold")
        if self.select == "exact" and self.thresholds is not None:
            raise UserError(f"thresholds={self.thresholds}: is not used with select=exact; leave one of them out")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype}: choose one of {', '.join(DTYPES)}")

    @property
    def by_threshold(self) -> bool:
        """Whether thresholds select the neurons."""
        return self.select == "threshold" or self.thresholds is not None

    def thresholds_L(self) -> list[float] | None:
        """The thresholds, one for each layer, or None; UserError if the file is missing."""
        if not self.by_threshold:
            return None
        path = Path(self.thresholds or Path(self.model) / "thresholds.json")
        try:
            return read_thresholds(path, ratio=self.ratio)
        except DamagedFile as error:
            raise UserError(f"{error}; write one with mone-calibrate run={self.model} output={path}") from error


def check_model(path: str, *, step: int | None) -> int | None:
    """The context of a model in tokens, or None, without reading weights; UserError if there is no model or tokenizer."""
    from mone_model.hf.imported_model import list_saved, model_of

    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"model={path}: no such folder; give the folder of a run, a checkpoint, or a Hugging Face model (config.json)"
        )
    is_exported = (folder / "config.json").is_file()
    if is_exported and step is not None:
        raise UserError(f"step={step}: {path} is a Hugging Face model, which has no steps; leave step out")
    if is_exported:
        context = context_of(_read_config(folder))
        tokenizer, found = folder, any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
    else:
        try:
            checkpoints, _ = list_saved(folder, step=step)
        except UserError as error:
            raise UserError(f"model={error}; a Hugging Face model has a config.json") from error
        context = model_of(checkpoints[-1]).seq_length
        tokenizer = checkpoints[-1].path.parent.parent / "tokenizer"
        found = tokenizer.is_dir()
    if not found:
        raise UserError(f"model={path}: has no tokenizer; copy the tokenizer of its data to {tokenizer}")
    return context


def choose_window(context: int | None, window: int | None, stride: int | None) -> tuple[int, int]:
    """Window and stride; None: the context, 2048 at most, and half of the window. UserError if they are too large.

    context: longest text that the model reads, in tokens; None: not limited.
    """
    if window is None:
        window = min(context or LONGEST_WINDOW, LONGEST_WINDOW)
    elif context is not None and window > context:
        raise UserError(f"window={window}: the model has a context of {context} tokens; choose at most {context}")
    stride = max(1, window // 2) if stride is None else stride
    if stride > window:
        raise UserError(f"stride={stride}: must be at most the window, {window}")
    return window, stride


def context_of(config: Any) -> int | None:
    """Longest text that a model of transformers reads, in tokens; None if its configuration names none."""
    context: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return context


def check_tokens(documents: Sequence["Document"], model: Any, path: str) -> None:
    """UserError if a token has no row in the embedding: the tokenizer is that of another model."""
    highest = max((int(document.tokens.max()) for document in documents if len(document.tokens)), default=0)
    if highest >= (rows := model.get_input_embeddings().weight.size(0)):
        raise UserError(f"model={path}: its tokenizer has token {highest}, its embedding {rows} rows; not its tokenizer")


def _read_config(folder: Path) -> Any:
    from transformers import AutoConfig

    import mone_model.hf  # noqa: F401  registers its configuration

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model={folder}: transformers cannot read it ({' '.join(str(error).split())})") from error


def open_model(choice: ModelChoice) -> tuple[Any, Any]:
    """The model in evaluation mode on its device, and its tokenizer; UserError if it cannot be loaded as chosen."""
    import torch

    from mone_model.hf import load

    device = find_device(choice.device)
    thresholds_L = choice.thresholds_L()
    selects = is_ours(Path(choice.model))
    try:
        model, tokenizer = load(
            choice.model,
            step=choice.step,
            dtype=None if choice.dtype == "auto" else getattr(torch, choice.dtype),
            activation_ratio=choice.ratio if selects and thresholds_L is None else None,
            thresholds_L=thresholds_L if selects else None,
            trust=choice.trust,
        )
    except UserError as error:
        raise UserError(f"model={error}") from error
    if choice.select == "exact" and getattr(model.config, "neuron_thresholds", None) is not None:
        raise UserError(f"select=exact: {choice.model} was exported with thresholds; evaluate the run that it is of")
    if not selects and (choice.ratio is not None or thresholds_L is not None):
        select_neurons(model, ratio=choice.ratio, thresholds_L=thresholds_L)
    return model.to(device), tokenizer


def is_ours(folder: Path) -> bool:
    """Whether a model of this project is in a folder, whose configuration says how neurons are selected."""
    config = folder / "config.json"
    return not config.is_file() or json.loads(config.read_bytes()).get("model_type") == "mone"


def select_neurons(model: Any, *, ratio: float | None, thresholds_L: list[float] | None) -> None:
    """Select neurons in the routed experts of a model of transformers, or in the layers of a dense one; UserError.

    thresholds_L: one for each layer that has such experts, in place of the share `ratio`.
    """
    from mone_eval.expert_hooks import Rule, by_layer, hook_experts, main_part
    from mone_eval.layerwise import layer_names
    from mone_model.config import top_k

    hooked = hook_experts(model)
    part = main_part(hooked)
    chosen = [its for layer in by_layer(hooked, layer_names(model)) if (its := [one for one in layer if one.part == part])]
    if not chosen:
        raise UserError(f"ratio={ratio}: {type(model).__name__} has no gated experts and no gated layers")
    if thresholds_L is not None and len(thresholds_L) != len(chosen):
        raise UserError(
            f"thresholds: has {len(thresholds_L)} thresholds; the model has {len(chosen)} layers with {part} experts"
        )
    for number, layer in enumerate(chosen):
        for one in layer:
            k = None if thresholds_L is not None else top_k(float(ratio or 1), one.neurons)
            one.reset(Rule(k=k, threshold=None if thresholds_L is None else thresholds_L[number]))


def find_device(name: str) -> "torch.device":
    """The device of that name; UserError if this machine has none."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise UserError(f"device={name}: cannot be used here ({first}); choose auto, cpu or cuda") from error
    return device


def describe(model: Any) -> dict[str, Any]:
    """Class, size, precision, neuron selection and fingerprint of a model, for the record of its results."""
    config = model.config
    ratio = getattr(config, "activation_ratio", None)
    return {
        "class": type(model).__name__,
        "source": config.name_or_path,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "activation_ratio": ratio,
        "layer_activation_ratios": getattr(config, "layer_activation_ratios", None),
        "thresholds": getattr(config, "neuron_thresholds", None),
        "fingerprint": fingerprint(model),
    }


def fingerprint(model: Any) -> str:
    """Identifies the weights, in any file format: a hash of names, shapes, types, and the ends of each tensor."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        for end in (flat[:ENDS], flat[-ENDS:]):
            digest.update(end.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:FINGERPRINTED]
