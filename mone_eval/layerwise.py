"""A causal language model of transformers whose layers are in memory one at a time.

    model = LayerwiseModel(Path("mixtral"), dtype=torch.bfloat16, device=torch.device("cpu"))
    batches = [model.begin(inputs_BT) for inputs_BT in ...]      # embeddings, and the arguments of each layer
    for number in range(len(model.layers)):
        with model.layer(number):                                # loads its weights, and drops them at the end
            hidden_BTD = model.run(number, batch, hidden_BTD)    # as often as wanted
    logits_BTV = model.logits(batch, hidden_BTD)

transformers builds the model without weights and states how the tensors of the files become its weights.

Shapes: B sequences, T tokens, D width, V vocabulary.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, core_model_loading
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from mone_common.console import UserError
from mone_eval.expert_hooks import is_inside

DEQUANTIZED = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
"""Methods of quantisation that transformers undoes when it loads a model."""


class Batch(NamedTuple):
    """Sequences of one length."""

    inputs_BT: torch.Tensor
    hidden_BTD: torch.Tensor
    """Hidden states before the first layer, on the CPU."""
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
    """The arguments of each layer beside its hidden states, such as masks and rotary embeddings."""


class _Stub(nn.Module):
    """Takes the place of a layer to learn with which arguments the model calls it, and to return given hidden states."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # Not submodules.
        self.__dict__ |= {"layer": layer, "call": None, "given": None, "hidden": None}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        self.__dict__ |= {"call": (arguments, keywords), "hidden": hidden_states}
        return hidden_states if self.given is None else self.given


class LayerwiseModel:
    """A model without weights, parts of which are loaded and dropped; or a model in memory."""

    def __init__(
        self, source: Path | PreTrainedModel, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> None:
        """source: a folder of transformers or a model. dtype: None for that of the weights. device: None for the CPU.

        Raises UserError for a folder that is not a model.
        """
        self.device = device or torch.device("cpu")
        self._places: dict[str, list[tuple[str, str]]] = {}
        self.stored: dict[str, int] = {}
        """Bytes on disk by the name of the parameter that they become; of a model in memory, empty."""
        if isinstance(source, Path):
            self.model, files, self._config = _build(source, dtype, self.device)
            try:
                self._find_tensors(files)
            except SafetensorError as error:
                raise UserError(f"model={source}: transformers cannot load it ({error})") from error
        else:
            self.model = source.to(self.device).eval()
        self.decoder = decoder_of(self.model)
        self.layers: list[nn.Module] = list(self.decoder.layers)
        self.layer_names = layer_names(self.model)
        if isinstance(source, Path):
            self._load(source, lambda name: not any(is_inside(name, layer) for layer in self.layer_names))
            self.model.tie_weights()
            self._check_loaded(source, self.model, exempt=self.layers)
        self._source = source
        self._shared: list[torch.Tensor] = []

    def _find_tensors(self, files: list[str]) -> None:
        mapping = self._config.weight_mapping or []
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        state = self.model.state_dict()
        for file in files:
            with safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118, not a dict
                    name, _ = core_model_loading.rename_source_key(
                        key, renamings, converters, self.model.base_model_prefix, state
                    )
                    self._places.setdefault(name, []).append((key, file))
                    part = opened.get_slice(key)
                    size = torch.Size(part.get_shape()).numel() * BYTES.get(part.get_dtype(), 1)
                    self.stored[name] = self.stored.get(name, 0) + size

    def _load(self, source: Path, wanted: Any) -> None:
        """Load the parameters whose names are wanted."""
        places = [place for name, found in self._places.items() if wanted(name) for place in found]
        with contextlib.ExitStack() as stack:
            opened = {file: stack.enter_context(safe_open(file, "pt")) for file in {file for _, file in places}}
            lazy = {key: opened[file].get_slice(key) for key, file in places}
            # transformers shows a progress bar for each call.
            with mock.patch.object(core_model_loading, "tqdm", lambda items, **_: items):
                core_model_loading.convert_and_load_state_dict_in_model(self.model, lazy, self._config)

    def _check_loaded(self, source: Path, module: nn.Module, exempt: list[nn.Module] | None = None) -> None:
        names = {id(tensor): name for name, tensor in self.model.state_dict(keep_vars=True).items()}
        skipped = {id(tensor) for layer in exempt or () for tensor in layer.state_dict(keep_vars=True).values()}
        for tensor in module.state_dict(keep_vars=True).values():
            if tensor.is_meta and id(tensor) not in skipped:
                raise UserError(f"model={source}: has no tensor for {names[id(tensor)]}")

    @contextlib.contextmanager
    def layer(self, number: int) -> Iterator[nn.Module]:
        """The weights of a layer in memory, inside the block."""
        module = self.layers[number]
        if not isinstance(self._source, Path):
            yield module
            return
        try:
            self._load(self._source, lambda name: is_inside(name, self.layer_names[number]))
            self._check_loaded(self._source, module)
            yield module
        finally:
            for inner in module.modules():
                for name, weight in inner.named_parameters(recurse=False):
                    setattr(inner, name, nn.Parameter(weight.detach().to("meta"), requires_grad=False))

    @torch.no_grad()
    def begin(self, inputs_BT: torch.Tensor) -> Batch:
        """The embeddings of tokens, and how the model calls each layer on them."""
        stubs = [_Stub(layer) for layer in self.layers]
        with self._layers_replaced(stubs):
            self.decoder(input_ids=inputs_BT.to(self.device), use_cache=False)
        hidden_BTD: torch.Tensor = stubs[0].hidden
        if any(stub.call is None or stub.hidden is not hidden_BTD for stub in stubs):
            kind = type(self.decoder).__name__
            raise UserError(
                f"model: {kind} does more between its layers than to pass hidden states on; it cannot be streamed"
            )
        seen: dict[int, Any] = {}
        calls = tuple(
            (
                tuple(self._share(value, seen) for value in stub.call[0]),
                {name: self._share(value, seen) for name, value in stub.call[1].items()},
            )
            for stub in stubs
        )
        return Batch(inputs_BT, hidden_BTD.cpu(), calls)

    def _share(self, value: Any, seen: dict[int, Any]) -> Any:
        """The same value, with tensors that equal those of an earlier batch replaced by these, to save memory."""
        if isinstance(value, tuple):
            return tuple(self._share(part, seen) for part in value)
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in seen:
            known = (t for t in self._shared if t.shape == value.shape and t.dtype == value.dtype and torch.equal(t, value))
            seen[id(value)] = next(known, value)
            if seen[id(value)] is value:
                self._shared.append(value)
        return seen[id(value)]

    @contextlib.contextmanager
    def _layers_replaced(self, stubs: list[_Stub]) -> Iterator[None]:
        self.decoder.layers = nn.ModuleList(stubs)
        try:
            yield
        finally:
            self.decoder.layers = nn.ModuleList(self.layers)

    @torch.no_grad()
    def run(self, number: int, batch: Batch, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Hidden states after a layer whose weights are in memory, on the CPU."""
        arguments, keywords = batch.calls[number]
        out = self.layers[number](hidden_BTD.to(self.device), *arguments, **keywords)
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return result.cpu()

    @torch.no_grad()
    def logits(self, batch: Batch, hidden_BTD: torch.Tensor, *, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """[B, t, V] from the hidden states after the last layer, for the tokens from `start` to `stop`."""
        stubs = [_Stub(layer) for layer in self.layers]
        stubs[-1].__dict__["given"] = hidden_BTD[:, start:stop].to(self.device)
        with self._layers_replaced(stubs):
            out = self.model(input_ids=batch.inputs_BT[:, start:stop].to(self.device), use_cache=False)
        logits_BtV: torch.Tensor = out.logits
        return logits_BtV


BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
"""Bytes of a number by its type in safetensors; 1 for others."""


def decoder_of(model: Any) -> Any:
    """The module of a causal language model that embeds tokens and calls the layers; UserError if there is none."""
    for module in (model.get_decoder(), getattr(model, "model", None)):
        if isinstance(getattr(module, "layers", None), nn.ModuleList):
            return module
    raise UserError(f"model: {type(model).__name__} has no list of layers; it cannot be streamed")


def layer_names(model: Any) -> list[str]:
    """The names of the layers of a causal language model."""
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer)] for layer in decoder_of(model).layers]


class _Built(Exception):
    """Carries the model that transformers was about to load, out of `from_pretrained`."""


def _build(folder: Path, dtype: torch.dtype | None, device: torch.device) -> tuple[Any, list[str], Any]:
    """The model without weights, its files, and transformers' configuration of the loading."""

    def capture(model: Any, state_dict: Any, files: list[str], config: Any, *_: Any) -> None:
        raise _Built(model, files, config)

    try:
        config = AutoConfig.from_pretrained(folder)
        quantized = getattr(config, "quantization_config", None) or getattr(
            config.get_text_config(), "quantization_config", None
        )
        how = {}
        if quantized is not None:
            method = str(quantized["quant_method"])
            if method not in DEQUANTIZED:
                raise UserError(f"model={folder}: is quantised with {method}; give the weights before quantisation")
            how["quantization_config"] = DEQUANTIZED[method](dequantize=True)
        with mock.patch.object(PreTrainedModel, "_load_pretrained_model", staticmethod(capture)):
            AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto" if dtype is None else dtype, device_map={"": device}, use_safetensors=True, **how
            )
    except _Built as built:
        model, files, loading = built.args
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(f"model={folder}: transformers cannot load it ({' '.join(str(error).split())})") from error
    # Buffers that no file holds, such as the frequencies of rotary embeddings.
    model._move_missing_keys_from_meta_to_device(set(), loading.device_map, None, loading.hf_quantizer)
    with torch.no_grad():
        for module in model.modules():
            if module._non_persistent_buffers_set:
                model._init_weights(module)
    return model.eval(), files, loading
