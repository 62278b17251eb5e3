"""The same weights and data on every layout: losses, gradients, auxiliary losses, statistics."""

import math
from typing import Any

import pytest
import torch

from mone_model.neuron_selection import select_neurons_reference
from tests.distributed.worker import TIED_K, run_cases, tied_gate

# All auxiliary losses, with coefficients so large that a wrong scale is visible.
LOSSES = {
    "aux_loss_coeff": 1.0,
    "seq_aux_loss_coeff": 1.0,
    "global_aux_loss_coeff": 1.0,
    "z_loss_coeff": 0.3,
    "neuron_balance_coeff": 3.0,
}
# Padding rows of the embedding: the last of two tensor-parallel ranks has tokens and padding, or only padding.
TOKENS = 70
SOME_PADDING, MUCH_PADDING = ({"vocab_size": TOKENS, "vocab_multiple": multiple} for multiple in (96, 256))
# No discrete choice: every token uses all experts and all neurons. Gates are not negative: the neuron balance loss uses
# their magnitudes, whose slope is discontinuous at zero, and rounding always moves some gate across zero.
SMOOTH = SOME_PADDING | {"num_layers": 4, "router_topk": 4, "activation_ratio": 1.0, "activation": "sigmoid"}
SPARSE = MUCH_PADDING | {
    "num_layers": 4,
    "router_topk": 2,
    "activation_ratio": 0.25,
    "shared_expert_neuron_ratio": 0.5,
}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {}},
    2: {
        "dp2": {},
        "ep2": {"expert": 2},
        "ep2_allgather": {"expert": 2},
        "etp2": {"expert_tensor": 2},
        "tp2": {"tensor": 2},
        "tp2_ep2": {"tensor": 2, "expert": 2},
        "tp2_ep2_allgather": {"tensor": 2, "expert": 2},
        "tp2_etp2": {"tensor": 2, "expert_tensor": 2},
        "pp2": {"pipeline": 2},
        "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    },
    4: {
        "ep4": {"expert": 4},
        "ep2_dp2": {"expert": 2},
        "ep2_etp2": {"expert": 2, "expert_tensor": 2},
        "tp2_ep4": {"tensor": 2, "expert": 4},
        "tp2_ep2_etp2": {"tensor": 2, "expert": 2, "expert_tensor": 2},
        "pp2_ep2": {"pipeline": 2, "expert": 2},
        "tp2_pp2_vpp2": {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2},
        "pp2_etp2": {"pipeline": 2, "expert_tensor": 2},
    },
}
SKIPPING = ("one", "ep2_dp2", "pp2_ep2")


def cases_of(processes: int) -> dict[str, dict[str, Any]]:
    """Gradients of one step and losses of several, on each layout, in the smooth and the sparse configuration.

    A step is two global micro-batches of four sequences on every layout.
    """
    cases: dict[str, dict[str, Any]] = {}
    scores = {"normalised": "abs_gate", "unmasked": "abs_gate", "masked": "frozen"}
    by_layer = {"normalised": None, "unmasked": None, "masked": [0.5, 0.25, 0.125, 0.125]}
    for layout, parallel in LAYOUTS[processes].items():
        replicas = processes // (parallel.get("tensor", 1) * parallel.get("pipeline", 1))
        options = {
            "compute": {"token_dispatcher": "allgather"} if layout.endswith("allgather") else {},
            "training": {"micro_batch_size": 4 // replicas, "global_batch_size": 8},
        }
        for kind, model in (("smooth", SMOOTH), ("sparse", SPARSE)):
            # With all neurons kept, the normalised loss is constant: its gradient consists of rounding errors.
            for form in ("normalised", "masked") if kind == "sparse" else ("unmasked",):
                cases[f"{layout}/{kind}/{form}"] = {
                    **options,
                    "parallel": parallel | {"distributed_optimizer": False},
                    "model": model
                    | LOSSES
                    | {
                        "neuron_balance_form": form,
                        "neuron_score": scores[form],
                        "layer_activation_ratios": by_layer[form],
                    },
                    "optimizer": {"clip_grad": 0.0},
                    "gradients": True,
                }
            cases[f"{layout}/{kind}/steps"] = {
                **options,
                "parallel": parallel,
                "model": model | {"neuron_balance_coeff": 0.01, "z_loss_coeff": 0.001, "neuron_bias": kind == "sparse"},
                "run_steps": 5 if kind == "smooth" else 3,
            }
        if layout in ("one", "tp2"):
            cases[f"{layout}/bf16"] = {
                **options,
                "parallel": parallel,
                "model": SPARSE,
                "compute": {"precision": "bf16"},
                "run_steps": 3,
            }
        if layout in SKIPPING:
            cases[f"{layout}/skipping"] = cases[f"{layout}/sparse/normalised"] | {"compute": {"experts": "sparse"}}
        if layout in ("one", "pp2", "tp2_pp2_vpp2"):
            cases[f"{layout}/tied_embeddings"] = {
                **options,
                "parallel": parallel | {"overlap_communication": layout != "one"},
                "model": SMOOTH | {"tie_embeddings": True},
                # Adam divides gradients by their size, which amplifies rounding errors of the few that are nearly zero.
                "optimizer": {"eps": 1e-4},
                "run_steps": 3,
                "weights": True,
            }
    cases[f"tied/{processes}"] = {"tied": True}
    if processes == 2:
        for overlap in (False, True):
            cases["dp2/weights" + ("/overlap" if overlap else "")] = {
                "parallel": {"overlap_communication": overlap},
                "model": SPARSE,
                "compute": {"experts": "sparse"},
                "training": {"micro_batch_size": 2, "global_batch_size": 8},
                "run_steps": 3,
                "weights": True,
            }
        for micro_batches in (1, 4):
            cases[f"repeat/{micro_batches}"] = {
                "parallel": {"expert": 2, "distributed_optimizer": False},
                "model": SPARSE | LOSSES,
                "training": {"micro_batch_size": 2, "global_batch_size": 4 * micro_batches},
                "optimizer": {"clip_grad": 0.0},
                "repeat": True,
                "gradients": True,
            }
    return cases


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of all cases of all layouts."""
    return run_cases({processes: cases_of(processes) for processes in LAYOUTS}, tmp_path_factory.mktemp("layouts"))


NAMES = [layout for layouts in LAYOUTS.values() for layout in layouts if layout != "one"]


def assert_gradients_equal(actual: dict[str, Any], expected: dict[str, Any], relative: float) -> None:
    assert actual["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        difference = (actual["gradients"][name] - gradient).norm() / gradient.norm()
        assert difference < relative, f"{name}: {difference:.2e}"


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("case", ["smooth/unmasked", "sparse/normalised", "sparse/masked"])
def test_losses_and_gradients_do_not_depend_on_the_layout(results: dict[str, Any], layout: str, case: str) -> None:
    actual, expected = results[f"{layout}/{case}"], results[f"one/{case}"]
    assert actual["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert actual["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert actual["auxiliary"].keys() == expected["auxiliary"].keys()
    assert len(expected["auxiliary"]) == len(LOSSES)
    for name, value in expected["auxiliary"].items():
        torch.testing.assert_close(actual["auxiliary"][name], value, rtol=1e-6, atol=0)
    assert_gradients_equal(actual, expected, 1e-5)


@pytest.mark.parametrize("layout", ["one", *NAMES])
@pytest.mark.parametrize("case", ["smooth/unmasked", "sparse/normalised"])
def test_padding_rows_of_the_vocabulary_have_no_gradient(results: dict[str, Any], layout: str, case: str) -> None:
    gradient_VD = results[f"{layout}/{case}"]["gradients"]["output_layer.weight"]
    assert len(gradient_VD) > TOKENS
    assert gradient_VD[:TOKENS].any(dim=1).all()
    assert not gradient_VD[TOKENS:].any()


def test_the_loss_is_over_the_tokens_in_bf16_too(results: dict[str, Any]) -> None:
    # With this option, torch and Megatron-Core compute it instead of the kernels.
    assert results["one/bf16"]["losses"][0] == pytest.approx(math.log(TOKENS), abs=0.05)
    assert results["tp2/bf16"]["losses"] == pytest.approx(results["one/bf16"]["losses"], rel=2**-8)


@pytest.mark.parametrize("layout", SKIPPING)
def test_experts_that_skip_add_up_the_same_gradients(results: dict[str, Any], layout: str) -> None:
    assert_gradients_equal(results[f"{layout}/skipping"], results["one/sparse/normalised"], 1e-5)


@pytest.mark.parametrize("layout", NAMES)
def test_neuron_statistics_do_not_depend_on_the_layout(results: dict[str, Any], layout: str) -> None:
    actual, expected = results[f"{layout}/sparse/normalised"]["usage"], results["one/sparse/normalised"]["usage"]
    assert expected["tokens_LE"].sum() == SPARSE["num_layers"] * 8 * 16 * SPARSE["router_topk"]
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("kind", ["smooth", "sparse"])
def test_training_is_the_same_with_the_distributed_optimizer_and_clipping(
    results: dict[str, Any], layout: str, kind: str
) -> None:
    actual, expected = results[f"{layout}/{kind}/steps"], results[f"one/{kind}/steps"]
    assert actual["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert actual["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert min(expected["norms"]) > 0.5, "clipping must be at work"


@pytest.mark.parametrize("processes", [2, 4])
def test_ties_among_ranks_are_broken_by_the_lower_neuron_also_of_what_is_not_a_number(
    results: dict[str, Any], processes: int
) -> None:
    mask_NH = torch.cat(list(results[f"tied/{processes}"]), dim=1)
    assert torch.equal(mask_NH, select_neurons_reference(tied_gate(), TIED_K).mask_NH)


@pytest.mark.parametrize("layout", ["pp2", "tp2_pp2_vpp2"])
def test_embeddings_shared_by_the_first_and_last_stage_train_the_same(results: dict[str, Any], layout: str) -> None:
    actual, expected = results[f"{layout}/tied_embeddings"], results["one/tied_embeddings"]
    assert actual["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert actual["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    for name, weight in expected["weights"].items():
        assert (actual["weights"][name] - weight).norm() < 1e-5 * weight.norm(), name


def test_overlapped_communication_saves_whole_weights(results: dict[str, Any]) -> None:
    plain, overlapped = results["dp2/weights"], results["dp2/weights/overlap"]
    assert plain["losses"] == overlapped["losses"]
    for name, weight in plain["weights"].items():
        assert torch.equal(weight, overlapped["weights"][name]), name


@pytest.mark.parametrize("layout", ["one", *NAMES])
@pytest.mark.parametrize("case", ["sparse/normalised", "sparse/steps"])
def test_memory_is_estimated_on_every_layout(results: dict[str, Any], layout: str, case: str) -> None:
    # "steps" shards the optimizer state, the other case does not.
    measured, estimated = results[f"{layout}/{case}"]["memory"]
    assert measured == estimated


def test_the_losses_are_not_trivially_zero(results: dict[str, Any]) -> None:
    for name, value in results["one/sparse/normalised"]["auxiliary"].items():
        assert (value > 0).all(), name


def test_scale_does_not_grow_with_the_number_of_micro_batches(results: dict[str, Any]) -> None:
    one, four = results["repeat/1"], results["repeat/4"]
    assert one["losses"] == pytest.approx(four["losses"], rel=1e-6)
    for name, value in one["auxiliary"].items():
        torch.testing.assert_close(four["auxiliary"][name], value, rtol=1e-6, atol=0)
    assert_gradients_equal(four, one, 1e-5)
