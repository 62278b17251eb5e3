"""The model in vLLM: a plugin that serves Mixture of Neuron Experts models, and other MoE models with fewer neurons.

    python -m vllm.entrypoints.openai.api_server --model exported
    python -m vllm.entrypoints.openai.api_server --model mixtral --additional-config '{"mone": {"ratio": 0.25}}'

vLLM finds it by the entry point `vllm.general_plugins` and calls `mone_model.vllm.plugin.register` in each of its processes.
Router, dispatch, attention and shared experts without selection are vLLM's; the routed experts are this project's backends.
The process imports torch, transformers and vLLM, and nothing that trains. docs/serving.md describes the options.
"""
