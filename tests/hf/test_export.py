"""Exported models compute what ours do, in every format, and bad input leaves nothing behind."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from mone_model.config import ACTIVATIONS, ComputeConfig, ParallelConfig
from mone_model.hf import export
from mone_model.hf.imported_model import differences, find_model
from mone_model.hf.sources import open_weights
from mone_model.megatron.calibration import select_by_threshold
from mone_model.megatron.gpt import build_gpt
from tests.hf.checkpoints import TOKENS, build, logits_of, model_of, save

pytestmark = pytest.mark.usefixtures("one_process")
Call = Callable[..., tuple[int, str, str]]

PLAIN: dict[str, Any] = {"shared_expert_ffn_hidden_size": 0}
SIGMOID: dict[str, Any] = {"router_score_function": "sigmoid", "shared_expert_ffn_hidden_size": 64}
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "a shared expert": ({}, "mone"),
    "no shared expert": (PLAIN, "qwen3_moe"),
    "softmax before top-k": (PLAIN | {"router_pre_softmax": True}, "qwen3_moe"),
    "no norm of queries": (PLAIN | {"qk_layernorm": False}, "mixtral"),
    "no norm of queries, wide heads": (PLAIN | {"qk_layernorm": False, "kv_channels": 16}, "mixtral"),
    "a shared expert, no norm of queries": ({"qk_layernorm": False}, "granitemoeshared"),
    "sigmoid": (SIGMOID, "glm4_moe"),
    "sigmoid, bias and scale": (SIGMOID | {"expert_bias": True, "router_scaling_factor": 2.5}, "glm4_moe"),
    "sigmoid, one expert": (SIGMOID | {"router_topk": 1}, "mone"),
    "a narrow shared expert": (SIGMOID | {"shared_expert_ffn_hidden_size": 24}, "mone"),
    "tied embeddings": (PLAIN | {"tie_embeddings": True}, "qwen3_moe"),
    "scaled softmax": (PLAIN | {"router_scaling_factor": 1.5}, "mone"),
    "all heads have keys": (PLAIN | {"num_query_groups": None, "rotary_base": 500}, "qwen3_moe"),
    "a quarter of the neurons": ({"activation_ratio": 0.25}, "mone"),
    "a share of the neurons for each layer": ({"activation_ratio": 0.5, "layer_activation_ratios": [0.75, 0.25]}, "mone"),
    "a bias of the neurons": ({"activation_ratio": 0.25, "neuron_bias": True}, "mone"),
    **{
        f"neurons chosen by {score}": ({"activation_ratio": 0.25, "neuron_score": score}, "mone")
        for score in ("gate", "abs_gate_up", "preactivation", "random_in_training", "frozen")
    },
    "half of the shared neurons": ({"shared_expert_neuron_ratio": 0.5}, "mone"),
    **{
        f"{name}, half of the neurons": (PLAIN | {"activation": name, "activation_ratio": 0.5}, "mone")
        for name in ACTIVATIONS
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_model_has_the_same_logits(tmp_path: Path, call_main: Call, name: str) -> None:
    options, format = MODELS[name]
    model = model_of(**options)
    gpt = build(model)
    save(tmp_path / "run", gpt, model)
    expected = logits_of(gpt, model)
    exports = {"auto": format} if format == "mone" else {"auto": format, "mone": "mone"}
    for asked, written in exports.items():
        output = tmp_path / asked
        code, _, errors = call_main(export.main, f"run={tmp_path / 'run'}", f"output={output}", f"format={asked}")
        assert code == 0, errors
        assert json.loads((output / "config.json").read_text())["model_type"] == written
        kept = f"| neurons of a chosen expert that a token keeps | {model.describe_active_neurons()} |"
        assert kept in (output / "README.md").read_text()
        stock = ["grouped_mm", "batched_mm"] if model.neuron_score != "frozen" else []
        for experts in ("eager", *stock, *(["mone"] if written == "mone" else [])):
            loaded = AutoModelForCausalLM.from_pretrained(
                output, trust_remote_code=True, dtype="auto", experts_implementation=experts
            )
            with torch.no_grad():
                found = loaded.eval()(TOKENS).logits
            assert (found - expected).abs().max() <= 2e-5 * expected.abs().max(), (asked, experts)


def test_a_model_without_a_bias_starts_one_with_a_bias_of_zero(tmp_path: Path, call_main: Call) -> None:
    model = model_of(activation_ratio=0.5)
    gpt = build(model)
    save(tmp_path / "run", gpt, model)
    assert call_main(export.main, f"run={tmp_path / 'run'}", f"output={tmp_path / 'out'}")[0] == 0
    biased = dataclasses.replace(model, neuron_bias=True)
    for source in (tmp_path / "run", tmp_path / "out"):
        imported = find_model(source)
        assert differences(biased, imported.model) == {}
        checkpoint = imported.checkpoints[-1] if imported.checkpoints else None
        weights = open_weights(imported, biased, checkpoint=checkpoint)
        found = build_gpt(biased, ParallelConfig(), ComputeConfig(experts="loop"), seed=1, weights=weights).eval()
        expected = logits_of(gpt, model)
        assert (logits_of(found, biased) - expected).abs().max() <= 2e-5 * expected.abs().max(), source
        assert not found.decoder.layers[0].mlp.experts.neuron_bias.any()


def test_gradients_of_one_step_are_equal(tmp_path: Path, call_main: Call) -> None:
    model = model_of(activation_ratio=0.5, aux_loss_coeff=0.0)
    gpt = build(model)
    save(tmp_path / "run", gpt, model)
    assert call_main(export.main, f"run={tmp_path / 'run'}", f"output={tmp_path / 'out'}")[0] == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).train()
    labels = TOKENS.roll(-1, 1)
    positions = torch.arange(TOKENS.size(1))[None].expand(len(TOKENS), -1)
    ours = gpt.train()(TOKENS, positions, None, labels=labels).mean()
    # transformers shifts the labels; give it the shifted ones.
    theirs = torch.nn.functional.cross_entropy(loaded(TOKENS).logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=0)
    ours.backward()
    theirs.backward()
    experts, block = gpt.decoder.layers[1].mlp.experts, loaded.model.layers[1].mlp
    for found, expected in (
        (block.experts.gate_up_proj.grad, experts.gate_up_weight.grad.flatten(1, 2)),
        (block.experts.down_proj.grad, experts.down_weight.grad.transpose(1, 2)),
        (block.gate.weight.grad, gpt.decoder.layers[1].mlp.router.weight.grad),
        (loaded.model.embed_tokens.weight.grad, gpt.embedding.word_embeddings.weight.grad[:60]),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_thresholds_replace_the_best_neurons(tmp_path: Path, call_main: Call) -> None:
    model = model_of(activation_ratio=0.25)
    gpt = build(model)
    save(tmp_path / "run", gpt, model)
    (tmp_path / "thresholds.json").write_text(json.dumps({"thresholds": [0.05, 0.2]}))
    code, _, errors = call_main(
        export.main,
        f"run={tmp_path / 'run'}",
        f"output={tmp_path / 'out'}",
        f"thresholds={tmp_path / 'thresholds.json'}",
    )
    assert code == 0, errors
    best = logits_of(gpt, model)
    select_by_threshold(gpt, [0.05, 0.2])
    expected = logits_of(gpt, model)
    assert (best - expected).abs().max() > 0.01
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert (loaded(TOKENS).logits - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_shards_dtype_and_index(tmp_path: Path, call_main: Call) -> None:
    model = model_of(**SIGMOID, expert_bias=True)
    gpt = build(model)
    save(tmp_path / "run", gpt, model)
    output = tmp_path / "out"
    arguments = [f"run={tmp_path / 'run'}", f"output={output}", "dtype=bfloat16", "max_shard_size=20KB", "license=mit"]
    assert call_main(export.main, *arguments)[0] == 0
    names = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(names.values())) > 2
    held: dict[str, str] = {}
    for file in sorted(set(names.values())):
        with safe_open(output / file, "pt") as shard:
            held |= dict.fromkeys(shard.keys(), file)
            for name in shard.keys():  # noqa: SIM118  not a dict
                bias = name.endswith("e_score_correction_bias")
                assert shard.get_tensor(name).dtype == (torch.float32 if bias else torch.bfloat16)
    assert held == names
    card = (output / "README.md").read_text()
    assert "license: mit" in card
    assert "Glm4MoeForCausalLM" in card
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype=torch.bfloat16).eval()
    expected = logits_of(build(model, precision="fp32"), model)
    assert (loaded(TOKENS).logits.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


ALONE = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
tokens = torch.tensor([[1, 5, 9, 13], [2, 4, 6, 8]])
whole = model.generate(tokens, max_new_tokens=8, do_sample=False)
for length in range(4, 12):  # the cache gives what the whole text gives
    assert (model(whole[:, :length]).logits[:, -1].argmax(-1) == whole[:, length]).all()
padded = torch.tensor([[0, 0, 1, 5, 9, 13], [3, 7, 2, 4, 6, 8]])
mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
left = model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False)
assert (left[0, 6:] == whole[0, 4:]).all()
out = model(tokens, output_router_logits=True, labels=tokens)
assert len(out.router_logits) == 2 and out.aux_loss > 0
model.train(); model.gradient_checkpointing_enable()
model(tokens, labels=tokens).loss.backward()
assert model.model.layers[0].mlp.experts.down_proj.grad.abs().sum() > 0
assert type(AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__ == "MoneModel"
model.save_pretrained(sys.argv[2])
again = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True).eval()
assert torch.equal(again(tokens).logits, model.eval()(tokens).logits)
assert not [name for name in sys.modules if name.split(".")[0] in ("mone_model", "megatron")]
"""


def test_an_exported_folder_works_without_this_project(tmp_path: Path, call_main: Call) -> None:
    model = model_of(activation_ratio=0.5)
    save(tmp_path / "run", build(model), model)
    assert call_main(export.main, f"run={tmp_path / 'run'}", f"output={tmp_path / 'out'}")[0] == 0
    run = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "out"), str(tmp_path / "again")],
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-3000:]


BAD: dict[str, tuple[Callable[[Path], Any], list[str], str]] = {
    "an output that exists": (lambda path: (path / "out").mkdir(), [], "exists; give another folder or remove it"),
    "no run": (lambda path: shutil.rmtree(path / "run"), [], "run=run: does not exist"),
    "no checkpoints": (lambda path: shutil.rmtree(path / "run/checkpoints"), [], "neither a run with checkpoints nor"),
    "another step": (lambda path: None, ["step=7"], "has no checkpoint of step=7; it has steps [1]"),
    "an unknown format": (lambda path: None, ["format=llama"], "format=llama: choose from auto, mone, qwen3_moe"),
    "a format that cannot select": (lambda path: None, ["format=qwen3_moe"], "model.activation_ratio=0.5 (must be 1"),
    "a size without unit": (lambda path: None, ["max_shard_size=big"], "max_shard_size=big: give a number and a unit"),
    "an unknown type": (lambda path: None, ["dtype=int8"], "dtype=int8: choose from null, float32"),
    "a ratio without thresholds": (lambda path: None, ["ratio=0.5"], "ratio=0.5: chooses among the thresholds of a file"),
    "no thresholds": (lambda path: None, ["thresholds=none.json"], "thresholds=none.json: is missing"),
    "a truncated file": (
        lambda path: os.truncate(next((path / "run").rglob("*.distcp")), 100),
        [],
        "distcp has 100 bytes",
    ),
    "a folder that is a file": (lambda path: (path / "file").touch(), ["output=file/out"], "cannot be written"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, call_main: Call, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    damage, arguments, message = BAD[name]
    model = model_of(activation_ratio=0.5)
    save(tmp_path / "run", build(model), model)
    damage(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    given = ["run=run", *([] if any("output=" in word for word in arguments) else ["output=out"]), *arguments]
    code, _, errors = call_main(export.main, *given)
    assert code == 2, errors
    assert message in errors
    assert len([line for line in errors.splitlines() if line.startswith("error: ")]) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_or_unexpected_weight_is_named(tmp_path: Path, call_main: Call) -> None:
    model = model_of(**PLAIN)
    gpt = build(model)
    save(tmp_path / "run", gpt, model_of(qk_layernorm=False))
    code, _, errors = call_main(export.main, f"run={tmp_path / 'run'}", f"output={tmp_path / 'out'}")
    assert code == 2
    assert "decoder.layers.mlp.shared_experts.linear_fc1.weight is missing" in errors
    assert "decoder.layers.self_attention.q_layernorm.weight is not a weight of the model" in errors
