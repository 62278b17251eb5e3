"""Checkpoints of both engines and all layouts are interchangeable, bit by bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_layouts import SMOOTH
from tests.distributed.worker import differences, run_cases
from tests.tiny import facts_of
from train.checkpoint import Saver
from train.checkpoint_integrity import list_checkpoints
from train.config_sections import CheckpointConfig

STEPS = 3
MODEL = SMOOTH | {"neuron_balance_coeff": 0.01, "z_loss_coeff": 0.001}
BF16 = {"compute": {"precision": "bf16"}}
EP2: dict[str, Any] = {"expert": 2}
PLAIN_EP2: dict[str, Any] = {"expert": 2, "distributed_optimizer": False}


def deepspeed(stage: int, **more: Any) -> dict[str, Any]:
    return {"engine": "deepspeed", "deepspeed": {"zero_stage": stage, **more}}


# Cases that two processes save after three steps.
SAVED: dict[str, dict[str, Any]] = {
    "megatron ep2": {"parallel": EP2},
    "megatron plain ep2": {"parallel": PLAIN_EP2},
    "ZeRO 2 ep2": {"parallel": EP2, **deepspeed(2)},
    "ZeRO 1 dp2": {**deepspeed(1)},
    "megatron ep2 bf16": {"parallel": EP2, **BF16},
    "ZeRO 3 ep2 bf16": {"parallel": EP2, **BF16, **deepspeed(3)},
}
# Cases that load them: number of processes, saved case, and options of the new run.
LOADED: list[tuple[int, str, str, dict[str, Any]]] = [
    (1, "megatron ep2", "megatron on one process", {}),
    (2, "megatron ep2", "megatron dp2", {}),
    (2, "megatron ep2", "megatron tp2", {"parallel": {"tensor": 2}}),
    (2, "megatron ep2", "megatron pp2", {"parallel": {"pipeline": 2}}),
    (2, "megatron ep2", "megatron pp2_vpp2", {"parallel": {"pipeline": 2, "virtual_pipeline": 2}}),
    (2, "megatron ep2", "megatron etp2", {"parallel": {"expert_tensor": 2}}),
    (4, "megatron ep2", "megatron ep4", {"parallel": {"expert": 4}}),
    (2, "megatron ep2", "ZeRO 0 ep2", {"parallel": EP2, **deepspeed(0)}),
    (2, "megatron ep2", "ZeRO 1 ep2", {"parallel": EP2, **deepspeed(1)}),
    (2, "megatron ep2", "ZeRO 3 ep2", {"parallel": EP2, **deepspeed(3)}),
    (2, "megatron ep2", "ZeRO 2 offloaded", {"parallel": EP2, **deepspeed(2, offload_optimizer=True)}),
    (2, "megatron plain ep2", "megatron ep2", {"parallel": EP2}),
    (1, "ZeRO 2 ep2", "megatron on one process", {}),
    (2, "ZeRO 2 ep2", "megatron tp2", {"parallel": {"tensor": 2}}),
    (2, "ZeRO 1 dp2", "megatron plain ep2", {"parallel": PLAIN_EP2}),
    (1, "megatron ep2 bf16", "megatron on one process", BF16),
    (2, "megatron ep2 bf16", "megatron ep2", {"parallel": EP2, **BF16}),
    (2, "megatron ep2 bf16", "megatron plain ep2", {"parallel": PLAIN_EP2, **BF16}),
    (2, "megatron ep2 bf16", "ZeRO 1 offloaded", {**BF16, **deepspeed(1, offload_optimizer=True)}),
    (2, "megatron ep2 bf16", "ZeRO 3 ep2", {"parallel": EP2, **BF16, **deepspeed(3)}),
    (2, "ZeRO 3 ep2 bf16", "ZeRO 3 ep2", {"parallel": EP2, **BF16, **deepspeed(3)}),
    (1, "ZeRO 3 ep2 bf16", "megatron on one process", BF16),
]
NAMES = [f"{saved} -> {by}" for _, saved, by, _ in LOADED]
# bf16 is compared on the same layout only: on others, fp32 rounding soon changes a weight to the next bf16 number.
UNINTERRUPTED: dict[str, tuple[int, dict[str, Any]]] = {
    "fp32": (1, {}),
    "megatron ep2 bf16": (2, SAVED["megatron ep2 bf16"]),
    "ZeRO 3 ep2 bf16": (2, SAVED["ZeRO 3 ep2 bf16"]),
}


BIAS_LOADED_BY: dict[str, dict[str, Any]] = {
    "megatron etp2": {"parallel": {"expert_tensor": 2}},
    "ZeRO 1 ep2": {"parallel": EP2, **deepspeed(1)},
}


def case_of(processes: int, options: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Steps of two micro-batches, of four sequences over all ranks."""
    parallel = options.get("parallel", {})
    replicas = processes // (parallel.get("tensor", 1) * parallel.get("pipeline", 1))
    training = {"micro_batch_size": 4 // replicas, "global_batch_size": 8}
    return {"model": MODEL, "training": training, "run_steps": STEPS, **options, **more}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the checkpoints."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    """The results of all cases."""
    cases: dict[int, dict[str, dict[str, Any]]] = {2: {}, 1: {}, 4: {}}
    for name, options in SAVED.items():
        cases[2][name] = case_of(2, options, save=str(folder / name))
    for (processes, saved, _, options), name in zip(LOADED, NAMES, strict=True):
        cases[processes][name] = case_of(processes, options, load=str(folder / saved))
    later = folder / "later"
    cases[2]["later"] = case_of(2, {"parallel": EP2}, run_steps=1, save_while_training=str(later))
    cases[2]["later, loaded"] = case_of(2, {"parallel": EP2}, run_steps=0, load=str(later))
    later = folder / "later ZeRO 3"
    cases[2]["later ZeRO 3"] = case_of(2, {"parallel": EP2, **deepspeed(3)}, run_steps=1, save_while_training=str(later))
    cases[2]["later ZeRO 3, loaded"] = case_of(2, {"parallel": EP2}, run_steps=0, load=str(later))
    biased = BF16 | {"model": MODEL | {"activation_ratio": 0.25, "neuron_bias": True}}
    cases[2]["bias"] = case_of(2, {"parallel": EP2, **biased}, save=str(folder / "bias"))
    for name, options in BIAS_LOADED_BY.items():
        cases[2][f"bias -> {name}"] = case_of(2, options | biased, run_steps=0, load=str(folder / "bias"))
    for name, (processes, options) in UNINTERRUPTED.items():
        cases[processes][f"uninterrupted {name}"] = case_of(processes, options, run_steps=2 * STEPS)
    return run_cases(cases, folder)


@pytest.mark.parametrize(("saved", "name"), [(saved, name) for (_, saved, _, _), name in zip(LOADED, NAMES, strict=True)])
def test_everything_saved_is_loaded_bit_by_bit_and_nothing_else(results: dict[str, Any], saved: str, name: str) -> None:
    assert differences(results[name]["loaded"], results[saved]["state"]) == []


@pytest.mark.parametrize("name", BIAS_LOADED_BY)
def test_the_neuron_bias_is_saved_in_fp32(results: dict[str, Any], name: str) -> None:
    saved = results["bias"]["state"]
    bias_LEH = saved["decoder.layers.mlp.experts.neuron_bias"]
    assert bias_LEH.dtype == torch.float32
    assert bias_LEH.max() > 0
    assert differences(results[f"bias -> {name}"]["loaded"], saved) == []


@pytest.mark.parametrize("saved", SAVED)
def test_a_checkpoint_has_every_weight_its_moments_and_its_master(results: dict[str, Any], saved: str) -> None:
    state = results[saved]["state"]
    kinds = {"exp_avg", "exp_avg_sq", *(["param"] if "bf16" in saved else [])}
    weights = {name for name, tensor in state.items() if tensor.dim() > 0 and not name.startswith("optimizer.")}
    of_optimizer = {name for name in state if name.startswith("optimizer.state.")}
    assert of_optimizer == {f"optimizer.state.{kind}.{name}" for kind in kinds for name in weights}
    assert len(weights) > 10
    assert state["steps"] == state["scheduler steps"] == STEPS
    for name in weights:
        assert state[f"optimizer.state.exp_avg_sq.{name}"].any(), name
        if "bf16" in saved:
            assert state[name].dtype == torch.bfloat16
            master = state[f"optimizer.state.param.{name}"]
            assert master.dtype == torch.float32
            assert torch.equal(master.bfloat16(), state[name])


@pytest.mark.parametrize("name", [name for name in NAMES if "bf16" not in name])
def test_a_resumed_run_equals_an_uninterrupted_one(results: dict[str, Any], name: str) -> None:
    expected = results["uninterrupted fp32"]
    for part in ("losses", "norms"):
        assert results[name][part] == pytest.approx(expected[part][STEPS:], rel=1e-5)
    assert results[name]["rates"] == expected["rates"][STEPS:]
    assert results[name]["alike"]


@pytest.mark.parametrize(
    ("saved", "name"), [(saved, name) for (_, saved, _, _), name in zip(LOADED, NAMES, strict=True) if "bf16" in saved]
)
def test_a_resumed_bf16_run_equals_an_uninterrupted_one(results: dict[str, Any], saved: str, name: str) -> None:
    actual, expected = results[name], results[f"uninterrupted {saved}"]
    for part in ("losses", "norms"):
        if name == f"{saved} -> {saved.removesuffix(' bf16')}":
            assert actual[part] == expected[part][STEPS:]
        # On other layouts, gradients are rounded to bf16 at other points.
        if part == "losses" or name.endswith("ep2"):
            assert actual[part][0] == pytest.approx(expected[part][STEPS], rel=1e-5)
    assert actual["losses"] == pytest.approx(expected["losses"][STEPS:], rel=2**-8)
    assert actual["rates"] == expected["rates"][STEPS:]
    assert actual["alike"]


@pytest.mark.parametrize("case", ["later", "later ZeRO 3"])
def test_an_async_save_writes_the_state_of_its_step(results: dict[str, Any], case: str) -> None:
    result = results[case]
    assert result["unpublished"] == [True, True], "a folder had its final name before everything was written"
    assert result["published"] == "step-00000001"
    changed = set(differences(result["before"], result["after"]))
    assert changed == result["before"].keys(), "the steps meanwhile changed everything"
    assert differences(results[f"{case}, loaded"]["loaded"], result["before"]) == []


@pytest.mark.usefixtures("one_process")
def test_keep_last_and_keep_every(tmp_path: Path) -> None:
    saver = Saver(tmp_path, CheckpointConfig(keep_last=2, keep_every=20))
    for step in (10, 20, 30, 40, 50, 60, 70):
        saver.save(step=step, state={}, facts=facts_of(step))
        saver.finish(wait=True)
    found, problems = list_checkpoints(tmp_path)
    assert [checkpoint.step for checkpoint in found] == [20, 40, 60, 70]
    assert problems == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in (20, 40, 60, 70)]
