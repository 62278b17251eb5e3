"""The Python API: a model in three lines, its experts by our backends, and what its neurons do."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from mone_common.console import UserError
from mone_model.config import ACTIVATIONS
from mone_model.hf import MoneForCausalLM, export, load, record_neurons
from mone_model.hf.modeling_mone import check_engine, select_neurons
from mone_model.neuron_selection import select_neurons_reference
from tests.hf.checkpoints import TOKENS, build, logits_of, model_of, save

pytestmark = pytest.mark.usefixtures("one_process")
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose model keeps a quarter of the neurons."""
    model = model_of(activation_ratio=0.25)
    save(tmp_path / "run", build(model), model)
    return tmp_path / "run"


def test_a_run_a_checkpoint_and_an_exported_folder_load_equally(run: Path, tmp_path: Path, call_main: Call) -> None:
    assert call_main(export.main, f"run={run}", f"output={tmp_path / 'out'}")[0] == 0
    expected = logits_of(build(model_of(activation_ratio=0.25)), model_of())
    logits = []
    for path in (run, run / "checkpoints/step-00000001", tmp_path / "out"):
        model, tokenizer = load(path)
        assert type(model) is MoneForCausalLM
        assert tokenizer is None
        assert not model.training
        with torch.no_grad():
            logits.append(model(TOKENS).logits)
        assert (logits[-1] - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("thresholds", [None, [0.05, 0.2]])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_our_backends_equal_the_eager_experts(
    tmp_path: Path, activation: str, thresholds: list[float] | None, dtype: torch.dtype
) -> None:
    options = model_of(activation_ratio=0.25, activation=activation)
    save(tmp_path / "run", build(options), options)
    model, _ = load(tmp_path / "run", thresholds_L=thresholds, dtype=dtype)
    tolerance = 2e-5 if dtype == torch.float32 else 0.15
    for tokens in (TOKENS, TOKENS[:1, :1]):  # many rows, and so few that `decode` may be chosen
        with torch.no_grad():
            ours = model(tokens).logits
            model.set_experts_implementation("eager")
            expected = model(tokens).logits
        model.set_experts_implementation("mone")
        assert (ours - expected).abs().max() <= tolerance * expected.abs().max()
    if dtype == torch.float32:
        gradients = []
        for name in ("mone", "eager"):
            model.set_experts_implementation(name)
            model.zero_grad()
            model(TOKENS, labels=TOKENS).loss.backward()
            gradients.append([weight.grad.clone() for weight in model.parameters()])
        for ours, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_generation_decodes_with_the_kept_neurons_only(run: Path) -> None:
    model, _ = load(run)
    tokens = TOKENS[:1, :4]
    ours = model.generate(tokens, max_new_tokens=8, do_sample=False)
    model.set_experts_implementation("eager")
    assert torch.equal(ours, model.generate(tokens, max_new_tokens=8, do_sample=False))


def test_a_record_has_experts_neurons_and_gates(run: Path) -> None:
    model, _ = load(run)
    with record_neurons(model) as record, torch.no_grad():
        out = model(TOKENS[:, :5], output_router_logits=True)
        model(TOKENS[:, 5:7])
    assert len(record) == 2
    layer = record[1]
    assert layer.experts_Tk.shape == layer.weights_Tk.shape == (21, 2)
    assert torch.equal(layer.experts_Tk[:15], out.router_logits[1].topk(2).indices)
    assert layer.gates_TkH.shape == layer.kept_TkH.shape == (21, 2, 32)
    expected = select_neurons_reference(layer.gates_TkH.flatten(0, 1), 8).mask_NH
    assert torch.equal(layer.kept_TkH.flatten(0, 1), expected)
    with torch.no_grad():
        model(TOKENS)
    assert len(layer.experts_Tk) == 21  # not recorded outside the block
    with pytest.raises(ValueError, match="has no MoneExperts"), record_neurons(torch.nn.Linear(2, 2)):
        pass


def test_another_ratio_can_be_loaded(run: Path, tmp_path: Path, call_main: Call) -> None:
    expected = logits_of(build(model_of(activation_ratio=0.5)), model_of())
    assert call_main(export.main, f"run={run}", f"output={tmp_path / 'out'}")[0] == 0
    for path in (run, tmp_path / "out"):
        model, _ = load(path, activation_ratio=0.5)
        assert model.config.active_neurons == 16
        with torch.no_grad():
            assert (model(TOKENS).logits - expected).abs().max() <= 2e-5 * expected.abs().max()
        with pytest.raises(UserError, match="activation_ratio=2"):
            load(path, activation_ratio=2)
        with pytest.raises(UserError, match="thresholds"):
            load(path, thresholds_L=[0.1])


def test_equal_gates_keep_the_lower_index() -> None:
    active = torch.tensor([[1.0, -2.0, 2.0, 1.0, 1.0], [float("nan"), 0.0, 3.0, 0.0, 0.0]])
    for k in range(1, 6):
        assert torch.equal(select_neurons(active, k), select_neurons_reference(active, k).mask_NH)


def test_a_trainer_lowers_the_loss(run: Path, tmp_path: Path) -> None:
    model, _ = load(run)
    data = [{"input_ids": row, "labels": row} for row in TOKENS] * 8
    arguments = TrainingArguments(
        str(tmp_path / "trainer"),
        max_steps=20,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    before = model(TOKENS, labels=TOKENS).loss.item()
    Trainer(model, arguments, train_dataset=data).train()
    assert model.eval()(TOKENS, labels=TOKENS).loss.item() < before - 0.5


def test_engines_that_ignore_the_selection_are_refused(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    model, _ = load(run)
    for engine, plugin in (("vllm.model_executor", "mone_model.vllm.method"), ("sglang.srt", "mone_model.sglang")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, engine, sys)
            with pytest.raises(RuntimeError, match="compute all neurons with SiLU"):
                MoneForCausalLM(model.config)
            patch.setitem(sys.modules, plugin, sys)
            check_engine(model.config)


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path, run: Path, call_main: Call) -> None:
    with pytest.raises(UserError, match="none: does not exist"):
        load(tmp_path / "none")
    assert call_main(export.main, f"run={run}", f"output={tmp_path / 'out'}")[0] == 0
    os.truncate(tmp_path / "out/model.safetensors", 1000)
    with pytest.raises(UserError, match="transformers cannot load it"):
        load(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    invalid: dict[str, Any] = {"activation_ratio": 2.0, "scoring_func": "tanh", "neuron_thresholds": [0.1]}
    for name, value in [
        *invalid.items(),
        *(("layer_activation_ratios", value) for value in ([0.25], [0.25, 0], [0.5, 0.25])),
    ]:
        (tmp_path / "out/config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(UserError, match=name):
            load(tmp_path / "out")


def test_importing_the_package_replaces_remote_code(run: Path, tmp_path: Path, call_main: Call) -> None:
    assert call_main(export.main, f"run={run}", f"output={tmp_path / 'out'}")[0] == 0
    program = (
        "import sys, mone_model.hf\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert type(model) is mone_model.hf.MoneForCausalLM\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('megatron', 'deepspeed', 'wandb')]"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_model_of_remote_code_is_recorded_and_computed_by_our_backends(run: Path, tmp_path: Path, call_main: Call) -> None:
    assert call_main(export.main, f"run={run}", f"output={tmp_path / 'out'}")[0] == 0
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    with record_neurons(model) as record, torch.no_grad():
        before = model(TOKENS).logits
        model.set_experts_implementation("mone")
        assert (model(TOKENS).logits - before).abs().max() <= 2e-5 * before.abs().max()
    assert record[0].kept_TkH.sum(-1).unique().tolist() == [8]
