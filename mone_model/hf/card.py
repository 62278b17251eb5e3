"""The model card of an exported model: architecture, data, results and origin, from the records of the run.

write_card(Path("exported/README.md"), checkpoint, model, "mone", license="apache-2.0")
"""

import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from mone_common.checkpoint_folder import Checkpoint
from mone_common.run_folder import ENVIRONMENT_FILE, DamagedFile, read_file
from mone_common.run_records import read_metrics, read_reading
from mone_common.text import printable
from mone_model.accounting import count_parameters
from mone_model.config import ModelConfig
from mone_model.hf.formats import CLASSES


def write_card(path: Path, checkpoint: Checkpoint, model: ModelConfig, format: str, *, license: str | None) -> None:
    """Write the card. Records that the run does not have are left out."""
    run = checkpoint.path.parent.parent
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["mone", "moe"]}
    if license is not None:
        header["license"] = license
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {printable(run.resolve().name)}",
        _architecture(model, format),
        _use(format),
        _training(run, checkpoint),
    ]
    path.write_text("\n\n".join(part for part in parts if part) + "\n")


def _table(rows: list[tuple[str, object]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {printable(value)} |" for name, value in rows)])


def _architecture(model: ModelConfig, format: str) -> str:
    counted, heads = count_parameters(model), model.num_attention_heads
    paper = "Mixture of Neuron Experts ([arXiv 2510.05781](https://arxiv.org/abs/2510.05781))"
    kind = "Mixture of Experts" if model.activation_ratio == 1 else paper
    rows: list[tuple[str, object]] = [
        ("class", CLASSES[format]),
        ("parameters", f"{counted.total:,}"),
        ("parameters active for a token", f"{counted.active:,}"),
        ("`activation_ratio`: share of an expert's neurons that a token keeps", f"{model.activation_ratio:g}"),
        ("neurons of a chosen expert that a token keeps", model.describe_active_neurons()),
        (
            "`active_expert_params`: share of a chosen expert that a token touches",
            f"{counted.active_expert_params:.1%}",
        ),
        ("`active_moe_params`: the same share of the MoE layer", f"{counted.active_moe_params:.1%}"),
        ("layers, width", f"{model.num_layers}, {model.hidden_size}"),
        ("heads, key/value heads, channels", f"{heads}, {model.num_query_groups or heads}, {model.head_size}"),
        ("experts, active, neurons of each", f"{model.num_experts}, {model.router_topk}, {model.moe_ffn_hidden_size}"),
        ("neurons of the shared expert", model.shared_expert_ffn_hidden_size),
        ("gate activation", model.activation),
        ("context in tokens", model.seq_length),
        ("vocabulary", model.vocab_size),
    ]
    return f"A {kind} language model.\n\n{_table(rows)}"


def _use(format: str) -> str:
    remote = ", trust_remote_code=True" if format == "mone" else ""
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH"{remote})
tokenizer = AutoTokenizer.from_pretrained("PATH"{remote})
inputs = tokenizer("The city of", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))
```"""


def _training(run: Path, checkpoint: Checkpoint) -> str:
    rows: list[tuple[str, object]] = [("step", f"{checkpoint.step:,}")]
    facts = checkpoint.noted
    if isinstance(facts.get("samples"), int) and isinstance(facts.get("model"), dict):
        rows.append(("tokens read", f"{facts['samples'] * facts['model'].get('seq_length', 0):,}"))
    rows.append(("precision", facts.get("precision", "unknown")))
    if isinstance(facts.get("initial"), dict):
        initial = facts["initial"]
        upcycled = ", upcycled" if initial.get("upcycle") else ""
        rows.append(("initial weights", f"{Path(str(initial.get('source'))).name} ({initial.get('format')}){upcycled}"))
    try:
        for source in read_reading(run):
            rows.append((f"data: {source['name']}", f"{source['share']:.1%} of the blend, {source['epochs']:.2f} epochs"))
        records = [record for record in read_metrics(run) if record["step"] <= checkpoint.step]
        losses: dict[str, float] = {}
        for record in records:
            losses |= {
                name: value for name, value in record.items() if name.startswith("validation/") or name == "train/loss"
            }
        rows += [(f"loss: {name}", f"{value:.4f}") for name, value in sorted(losses.items()) if isinstance(value, float)]
        environment = json.loads(read_file(run / ENVIRONMENT_FILE) or b"{}")
        if isinstance(environment.get("command"), list):
            words = [Path(word).name if number < 2 else word for number, word in enumerate(map(str, environment["command"]))]
            rows.append(("command", f"`{shlex.join(words)}`"))
        rows.append(("commit of MoNE", environment.get("commit") or "unknown"))
        packages = environment.get("packages") or {}
        rows.append(("packages", ", ".join(f"{name} {version}" for name, version in packages.items() if version)))
    except (DamagedFile, ValueError, AttributeError, KeyError, TypeError):
        rows.append(("records of the run", "incomplete or damaged"))
    return f"## Training\n\n{_table(rows)}"
