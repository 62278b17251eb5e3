"""Experts of other models keep a part of their neurons, by this project's backends."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mone_eval.models import select_neurons
from mone_model.hf import keep_neurons
from tests.eval.tiny_models import TOKENS_BT, build

FAMILIES = ["qwen3_moe", "mixtral", "olmoe", "deepseek_v2", "granitemoe"]


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(TOKENS_BT).logits
    return found


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_of_the_neurons_equals_the_study_s_selection(family: str, tmp_path: Path) -> None:
    whole, model, studied = build(family), build(family), build(family)
    keep_neurons(model, ratio=1)
    assert_close(logits_of(model), logits_of(whole))

    keep_neurons(model, ratio=0.25)
    select_neurons(studied, ratio=0.25, thresholds_L=None)
    expected = logits_of(studied)
    assert (expected - logits_of(whole)).abs().max() > 0.002 * expected.abs().max()
    assert_close(logits_of(model), expected)
    whole.set_experts_implementation("mone")
    with pytest.raises(ValueError, match="call mone_model.hf.keep_neurons"):
        logits_of(whole)

    layers = [layer for layer in range(4) if family != "deepseek_v2" or layer > 0]
    thresholds = [0.01 * (1 + layer) for layer in layers]
    its = {"model_type": model.config.model_type, "parts": {"routed": {"layers": layers, "ratios": {"0.5": thresholds}}}}
    (tmp_path / "thresholds.json").write_text(json.dumps(its))
    keep_neurons(model, thresholds=tmp_path / "thresholds.json")
    select_neurons(studied, ratio=None, thresholds_L=thresholds)
    assert_close(logits_of(model), logits_of(studied))


def test_generation_with_a_cache_equals_the_whole_text() -> None:
    model = build("qwen3_moe")
    keep_neurons(model, ratio=0.25)
    tokens_BT = model.generate(TOKENS_BT[:, :4], max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        assert torch.equal(model(tokens_BT).logits[:, 3:-1].argmax(-1), tokens_BT[:, 4:])


def test_what_cannot_be_computed_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="GptOssExperts: its experts are not"):
        keep_neurons(build("gpt_oss"), ratio=0.5)
    with pytest.raises(ValueError, match="model=LlamaForCausalLM: has no experts"):
        keep_neurons(build("llama"), ratio=0.5)
    model = build("mixtral")
    expected = logits_of(model)
    with pytest.raises(ValueError, match="ratio=1.5: must be in"):
        keep_neurons(model, ratio=1.5)
    with pytest.raises(ValueError, match="ratio=None: give a share"):
        keep_neurons(model)
    for its, message in (
        ({"model_type": "olmoe", "layers": [0, 1, 2, 3]}, "of the type olmoe, this one is mixtral"),
        ({"model_type": "mixtral", "layers": [1, 2, 3]}, "for the layers 1 to 3"),
    ):
        part = {"layers": its["layers"], "ratios": {"0.5": [0.1] * len(its["layers"])}}
        file = tmp_path / "thresholds.json"
        file.write_text(json.dumps({"model_type": its["model_type"], "parts": {"routed": part}}))
        with pytest.raises(ValueError, match=message):
            keep_neurons(model, thresholds=file)
    assert torch.equal(logits_of(model), expected)
