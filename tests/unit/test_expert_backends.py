import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mone_common.checkpoint_folder import Checkpoint
from mone_model import expert_backends
from mone_model.config import ComputeConfig, ModelConfig, ParallelConfig
from mone_model.expert_backends import BACKENDS, ExpertOutput, Measured, choose_backend, measure
from tests.tiny import facts_of
from train.config import RunConfig
from train.training_run import agree_on_experts

MODEL = ModelConfig(hidden_size=32, num_attention_heads=4, vocab_size=8)
NARROW = ModelConfig(hidden_size=24, num_attention_heads=2)


@pytest.mark.parametrize(
    ("model", "parallel", "compute", "reason"),
    [
        (MODEL, ParallelConfig(), {"cpu_kernels": "off"}, "needs compute.cpu_kernels=auto, not off"),
        (MODEL, ParallelConfig(), {"precision": "bf16"}, "needs compute.precision=fp32, not bf16"),
        (
            ModelConfig(hidden_size=24, num_attention_heads=2),
            ParallelConfig(),
            {},
            "needs model.hidden_size to be a multiple of 16",
        ),
        (MODEL, ParallelConfig(expert_tensor=2), {}, "needs whole experts: parallel.expert_tensor=1, not 2"),
    ],
)
def test_an_unavailable_sparse_backend_is_refused(
    model: ModelConfig, parallel: ParallelConfig, compute: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=f"compute.experts=sparse: {reason}"):
        choose_backend(model, parallel, ComputeConfig(experts="sparse", **compute))
    assert choose_backend(model, parallel, ComputeConfig(**compute)) in ("grouped", "loop")


def test_the_default_backend_is_replaced_only_by_a_much_faster_one() -> None:
    assert Measured({"grouped": 1.0, "loop": 0.9, "sparse": 0.87}).fastest == "grouped"
    assert Measured({"grouped": 1.0, "loop": 0.5, "sparse": 0.45}).fastest == "loop"
    assert Measured({"grouped": 1.0, "loop": 0.5, "sparse": 0.2}).fastest == "sparse"


def test_every_backend_is_measured_by_its_best_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    rounds = {"grouped": iter([9.0, 3, 5, 4]), "loop": iter([2.0, 2, 1, 2]), "sparse": iter([6.0, 7, 8, 9])}

    class Timed:
        def __init__(self, name: str) -> None:
            self.name, self.prepare, self.timed = name, BACKENDS[name].prepare, BACKENDS[name].compute

        def compute(self, *inputs: Any) -> ExpertOutput:
            clock[0] += next(rounds[self.name])
            return self.timed(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(expert_backends, "BACKENDS", {name: Timed(name) for name in rounds})
        patch.setattr(time, "perf_counter", lambda: clock[0])
        measured = measure(32, 64, 16, "silu", torch.float32, sparse=True)
    assert measured.seconds == {"grouped": 3, "loop": 1, "sparse": 6}
    assert list(measure(32, 64, 64, "silu", torch.bfloat16, sparse=False).seconds) == ["grouped", "loop"]


@pytest.mark.usefixtures("one_process")
def test_a_resumed_run_keeps_its_expert_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_backends, "measure", lambda *_, **__: Measured({"grouped": 1.0, "loop": 0.1}))
    config = RunConfig(model=MODEL)

    def checkpoint(**facts: str) -> Checkpoint:
        return Checkpoint(Path("step-1"), 1, facts_of(1, **facts).to_dict(), {})

    assert agree_on_experts(config, None) == "loop"
    assert agree_on_experts(config, checkpoint()) == "loop"
    assert agree_on_experts(config, checkpoint(experts="sparse")) == "sparse"
    config.compute.experts = "grouped"
    assert agree_on_experts(config, checkpoint(experts="sparse")) == "grouped"
    config.compute = ComputeConfig(precision="bf16")
    assert agree_on_experts(config, checkpoint(experts="sparse")) == "loop"
