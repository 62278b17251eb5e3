"""Like worker.py, with a choice of the engine."""

import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from mone_model.config import ComputeConfig, ModelConfig, ParallelConfig
from mone_model.gpt import moe_layers
from mone_model.loss_record import reduce_losses
from tests.distributed.worker import batches
from tests.tiny import TINY_MODEL
from train.config import DeepSpeedSection, OptimizerSection, RunConfig, TrainingConfig
from train.engines.deepspeed import DeepSpeedEngine
from train.engines.megatron import MegatronEngine
from train.loop import auxiliary_loss_names
from train.runtime import Runtime, build_groups, distributed, set_seeds


def run_case(case: dict[str, Any], runtime: Runtime) -> dict[str, Any]:
    config = RunConfig(
        model=ModelConfig(**TINY_MODEL | case.get("model", {})),
        parallel=ParallelConfig(**case.get("parallel", {})),
        compute=ComputeConfig(**case.get("compute", {})),
        training=TrainingConfig(**{"steps": 100, "micro_batch_size": 4, "global_batch_size": 4} | case.get("training", {})),
        optimizer=OptimizerSection(**{"warmup_steps": 2, "clip_grad": 0.5} | case.get("optimizer", {})),
        deepspeed=DeepSpeedSection(**case.get("deepspeed", {})),
    )
    build_groups(config.parallel)
    set_seeds(config.run.seed)
    kind = DeepSpeedEngine if case.get("engine") == "deepspeed" else MegatronEngine
    engine: Any = kind(config, runtime)
    layers = [layer for module in engine.modules for layer in moe_layers(module)]
    read = batches(config, False)
    micro_batches = config.micro_batches(runtime.world_size)
    if case.get("load"):
        engine.load_state(dist_checkpointing.load(engine.sharded_state(loading=True), case["load"]))
        for _ in range(case["skip_steps"] * micro_batches):
            next(read)
    losses, norms, rates, applied = [], [], [], []
    poison = case.get("poison", [])
    refuse = case.get("refuse", [])
    intact = []
    for step in range(case.get("run_steps", 1)):
        for _, experts, router in layers:
            experts.record.reset()
            router.record.reset()
        options = {}
        if kind is DeepSpeedEngine:
            options["accept"] = lambda loss, norm, step=step: step not in refuse
        before = None
        if step in refuse or step in poison:
            before = {k: v.clone() for k, v in flat_state(engine).items()}
        hook = None
        if step in poison:
            p = dict(engine.modules[0].named_parameters())[case["poison_name"]]
            hook = p.register_hook(lambda g: g * float("nan") if runtime.rank == runtime.world_size - 1 else g)
        result = engine.train_step(read, micro_batches=micro_batches, **options)
        if hook:
            hook.remove()
        if before is not None:
            after = flat_state(engine)
            intact.append(all(torch.equal(before[k], after[k]) for k in before))
        losses.append(result.loss)
        norms.append(result.grad_norm)
        rates.append(result.learning_rate)
        applied.append(result.applied)
    auxiliary = reduce_losses(
        {layer: [experts.record, router.record] for layer, experts, router in layers},
        names=auxiliary_loss_names(config),
        num_layers=config.model.num_layers,
    )
    evaluated = engine.evaluate(batches(config, False), micro_batches=2)
    if case.get("save"):
        if runtime.is_main:
            Path(case["save"]).mkdir(parents=True, exist_ok=True)
        dist.barrier()
        dist_checkpointing.save(engine.sharded_state(), case["save"])
    out = {
        "losses": losses,
        "norms": norms,
        "auxiliary": auxiliary,
        "eval": evaluated,
        "rates": rates,
        "applied": applied,
        "intact": intact,
    }
    # same on all ranks?
    mine = torch.tensor(losses + norms, dtype=torch.float64)
    gathered = [torch.empty_like(mine) for _ in range(runtime.world_size)]
    dist.all_gather(gathered, mine)
    out["same"] = all(torch.equal(torch.nan_to_num(g), torch.nan_to_num(mine)) for g in gathered)
    return out


def flat_state(engine: Any) -> dict[str, torch.Tensor]:
    state = engine.sharded_state()
    flat = {"step": torch.tensor(state["optimizer_step"])}
    for k, v in state["model0"].items():
        if torch.is_tensor(getattr(v, "data", None)):
            flat["w/" + k] = v.data.detach().clone()
    for kind, d in state["optimizer"].items():
        for k, v in d.items():
            flat[f"{kind}/{k}"] = v.data.detach()
    return flat


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    with distributed(ParallelConfig(), seed=1, timeout_minutes=2) as runtime:
        parallel_state.destroy_model_parallel()
        results = {}
        for name, case in cases.items():
            began = time.monotonic()
            try:
                results[name] = run_case(case, runtime)
            except Exception:
                results[name] = {"error": traceback.format_exc()}
            parallel_state.destroy_model_parallel()
            if runtime.is_main:
                torch.save(results, sys.argv[2])
            if runtime.is_main:
                print(name, f"{time.monotonic() - began:.1f}s", results[name].get("error", "")[-1500:], flush=True)
        if runtime.is_main:
            torch.save(results, sys.argv[2])
        build_groups(ParallelConfig())


if __name__ == "__main__":
    main()
