"""Models of transformers in ours: logits on every layout, gradients, upcycling, and our own checkpoints as a source."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from mone_common.console import UserError
from mone_model.config import ModelConfig
from mone_model.hf.configuration_mone import MoneConfig
from mone_model.hf.export import ExportConfig, export
from mone_model.hf.imported_model import find_model
from mone_model.hf.modeling_mone import MoneForCausalLM
from mone_model.hf.sources import StoredWeights
from mone_model.hf.weight_map import NAMES, weight_map
from tests.distributed.worker import run_cases, sequence
from tests.tiny import TINY_MODEL

VOCABULARY = 70  # padded: the last of two tensor-parallel ranks has tokens and padding
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
CLASSES: dict[str, Any] = {
    "qwen3_moe": (
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig(**COMMON | MOE, head_dim=16, norm_topk_prob=True),
    ),
    "mixtral": (
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig(**COMMON, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2),
    ),
    "olmoe": (
        transformers.OlmoeForCausalLM,
        transformers.OlmoeConfig(**COMMON, intermediate_size=16, num_experts=4, num_experts_per_tok=2),
    ),
    "mone": (
        MoneForCausalLM,
        MoneConfig(
            **COMMON | MOE,
            head_dim=8,
            hidden_act="relu2",
            norm_topk_prob=True,
            scoring_func="sigmoid",
            use_expert_bias=True,
            routed_scaling_factor=1.5,
            shared_expert_intermediate_size=16,
            qk_layernorm_scope="projection",
        ),
    ),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**COMMON, intermediate_size=32, head_dim=8)),
    "qwen3": (
        transformers.Qwen3ForCausalLM,
        transformers.Qwen3Config(**COMMON, intermediate_size=32, head_dim=16, tie_word_embeddings=True),
    ),
    "mistral": (
        transformers.MistralForCausalLM,
        transformers.MistralConfig(**COMMON, intermediate_size=32, sliding_window=None),
    ),
}
DENSE = ("llama", "qwen3", "mistral")
ROUND_TRIP = ("qwen3_moe", "mixtral", "mone")
EP2: dict[str, Any] = {"expert": 2}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {}},
    2: {
        "tp2": {"tensor": 2},
        "ep2": EP2,
        "tp2_ep2": {"tensor": 2, "expert": 2},
        "tp2_etp2": {"tensor": 2, "expert_tensor": 2},
        "pp2": {"pipeline": 2},
        "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    },
}
# A dense model in fp32, upcycled: options of the model and of init.
UPCYCLED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "copies": ({"router_topk": 2, "moe_ffn_hidden_size": 32}, {}),
    "splits": ({"router_topk": 2, "moe_ffn_hidden_size": 16, "router_scaling_factor": 2.5}, {"upcycle_splits": 2}),
    "sigmoid": (
        {"router_topk": 2, "moe_ffn_hidden_size": 16, "router_score_function": "sigmoid", "expert_bias": True},
        {"upcycle_splits": 2},
    ),
    "noise": ({"router_topk": 2, "moe_ffn_hidden_size": 16}, {"upcycle_splits": 2, "upcycle_noise": 0.1}),
}
TOKENS = torch.stack([sequence(100 + index, 16)["tokens"] for index in range(4)])


def layouts_of(family: str) -> Iterator[tuple[int, str]]:
    """Number of processes and name of the layouts that a family is imported on; a dense one has a single expert."""
    for processes, layouts in LAYOUTS.items():
        for name, parallel in layouts.items():
            if family not in DENSE or "expert" not in parallel:
                yield processes, name


# OLMoE's norm of queries and keys sums over the heads of all tensor-parallel ranks.
GRADIENTS = [*((family, "one") for family in CLASSES), ("olmoe", "tp2"), ("mone", "tp2_ep2"), ("olmoe", "pp2")]
IMPORTED = [(family, layout) for family in CLASSES for _, layout in layouts_of(family)]


def fields(model: ModelConfig) -> dict[str, Any]:
    """All fields, as options of a case."""
    return vars(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the models and of a checkpoint of ours."""
    return tmp_path_factory.mktemp("import")


@pytest.fixture(scope="module")
def originals(folder: Path) -> dict[str, Any]:
    """Random models of all families, saved below `folder`."""
    found = {}
    for family, (kind, config) in CLASSES.items():
        torch.manual_seed(0)
        model = kind(config).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.normal_(mean=1.0 if "norm" in name else 0.0, std=0.1 if weight.dim() > 1 else 0.3)
        # bf16 on disk, in shards, for one family; Qwen3-MoE also with fused names.
        shards = {"max_shard_size": "20KB"} if family == "mixtral" else {}
        if family == "mixtral":
            model = model.to(torch.bfloat16)
        model.save_pretrained(folder / family, **shards)
        found[family] = kind.from_pretrained(folder / family, dtype=torch.float32).eval()
    assert len(list((folder / "mixtral").glob("*.safetensors"))) > 2
    fused = folder / "fused"
    found["qwen3_moe"].config.save_pretrained(fused)
    from safetensors.torch import save_file

    save_file(
        {name: weight.contiguous() for name, weight in found["qwen3_moe"].state_dict().items()}, fused / "model.safetensors"
    )
    assert find_model(fused).folder.names == NAMES["mone"]  # type: ignore[union-attr]
    return found


def model_options(folder: Path, family: str, **changes: Any) -> dict[str, Any]:
    model = find_model(folder / family).model
    return fields(model) | {"vocab_multiple": 96, "aux_loss_coeff": 0.0} | changes


@pytest.fixture(scope="module")
def results(folder: Path, originals: dict[str, Any]) -> dict[str, Any]:
    """The results of all cases of all layouts."""
    cases: dict[int, dict[str, dict[str, Any]]] = {1: {}, 2: {}}
    for family in CLASSES:
        for processes, layout in layouts_of(family):
            cases[processes][f"{family}/{layout}"] = {
                "model": model_options(folder, family),
                "parallel": LAYOUTS[processes][layout],
                "init": {"source": str(folder / family)},
                "training": {"micro_batch_size": 1, "global_batch_size": 2 * processes},
                "logits": TOKENS.tolist(),
            }
            if family in ROUND_TRIP:
                cases[processes][f"{family}/{layout}"]["save_weights"] = str(folder / f"{family}-{layout}" / "checkpoints")
    for family, layout in GRADIENTS:
        processes = 1 if layout == "one" else 2
        cases[processes][f"{family}/{layout}/gradients"] = {
            "model": model_options(folder, family),
            "parallel": LAYOUTS[processes][layout] | {"distributed_optimizer": False},
            "init": {"source": str(folder / family)},
            "optimizer": {"clip_grad": 0.0},
            "gradients": True,
        }
    plain = {name: value for name, value in cases[2]["qwen3_moe/ep2"].items() if name != "save_weights"}
    cases[2]["fused/ep2"] = plain | {"init": {"source": str(folder / "fused")}}
    for stage in (1, 3):
        zero = {"engine": "deepspeed", "deepspeed": {"zero_stage": stage}}
        cases[2][f"qwen3_moe/ZeRO {stage}"] = plain | zero
    for name, (options, init) in UPCYCLED.items():
        model = model_options(folder, "llama", num_experts=4, router_pre_softmax=False, **options)
        source = {"source": str(folder / "llama"), "upcycle": True, **init}
        for processes, layout in ((1, "one"), (2, "ep2"), (2, "tp2_etp2")):
            cases[processes][f"{name}/{layout}"] = cases[processes][f"llama/{'one' if processes == 1 else 'tp2'}"] | {
                "model": model,
                "parallel": LAYOUTS[processes][layout],
                "init": source,
            }
    # Our own checkpoint, of two expert-parallel ranks, with another ratio and another padding of the vocabulary.
    saved = {"training": {"micro_batch_size": 2, "global_batch_size": 4}, "run_steps": 1}
    cases[2]["saved"] = saved | {"parallel": EP2, "save": str(folder / "saved" / "checkpoints")}
    for layout in ("ep2", "tp2_etp2", "pp2"):
        cases[2][f"another ratio/{layout}"] = saved | {
            "parallel": LAYOUTS[2][layout],
            "model": {"activation_ratio": 1.0, "vocab_multiple": 96, "seq_length": 8},
            "init": {"source": str(folder / "saved")},
            "logits": TOKENS[:, :8].tolist(),
        }

    # Neighbours with the same layout share processes. The checkpoint is written before it is read.
    def order(item: tuple[str, dict[str, Any]]) -> tuple[bool, str, bool]:
        name, case = item
        layout = {degree: size for degree, size in case["parallel"].items() if degree != "distributed_optimizer"}
        return layout != EP2, str(layout), name != "saved"

    ordered = sorted(cases[2].items(), key=order)
    return run_cases({2: dict(ordered), 1: cases[1]}, folder)


@torch.no_grad()
def theirs(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(TOKENS).logits
    return found


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    difference = (actual - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5, f"{difference:.1e}"


@pytest.mark.parametrize(("family", "layout"), IMPORTED)
def test_logits_are_those_of_transformers_on_every_layout(
    results: dict[str, Any], originals: dict[str, Any], family: str, layout: str
) -> None:
    assert_close(results[f"{family}/{layout}"]["logits"], theirs(originals[family]))
    assert results[f"{family}/{layout}"]["initial"]["format"] == family


@pytest.mark.parametrize(("family", "layout"), [case for case in IMPORTED if case[0] in ROUND_TRIP])
@pytest.mark.usefixtures("results")
def test_an_export_of_the_import_is_the_source_bit_by_bit(folder: Path, family: str, layout: str) -> None:
    output = folder / f"{family}-{layout}" / "exported"
    dtype = "bfloat16" if family == "mixtral" else None
    export(ExportConfig(run=str(output.parent), output=str(output), dtype=dtype))
    assert json.loads((output / "config.json").read_text())["model_type"] == family
    source, found = tensors_in(folder / family), tensors_in(output)
    assert found.keys() == source.keys()
    for name, tensor in source.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files of a folder."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("case", ["fused/ep2", "qwen3_moe/ZeRO 1", "qwen3_moe/ZeRO 3", "qwen3_moe/pp2_vpp2"])
def test_names_engines_and_layouts_give_the_same_weights(results: dict[str, Any], case: str) -> None:
    expected = {name: weight for name, weight in results["qwen3_moe/one"]["weights"].items() if "optimizer" not in name}
    for name, weight in expected.items():
        assert torch.equal(results[case]["weights"][name], weight), name


@pytest.mark.parametrize(("family", "layout"), GRADIENTS)
def test_gradients_of_a_step_are_those_of_transformers(
    results: dict[str, Any], originals: dict[str, Any], folder: Path, family: str, layout: str
) -> None:
    model = originals[family]
    batch = [sequence(index, 16) for index in range(4)]
    tokens, labels = (torch.stack([each[name] for each in batch]) for name in ("tokens", "labels"))
    loss = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())
    result = results[f"{family}/{layout}/gradients"]
    assert result["losses"] == [pytest.approx(loss.item(), rel=1e-6)]
    assert result["norms"] == pytest.approx(results[f"{family}/one/gradients"]["norms"], rel=1e-5)
    measured, estimated = result["memory"]
    assert measured == estimated
    model.zero_grad()
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    found = result["gradients"]
    config = ModelConfig(**model_options(folder, family))
    compared = 0
    for weight in weight_map(config, NAMES["dense" if family in DENSE else "mone"]):
        if weight.key not in found or weight.key.endswith("expert_bias"):
            continue
        parts = []
        for part in weight.parts:
            if part.tensor is None:
                parts.append(torch.zeros(part.rows, *weight.shape[1:]))
            else:
                whole = gradients[part.tensor][part.at]
                parts.append((whole.T if part.transposed else whole)[part.first : part.first + part.rows])
        expected = torch.cat(parts)
        assert (found[weight.key][weight.place] - expected).norm() <= 2e-5 * expected.norm() + 1e-9, weight
        compared += expected.numel()
    assert compared == sum(gradient.numel() for gradient in found.values())


@pytest.mark.parametrize("layout", ["one", "ep2", "tp2_etp2"])
@pytest.mark.parametrize("case", [name for name in UPCYCLED if name != "noise"])
def test_an_upcycled_model_starts_as_the_dense_one(
    results: dict[str, Any], originals: dict[str, Any], case: str, layout: str
) -> None:
    assert_close(results[f"{case}/{layout}"]["logits"], theirs(originals["llama"]))


def test_upcycling_adds_noise_of_the_stated_size_on_every_layout_alike(results: dict[str, Any]) -> None:
    with_noise, without = results["noise/one"]["weights"], results["splits/one"]["weights"]
    key = "decoder.layers.mlp.experts.gate_up_weight"
    difference = with_noise[key] - without[key]
    dense_std = without[key].unflatten(1, (2, 2)).transpose(2, 3).flatten(3, 4).std((-1, -2), keepdim=True)
    relative = difference.unflatten(1, (2, 2)).transpose(2, 3).flatten(3, 4) / dense_std
    assert relative.std().item() == pytest.approx(0.1, rel=0.05)
    experts = difference.transpose(0, 1)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(experts, 2))
    for layout in ("ep2", "tp2_etp2"):
        for name, weight in with_noise.items():
            assert torch.equal(results[f"noise/{layout}"]["weights"][name], weight), name


@pytest.mark.parametrize("layout", ["ep2", "tp2_etp2", "pp2"])
def test_our_checkpoint_is_a_source_for_another_ratio_and_layout(results: dict[str, Any], layout: str) -> None:
    saved, imported = results["saved"]["state"], results[f"another ratio/{layout}"]
    assert imported["initial"]["step"] == 1
    weights = {name: weight for name, weight in saved.items() if name.startswith(("decoder.", "embedding.", "output_"))}
    assert len(weights) == 14
    for name, weight in weights.items():
        found = imported["weights"][name]
        assert torch.equal(found[: len(weight)], weight), name
        assert not found[len(weight) :].any()
    assert TINY_MODEL["vocab_size"] == 64
    assert len(imported["weights"]["output_layer.weight"]) == 96


@pytest.mark.usefixtures("results")
def test_a_run_is_found_by_its_folder_and_a_checkpoint_by_its_own(folder: Path) -> None:
    run = find_model(folder / "saved")
    assert run.model == ModelConfig(**TINY_MODEL)
    (checkpoint,) = run.checkpoints
    assert find_model(checkpoint.path)._replace(path=run.path) == run
    assert find_model(folder / "saved", step=1) == run
    with pytest.raises(UserError, match=r"has no checkpoint of step=7; it has steps \[1\]"):
        find_model(folder / "saved", step=7)


@pytest.mark.usefixtures("results")
def test_a_checkpoint_without_a_tensor_of_its_model_is_refused(folder: Path) -> None:
    (checkpoint,) = find_model(folder / "saved").checkpoints
    StoredWeights(checkpoint)
    tied = dataclasses.replace(checkpoint, noted=checkpoint.noted | {"model": TINY_MODEL | {"tie_embeddings": True}})
    with pytest.raises(UserError, match="output_layer.weight is not a weight of the model"):
        StoredWeights(tied)
