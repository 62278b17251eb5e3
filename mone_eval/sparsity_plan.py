"""What a sparsification study needs: memory, disk traffic and time, before a layer is loaded.

plan = plan_of(study)
print(describe_plan(plan))
"""

import time
from dataclasses import dataclass

import torch

from mone_common.text import clock
from mone_eval.layerwise import LayerwiseModel
from mone_eval.sparsity_study import Study

MEASURED = 3
"""Products that are timed; the fastest counts."""


@dataclass(frozen=True)
class Plan:
    """The needs of a study."""

    layers: int
    streams: int
    tokens: int
    """Tokens that are scored; each stream has the hidden states of all."""
    calibration_tokens: int
    layer_bytes: int
    """The largest layer. While it is loaded, the tensors that it is made of are in memory too."""
    resident_bytes: int
    """Embeddings, head, and others that stay in memory."""
    stream_bytes: int
    """Hidden states of all streams and of the calibration text."""
    read_bytes: int
    """Weights read from disk; 0 for a model in memory."""
    flops: float
    """Multiplications and additions of all layers for all streams, and of the head."""
    flops_per_second: float
    """Of a product of matrices of the model's width on this machine, in its data type."""

    @property
    def seconds(self) -> float:
        """`flops` at the speed of a product: no study is faster."""
        return self.flops / self.flops_per_second


def plan_of(study: Study) -> Plan:
    """The needs of a study before its first layer; times a product of matrices for some tenths of a second."""
    model = study.model
    config = model.model.config.get_text_config()
    width, streams = config.hidden_size, len(study.streams)
    number = model.model.dtype.itemsize
    layer_sizes = [sum(weight.numel() for weight in layer.parameters()) for layer in model.layers]
    total = sum(weight.numel() for weight in model.model.parameters())
    tokens, calibration = sum(text.tokens for text in study.texts), study.calibration.tokens
    # With thresholds from their own hidden states, streams pass the calibration text twice: to find, and to apply them.
    own = len(study.calibration_hidden) - 1
    passes = tokens * streams + calibration * ((2 if study.per == "model" else 1) + 2 * own)
    windows = [window for text in (*study.texts, study.calibration) for window in text.windows]
    context = sum(len(window) ** 2 for window in windows) / sum(map(len, windows)) / 2
    layer_flops = sum(2 * _active(study, layer) + 4 * context * width for layer in range(len(model.layers)))
    head_flops = 2.0 * width * config.vocab_size * tokens * streams
    return Plan(
        layers=len(model.layers),
        streams=streams,
        tokens=tokens,
        calibration_tokens=calibration,
        layer_bytes=max(layer_sizes) * number,
        resident_bytes=(total - sum(layer_sizes)) * number,
        stream_bytes=(tokens * streams + calibration * (1 + own)) * width * number,
        read_bytes=sum(model.stored.values()) * (2 if study.per == "model" else 1),
        flops=layer_flops * passes + head_flops,
        flops_per_second=_product_speed(model, width),
    )


def _active(study: Study, layer: int) -> float:
    """Weights of a layer that a token is multiplied with."""
    module = study.model.layers[layer]
    total = sum(weight.numel() for weight in module.parameters() if weight.dim() > 1)
    routed = [one for one in study.experts[layer] if one.part == "routed"]
    if not routed:
        return total
    modules = dict(study.model.model.named_modules())
    weights = sum(weight.numel() for one in routed for weight in modules[one.name].parameters() if weight.dim() > 1)
    experts = sum(one.experts for one in routed)
    return total - weights + weights * min(1, _experts_per_token(study.model) / experts)


def _experts_per_token(model: LayerwiseModel) -> int:
    config = model.model.config.get_text_config()
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k")
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), 1)


def _product_speed(model: LayerwiseModel, width: int) -> float:
    """FLOP/s of [2048, D] times [D, 4D]."""
    left = torch.randn(2048, width).to(model.device, model.model.dtype)
    right = torch.randn(width, 4 * width).to(model.device, model.model.dtype)
    seconds = []
    for _ in range(MEASURED + 1):  # the first one warms up
        begin = time.perf_counter()
        (left @ right).sum().item()
        seconds.append(time.perf_counter() - begin)
    return 2 * 2048 * width * 4 * width / min(seconds[1:])


def describe_plan(plan: Plan) -> str:
    """The plan in four lines."""
    memory = 2 * plan.layer_bytes + plan.resident_bytes + plan.stream_bytes
    return "\n".join(
        (
            f"{plan.streams} streams of {plan.tokens:,} tokens, thresholds from {plan.calibration_tokens:,} other tokens",
            f"memory: at most {memory / 1e9:.2f} GB: two layers {2 * plan.layer_bytes / 1e9:.2f}, "
            f"streams {plan.stream_bytes / 1e9:.2f}, embeddings and head {plan.resident_bytes / 1e9:.2f}",
            f"disk: {plan.read_bytes / 1e9:.2f} GB of weights are read, {plan.layers} layers one after the other",
            f"time: at least {clock(plan.seconds)}: {plan.flops / 1e12:.1f} TFLOP at {plan.flops_per_second / 1e9:.0f} "
            "GFLOP/s, the speed of a product of matrices here",
        )
    )
