"""`init.source` and mone-import: folders that do not fit are refused with one line; a resume ignores the source."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from omegaconf import OmegaConf

from mone_common.checkpoint_folder import list_checkpoints
from mone_common.console import UserError
from mone_common.run_records import read_metrics
from mone_model.config import ModelConfig
from mone_model.hf import import_model
from mone_model.hf.imported_model import find_model
from mone_model.hf.safetensors_folder import INDEX, SINGLE
from tests.tiny import TINY_MODEL, make_shards
from train import pretrain
from train.checkpoint_facts import read_facts
from train.config import RunConfig
from train.config_init import InitConfig
from train.initial_source import check_source

SIZES: dict[str, Any] = {
    "vocab_size": 70,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts in one file and in shards, and a dense model."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, head_dim=8, norm_topk_prob=True
    )
    moe = transformers.Qwen3MoeForCausalLM(config)
    moe.save_pretrained(folder / "moe")
    moe.save_pretrained(folder / "sharded", max_shard_size="20KB")
    dense = transformers.LlamaConfig(**SIZES, intermediate_size=32, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(dense).save_pretrained(folder / "dense")
    return folder


@pytest.fixture
def copy(models: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of them, to damage."""

    def make(name: str) -> Path:
        return shutil.copytree(models / name, tmp_path / name)

    return make


def config_of(source: Path, *, init: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    """A run whose model is that of the source, with changes."""
    model = ModelConfig(**vars(find_model(source).model) | changes)
    return RunConfig(model=model, init=InitConfig(source=str(source), **init or {}))


def refusal(make: Callable[[], Any]) -> str:
    """The message of a UserError, which is one line."""
    with pytest.raises(ValueError) as error:  # noqa: PT011
        make()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_changes_no_tensor_may_differ(models: Path) -> None:
    free: dict[str, Any] = {
        "activation_ratio": 0.25,
        "seq_length": 8,
        "aux_loss_coeff": 0.5,
        "hidden_dropout": 0.1,
        "vocab_multiple": 128,
    }
    check_source(config_of(models / "moe", **free))
    spelled: dict[str, Any] = {"num_query_groups": 2, "kv_channels": 8, "router_scaling_factor": 1.0}
    check_source(config_of(models / "sharded", **spelled))


def test_all_fields_that_differ_are_in_one_line(models: Path) -> None:
    config = config_of(models / "moe", num_layers=3, num_experts=8, rotary_base=500)
    message = refusal(lambda: check_source(config))
    for word in (
        "model.num_layers=3 (source: 2)",
        "model.num_experts=8 (source: 4)",
        "model.rotary_base=500 (source: 10000)",
    ):
        assert word in message
    assert "mone-import source=" in message
    assert "init.change=[rotary_base]" in message


def test_what_only_changes_the_function_may_differ_if_the_user_says_so(models: Path) -> None:
    changes: dict[str, Any] = {"rotary_base": 500, "norm_epsilon": 1e-5}
    assert "model.norm_epsilon" in refusal(lambda: check_source(config_of(models / "moe", **changes)))
    check_source(config_of(models / "moe", init={"change": [*changes]}, **changes))


UPCYCLED: dict[str, Any] = {"num_experts": 4, "router_topk": 2, "router_pre_softmax": False}


@pytest.mark.parametrize(
    ("changes", "init", "words"),
    [
        ({}, {"upcycle": False}, ["init.upcycle=true makes experts of a dense model"]),
        ({"moe_ffn_hidden_size": 24}, {}, ["model.moe_ffn_hidden_size=24: times init.upcycle_splits=1", "source's 32"]),
        ({"moe_ffn_hidden_size": 16, "num_experts": 5}, {"upcycle_splits": 2}, ["model.num_experts=5: must be a multiple"]),
        ({"router_pre_softmax": True}, {}, ["model.router_pre_softmax=true: must be false"]),
        ({"shared_expert_ffn_hidden_size": 32}, {}, ["model.shared_expert_ffn_hidden_size=32: must be 0"]),
        ({"hidden_size": 64}, {}, ["model.hidden_size=64 (source: 32)"]),
        (
            {"router_topk": 1, "router_score_function": "sigmoid"},
            {},
            ["model.router_topk=1: must be at least 2 with sigmoid"],
        ),
    ],
)
def test_upcycling_that_would_not_be_exact_is_refused(
    models: Path, changes: dict[str, Any], init: dict[str, Any], words: list[str]
) -> None:
    config = config_of(models / "dense", init={"upcycle": True} | init, **UPCYCLED | changes)
    message = refusal(lambda: check_source(config))
    for word in words:
        assert word in message


def test_a_mixture_of_experts_is_not_upcycled(models: Path) -> None:
    config = config_of(models / "moe", init={"upcycle": True})
    assert "init.upcycle=true: needs a dense source; this one has 4 experts" in refusal(lambda: check_source(config))


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and what follows it."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def rewrite(file: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def rename_tensor(folder: Path) -> None:
    header, data = header_of(folder / SINGLE)
    header["model.odd.weight"] = header.pop("model.norm.weight")
    rewrite(folder / SINGLE, header, data)


def reshape_tensor(folder: Path) -> None:
    header, data = header_of(folder / SINGLE)
    entry = header["model.embed_tokens.weight"]
    entry["shape"] = [35, 64]
    rewrite(folder / SINGLE, header, data)


def quantize(folder: Path) -> None:
    header, data = header_of(folder / SINGLE)
    header["model.norm.weight"] |= {"dtype": "I32"}
    rewrite(folder / SINGLE, header, data)


def keep_pickle(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def truncate(folder: Path) -> None:
    shard = max(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-100])


def write_text(folder: Path) -> None:
    (folder / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")


def lose_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def index_elsewhere(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../moe/model.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def index_wrong_shard(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = first if index["weight_map"]["model.norm.weight"] == last else last
    (folder / INDEX).write_text(json.dumps(index))


def untie(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))


def lose_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("moe", rename_tensor, ["lacks model.norm.weight", "also has model.odd.weight"]),
        ("moe", reshape_tensor, ["model.embed_tokens.weight has shape [35, 64], not [70, 32]"]),
        ("moe", quantize, ["model.norm.weight has type I32; choose from F32, F16, BF16"]),
        ("moe", keep_pickle, ["pytorch_model.bin, a pickle, which can execute code: convert it"]),
        ("moe", truncate, ["truncated: has", "download it again"]),
        ("sharded", truncate, ["truncated: has"]),
        ("moe", write_text, ["not a safetensors file, or truncated"]),
        ("sharded", lose_shard, ["model-00002-of-", f"of {INDEX} is missing"]),
        ("sharded", index_elsewhere, ["names '../moe/model.safetensors', which is not a file of its folder"]),
        ("sharded", index_wrong_shard, [f"has no tensor model.norm.weight, which {INDEX} expects there"]),
        ("dense", untie, ["lacks lm_head.weight"]),
        ("moe", lose_config, ["not a model: has no config.json"]),
        ("moe", break_config, ["config.json: not JSON"]),
    ],
)
def test_a_damaged_folder_is_refused_with_exit_code_2(
    copy: Callable[[str], Path],
    call_main: Callable[..., Any],
    name: str,
    damage: Callable[[Path], None],
    words: list[str],
) -> None:
    folder = copy(name)
    damage(folder)
    code, shown, errors = call_main(import_model.main, f"source={folder}")
    assert (code, shown) == (2, "")
    assert errors.count("\n") == 1
    for word in [f"error: source={folder}", *words]:
        assert word in errors


def test_the_options_are_printed_and_written(models: Path, tmp_path: Path, call_main: Callable[..., Any]) -> None:
    code, shown, _ = call_main(import_model.main, f"source={models / 'moe'}")
    assert code == 0
    assert ModelConfig(**OmegaConf.create(shown)) == find_model(models / "moe").model
    output = tmp_path / "model" / "mine.yaml"
    code, told, _ = call_main(import_model.main, f"source={models / 'moe'}", f"output={output}")
    assert (code, output.read_text()) == (0, shown)
    assert f"mone-pretrain --config-dir {tmp_path} model=mine init.source={models / 'moe'}" in told
    code, _, errors = call_main(import_model.main, f"source={models / 'moe'}", f"output={output}")
    assert code == 2
    assert "exists; give another name" in errors


def test_step_is_for_runs(models: Path) -> None:
    with pytest.raises(UserError, match="has no checkpoints, of which step=3 could be one"):
        find_model(models / "moe", step=3)


OPTIONS = [
    "data.blend=[{path: data}]",
    "run.name=mine",
    "compute.experts=grouped",
    "training.micro_batch_size=2",
    "training.global_batch_size=4",
    "optimizer.warmup_steps=1",
    "logging.wandb_mode=disabled",
    "logging.figure_interval=0",
    "evaluation.sequences=4",
]


def test_a_run_starts_from_a_folder_and_resumes_without_it(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[..., Any],
    call_main: Callable[..., Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    make_shards(tmp_path / "data")  # a tokenizer of 64 tokens; the model has 70
    source = shutil.copytree(models / "dense", tmp_path / "dense")
    assert call_main(import_model.main, f"source={source}", f"output={tmp_path / 'imported/model/dense.yaml'}")[0] == 0
    imported = ["--config-dir", str(tmp_path / "imported"), "model=dense", *OPTIONS]
    code, _, errors = call_main(pretrain.main, *imported, f"init.source={source}", "model.num_layers=4")
    assert code == 2
    assert "model.num_layers=4 (source: 2)" in errors
    assert not (tmp_path / "runs").exists()
    upcycled = ["model.num_experts=4", "model.router_topk=2", "model.router_pre_softmax=false", "init.upcycle=true"]
    options = [*imported, f"init.source={source}", *upcycled, "model.activation_ratio=0.5", "training.steps=4"]
    first = command("train.pretrain", *options, "run.stop_at_step=2")
    assert first.returncode == 0, first.stderr
    assert f"init      weights of {source} (llama), upcycled: each copy of the MLP is 1 expert" in first.stdout
    shutil.rmtree(source)
    second = command("train.pretrain", *options)
    assert second.returncode == 0, second.stderr
    assert "init  " not in second.stdout
    run = tmp_path / "runs" / "mine"
    assert [record["step"] for record in read_metrics(run) if "train/loss" in record][-1] == 4
    assert OmegaConf.load(run / "config.yaml").init.source == str(source)
    for checkpoint in list_checkpoints(run / "checkpoints")[0]:
        initial = read_facts(checkpoint).initial
        assert initial is not None
        assert (initial["source"], initial["format"], initial["upcycle"]) == (str(source), "llama", True)
    code, _, errors = call_main(pretrain.main, *options, "run.name=other")
    assert code == 2
    assert errors.splitlines()[-1].startswith(f"error: init.source={source}: no such folder")
    assert TINY_MODEL["vocab_size"] < 70
