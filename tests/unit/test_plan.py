"""The output of mone-plan."""

import re
from collections.abc import Callable

import pytest
import torch

from launch.cluster import ClusterConfig
from launch.estimate import check_run, estimate_run, propose
from launch.plan import main
from mone_model.config import ComputeConfig, ParallelConfig
from tests.conftest import ROOT
from tests.unit.test_accounting import model_config
from train.config import RunConfig
from train.config_sections import DataConfig, SourceConfig, TrainingConfig

Call = Callable[..., tuple[int, str, str]]


def config(*, expert: int = 1, pipeline: int = 1) -> RunConfig:
    return RunConfig(
        model=model_config("mone_2p8b"),
        parallel=ParallelConfig(expert=expert, pipeline=pipeline),
        compute=ComputeConfig(precision="bf16"),
        training=TrainingConfig(micro_batch_size=4, global_batch_size=256),
        data=DataConfig(blend=[SourceConfig(path="anything")]),
    )


def test_proposals_fit_run_and_come_fastest_first() -> None:
    small = ClusterConfig(gpu="a100_40gb", nodes=2)
    assert not estimate_run(config(), small).fits
    proposals = propose(config(), small)
    assert proposals
    for proposal in proposals:
        check_run(proposal.config, small)
        assert proposal.fits
        assert proposal.memory.total <= 34 * 2**30
        assert proposal.config.model == config().model
    assert sorted(proposal.seconds for proposal in proposals) == [proposal.seconds for proposal in proposals]
    assert propose(config(), ClusterConfig(memory_gib=7, reserve_gib=6)) == []


def test_time_follows_from_flops_and_the_stated_mfu() -> None:
    cluster = ClusterConfig(nodes=2, mfu=0.5, peak_tflops=100)
    # Twice the nodes: half the time. Half the utilization: twice the time.
    seconds = estimate_run(config(expert=8), cluster).compute_seconds
    assert estimate_run(config(expert=8), ClusterConfig(nodes=4, mfu=0.5, peak_tflops=100)).compute_seconds == seconds / 2
    assert estimate_run(config(expert=8), ClusterConfig(nodes=2, mfu=0.25, peak_tflops=100)).compute_seconds == 2 * seconds
    staged = estimate_run(config(expert=8, pipeline=2), cluster)
    # 2 x 8 / 2 data-parallel ranks of 4 sequences: 8 micro-batches, and one more that waits.
    assert staged.compute_seconds == pytest.approx(seconds * (1 + 1 / 8))


@pytest.mark.parametrize(
    ("gpu", "bf16", "fp32"), [("a100", 312, 19.5), ("h100", 989, 67), ("l40s", 362, 91.6), ("rtx_4090", 165, 82.6)]
)
def test_fp32_is_planned_without_tf32_which_training_does_not_use(gpu: str, bf16: float, fp32: float) -> None:
    cluster = ClusterConfig(gpu=gpu)
    assert (cluster.tflops("bf16"), cluster.tflops("fp32")) == (bf16, fp32)
    assert torch.get_float32_matmul_precision() == "highest"


def test_messages_between_nodes_are_slower() -> None:
    inside = estimate_run(config(expert=8), ClusterConfig(nodes=2))
    across = estimate_run(config(expert=16), ClusterConfig(nodes=2))
    assert inside.traffic["expert"].span == 8
    assert across.traffic_seconds["expert"] > 5 * inside.traffic_seconds["expert"]


def test_the_plan_in_docs_is_what_the_command_prints(call_main: Call) -> None:
    page = (ROOT / "docs/plan.md").read_text()
    (arguments,) = re.findall(r"^mone-plan (.*) # printed below$", page, re.MULTILINE)
    printed = page.split("```text\n")[1].split("```")[0]
    code, out, _ = call_main(main, *arguments.split())
    assert (code, out) == (0, printed)


def test_a_plan_that_does_not_fit_proposes_alternatives(call_main: Call) -> None:
    options = ("model=mone_2p8b", "compute.precision=bf16", "cluster.gpu=a100_40gb", "training.global_batch_size=256")
    code, out, _ = call_main(main, *options)
    assert code == 1
    assert re.search(r"WARNING: [\d.]+ GiB do not fit in 34 GiB", out)
    # The proposed options fit.
    (first, *_) = re.findall(r"^  \S+ s, \S+ GiB  (parallel.*)$", out, re.MULTILINE)
    code, out, _ = call_main(main, *options, *first.replace("'", "").split())
    assert code == 0, out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cluster.gpu=h1000"], "cluster.gpu=h1000: choose from a100_40gb, a100, h100"),
        (
            ["model.vocab_size=64", "parallel.expert=16"],
            "parallel.expert=16: must divide model.num_experts=8; nearest: 4, 8",
        ),
        (
            ["model.vocab_size=64", "parallel.expert=4", "cluster.gpus_per_node=6"],
            "start 4 or 8 (cluster.nodes x cluster.gpus_per_node)",
        ),
        (
            ["model.vocab_size=64", "cluster.gpu=v100", "compute.precision=bf16"],
            "compute.precision=bf16: cluster.gpu=v100 has no bf16; compute.precision=fp32, or one of a100_40gb",
        ),
        (["cluster.reserve_gib=90"], "cluster.reserve_gib=90.0: must be less than the device's 80 GiB"),
        (["model=mone_2p8b", "parallel.expert=7"], "must divide the number of processes, 8"),
        (["model=mone_tiny", "data.blend=[]"], "model.vocab_size=null: set it"),
    ],
)
def test_errors_name_the_option(call_main: Call, arguments: list[str], message: str) -> None:
    code, _, error = call_main(main, *arguments)
    assert code == 2
    assert message in error


@pytest.mark.parametrize("gpu", ["rtx_4090", "l40s", "t4"])
def test_one_small_or_older_gpu_is_planned_for(call_main: Call, gpu: str) -> None:
    precision = "fp32" if gpu == "t4" else "bf16"
    options = ("model=mone_small", "model.vocab_size=32000", f"cluster.gpu={gpu}", "cluster.gpus_per_node=1")
    code, out, _ = call_main(main, *options, f"compute.precision={precision}")
    assert code in (0, 1)
    assert f"1 = 1 x 1 {gpu}" in out
    assert "Layouts that fit" in out
    assert f"GiB usable on {gpu}" in out
