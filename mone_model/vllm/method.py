"""Where vLLM's layers of experts get this project's experts, and where quantized ones are refused.

vLLM lets a plugin replace classes of its layers (`register_oot`). Three are replaced: the method of experts without
quantization, which takes another class of experts; the container of the weights, which sees every method; and the last
layer of every language model, which refuses the option for a model that has no experts.
"""

from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.platforms import current_platform

from mone_common.checks import check
from mone_model.vllm.experts import NeuronExperts, check_layout, current_selection

logger = init_logger("vllm.mone")


@UnquantizedFusedMoEMethod.register_oot
class NeuronMethod(UnquantizedFusedMoEMethod):
    """Experts without quantization: those of this project, if the model selects neurons."""

    experts_cls: Any

    def __init__(self, moe: Any) -> None:
        super().__init__(moe)
        selection = current_selection()
        if selection is None:
            return
        if current_platform.is_cuda_alike():
            from mone_model.vllm import gpu_experts

            gpu_experts.check_layout(moe, selection)
            # vLLM may prefer another backend, for which it would reorder the weights.
            self.unquantized_backend, self.experts_cls = UnquantizedMoeBackend.TRITON, gpu_experts.NeuronTritonExperts
            return
        stock, device = self.experts_cls, current_platform.device_name
        on_cpu = stock is not None and issubclass(stock, CPUUnquantizedExperts)
        check(on_cpu, "device", device, "the plugin mone has experts for CPUs, and for GPUs with CUDA or ROCm")
        check_layout(moe, selection)
        self.experts_cls = NeuronExperts


@RoutedExperts.register_oot
class CheckedExperts(RoutedExperts):
    """The weights of a layer's experts; refuses a selection of neurons in quantized experts."""

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> Any:
        method = super()._get_quant_method(prefix, quant_config, moe_config)
        selection = current_selection()
        if selection is not None and not isinstance(method, NeuronMethod):
            name, refusal = type(method).__name__, "the plugin mone cannot select neurons of quantized experts"
            check(not selection.trained, "quantization", name, f"{refusal}, with which this model was trained")
            way_out = "mone.quantized=dense lets vLLM compute all their neurons"
            check(selection.quantized == "dense", "quantization", name, f"{refusal}; {way_out}")
            logger.warning_once("mone: the experts are quantized (%s): all their neurons are computed", name)
        return method


@LogitsProcessor.register_oot
class CheckedLogits(LogitsProcessor):
    """The last layer of every language model: ValueError for the option `mone` with a model without experts."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        current_selection()
