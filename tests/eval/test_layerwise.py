"""A model whose layers are loaded one at a time computes what the whole model computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from mone_common.console import UserError
from mone_eval.expert_hooks import Rule, hook_experts
from mone_eval.layerwise import LayerwiseModel
from tests.eval.tiny_models import COMMON, FAMILIES, TOKENS_BT, build, randomize

VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "depth": 1, "num_heads": 2,
    "out_hidden_size": 64, "image_size": 28, "patch_size": 14, "projector_input_dim": 64, "projector_output_dim": 64,
    "vision_output_dim": 64,
}  # fmt: skip


def keep_half(model: Any) -> None:
    for one in hook_experts(model):
        one.reset(Rule(k=one.neurons // 2))


@torch.no_grad()
def streamed(folder: Path, dtype: torch.dtype | None = torch.float32) -> torch.Tensor:
    """Logits with half of the neurons; the head in two parts."""
    model = LayerwiseModel(folder, dtype=dtype)
    keep_half(model.model)
    batch = model.begin(TOKENS_BT)
    hidden_BTD = batch.hidden_BTD
    for number in range(len(model.layers)):
        with model.layer(number):
            assert not any(weight.is_meta for weight in model.layers[number].parameters())
            hidden_BTD = model.run(number, batch, hidden_BTD)
        assert all(weight.is_meta for weight in model.layers[number].parameters())
    parts = [model.logits(batch, hidden_BTD, stop=10), model.logits(batch, hidden_BTD, start=10)]
    return torch.cat(parts, dim=1)


@torch.no_grad()
def whole(model: Any) -> torch.Tensor:
    keep_half(model)
    logits: torch.Tensor = model.eval()(TOKENS_BT).logits
    return logits


def check(folder: Path, model: Any, dtype: torch.dtype | None = torch.float32) -> None:
    expected = whole(model)
    torch.testing.assert_close(streamed(folder, dtype), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_model_equals_the_whole_one(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    check(tmp_path, model)


@pytest.mark.parametrize("family", ["qwen3_5_moe", "llama4"])
def test_a_multimodal_model_gives_its_text_model(family: str, tmp_path: Path) -> None:
    text = getattr(transformers, FAMILIES[family][1])(**COMMON | FAMILIES[family][2])
    name = {"qwen3_5_moe": "Qwen3_5Moe", "llama4": "Llama4"}[family]
    config = getattr(transformers, f"{name}Config")(text_config=text.to_dict(), vision_config=VISION)
    model = randomize(getattr(transformers, f"{name}ForConditionalGeneration")(config).eval())
    model.save_pretrained(tmp_path)
    check(tmp_path, model)


def test_mxfp4_weights_are_dequantised(tmp_path: Path) -> None:
    build("gpt_oss").save_pretrained(tmp_path)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = tensor.shape
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(119, 124, (experts, rows, columns // 32), dtype=torch.uint8)
        else:
            tensors[name] = tensor.bfloat16()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    dense = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config |= {"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": dense}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Mxfp4Config(dequantize=True))
    check(tmp_path, model, dtype=None)


def test_fp8_weights_are_dequantised(tmp_path: Path) -> None:
    """As DeepSeek-V3: blocks of 128 by 128 numbers with a scale each."""
    build("deepseek_v3").save_pretrained(tmp_path)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if name.endswith(("_proj.weight", "kv_a_proj_with_mqa.weight", "kv_b_proj.weight")):
            rows, columns = tensor.shape
            scale = 0.001 + 0.01 * torch.rand(-(-rows // 128), -(-columns // 128))
            each = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
            tensors |= {name: (tensor / each).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
        else:
            tensors[name] = tensor.bfloat16()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    method = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16", "quantization_config": method}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=FineGrainedFP8Config(dequantize=True))
    check(tmp_path, model, dtype=None)


def test_a_model_in_memory_is_streamed_too() -> None:
    model = build("mixtral")
    expected = model(TOKENS_BT).logits.detach()
    layerwise = LayerwiseModel(model)
    batch = layerwise.begin(TOKENS_BT)
    hidden_BTD = batch.hidden_BTD
    for number in range(len(layerwise.layers)):
        with layerwise.layer(number):
            hidden_BTD = layerwise.run(number, batch, hidden_BTD)
    torch.testing.assert_close(layerwise.logits(batch, hidden_BTD), expected, rtol=0, atol=0)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.self_attn.o_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = LayerwiseModel(tmp_path)
    with pytest.raises(UserError, match=r"has no tensor for model\.layers\.2\.self_attn\.o_proj\.weight"), model.layer(2):
        pass


def test_weights_with_another_quantisation_are_refused(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is quantised with gptq"):
        LayerwiseModel(tmp_path)


def test_batches_of_one_shape_share_masks_and_positions() -> None:
    layerwise = LayerwiseModel(build("qwen3_moe"))
    first, second = (layerwise.begin(tokens_BT) for tokens_BT in (TOKENS_BT, TOKENS_BT.flip(1)))

    def tensors(value: Any) -> list[torch.Tensor]:
        if isinstance(value, (tuple, list)):
            return [tensor for part in value for tensor in tensors(part)]
        return [value] if isinstance(value, torch.Tensor) else []

    pairs = zip(tensors([*first.calls[1][1].values()]), tensors([*second.calls[2][1].values()]), strict=True)
    assert all(one is other for one, other in pairs)
