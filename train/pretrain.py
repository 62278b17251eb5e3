"""Pretrain a Mixture of Neuron Experts language model.

    torchrun --nproc-per-node 2 --no-python mone-pretrain experiment=demo
    mone-pretrain --help

Compose, validate, build, run, report.
"""

import atexit
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from data_prep.shards import Manifest
from mone_common.console import ReportedError, UserError, command
from mone_common.files import writing
from mone_common.output import unblock_output
from mone_common.run_folder import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    READING_FILE,
    STATUS_FILE,
    check_free,
    lock_run_folder,
    read_status,
)
from train.checkpoint_folder import Checkpoint, list_checkpoints
from train.checkpoint_integrity import load_newest
from train.config import RunConfig, describe, load_config
from train.config_rules import PROCESSES, validate
from train.continuation import check_continues, describe_schedule, find_checkpoints, tell_of_problems
from train.data import Reading, describe_order, describe_reading, load_data, load_manifests
from train.launcher import check_launcher, ending_with_launcher, rank_and_world_size, remove_empty_logs
from train.meeting import Meeting
from train.run_tokenizer import keep_tokenizer
from train.runtime import distributed

if TYPE_CHECKING:
    from train.engines import Engine
    from train.loop import Trainer
    from train.watchdog import Watchdog


@command("pretrain", launched=True)
def main(hydra_config: DictConfig) -> None:
    """Run the composed configuration. Exit codes: docs/faults.md."""
    unblock_output()
    check_launcher()
    atexit.register(remove_empty_logs)
    rank, world_size = rank_and_world_size()
    if "RANK" not in os.environ and os.environ.get("SLURM_STEP_NUM_TASKS", "1") not in ("", "0", "1"):
        raise UserError("several Slurm tasks and no RANK: let srun start one torchrun on each node, not one process each")
    meeting = Meeting(rank, world_size)
    with ending_with_launcher():
        with meeting.together("checks"), naming_errors():
            config, manifests, checkpoints = prepare(hydra_config, world_size)
        with meeting.together("run folder"), naming_errors():
            lock = take_run_folder(config) if rank == 0 else None  # noqa: F841  until this process ends
            if rank == 0:
                keep_tokenizer(Path(config.run.dir), manifests[0], begun=bool(checkpoints))
        # Checkpoints are written there by all ranks, and read by others when a run goes on.
        meeting.check_shared({"run.dir": Path(config.run.dir)})
    if rank == 0:
        write_status(config, "running")
    try:
        run(config, manifests, checkpoints, meeting)
    except Exception as error:
        code = error.exit_code if isinstance(error, ReportedError) else 1
        if meeting.tell(error):
            note_failure(config, f"{type(error).__name__}: {error}", code)
        if isinstance(error, ReportedError):
            sys.exit(code)
        raise


@contextlib.contextmanager
def naming_errors() -> Iterator[None]:
    """Turn a ValueError, which names the option that is wrong, into a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def prepare(
    hydra_config: DictConfig, world_size: int, *, transformer_engine: bool | None = None, processes: str = PROCESSES
) -> tuple[RunConfig, list[Manifest], list[Checkpoint]]:
    """The checked config, the data's manifests, and the checkpoints to choose from; ValueError for whatever is wrong.

    transformer_engine: whether the layers will be Transformer Engine's; None: if they would be on this machine.
    processes: the options that set the world size, as the user types them.
    Reads only, and needs no other process: all that can be refused is refused here, before anything is built.
    """
    config = load_config(hydra_config)
    check_free(Path(config.run.dir))
    validate(config, world_size, transformer_engine=transformer_engine, processes=processes)
    manifests = load_manifests(config)
    if config.model.vocab_size is None:
        config.model.vocab_size = manifests[0].vocab_size
    elif config.model.vocab_size < manifests[0].vocab_size:
        raise ValueError(f"model.vocab_size={config.model.vocab_size}: the data's tokenizer has {manifests[0].vocab_size}")
    return config, manifests, find_checkpoints(config, manifests)


def run(config: RunConfig, manifests: list[Manifest], checkpoints: list[Checkpoint], meeting: Meeting) -> None:
    """Build and train."""
    from train.engines import build_engine
    from train.loop import Trainer
    from train.signals import StopReason, StopRequest
    from train.watchdog import EXIT_HUNG, Watchdog

    store, rank, world_size = meeting.store, meeting.rank, meeting.world_size
    timeout, note = config.run.timeout_minutes, functools.partial(note_failure, config, exit_code=EXIT_HUNG)
    watchdog = Watchdog(store, rank=rank, world_size=world_size, timeout=60 * timeout, note=note)
    # The watchdog knows more about a silent rank than the collective that waits for it: let it be the first to speak.
    joining = distributed(config.parallel, seed=config.run.seed, timeout_minutes=1.5 * timeout, store=store)
    with contextlib.closing(watchdog), ending_with_launcher() as started, joining as runtime:
        if runtime.is_main:
            print(describe_run(config, world_size), flush=True)
        with naming_errors():
            config.compute.experts = agree_on_experts(config, checkpoints[-1] if checkpoints else None)
        if runtime.is_main:
            print(f"experts   compute.experts={config.compute.experts}", flush=True)
        watchdog.enter(0, "building the model")
        engine = build_engine(config, runtime)
        stop = StopRequest(config.run.time_limit_seconds)
        checkpoint = fill_engine(config, engine, checkpoints, watchdog)
        with naming_errors():
            order, step, read = check_continues(config, manifests, checkpoint)
        watchdog.enter(step, "building the order of samples")
        samples = read + (config.training.steps - step) * config.training.global_batch_size
        data = load_data(config, manifests, order, samples=samples)
        if runtime.is_main:
            write_reading(config, data.reading)
            print(describe_reading(data.reading), flush=True)
            print(describe_schedule(config, checkpoint), flush=True)
            changed = describe_order(order, checkpoint.facts["order"] if checkpoint is not None else None)
            if changed:
                print(changed, flush=True)
            if data.unvalidated:
                print(f"no validation on {', '.join(data.unvalidated)}: fewer held-out tokens than one sequence", flush=True)
        trainer = Trainer(config, runtime, engine, data, watchdog, stop)
        newer = {found.step for found in checkpoints if checkpoint is not None and found.step > checkpoint.step}
        trainer.resume(checkpoint, passed_over=newer)
        started()
        reason = trainer.train()
        complete = trainer.step >= config.training.steps
        if runtime.is_main:
            write_status(config, "complete" if complete else "stopped", step=trainer.step, reason=StopReason(reason).name)
            print(describe_end(trainer, complete), flush=True)


def fill_engine(
    config: RunConfig, engine: "Engine", checkpoints: list[Checkpoint], watchdog: "Watchdog"
) -> Checkpoint | None:
    """Load the newest checkpoint that is intact and fits, which is returned; a collective on every rank.

    UserError if there are checkpoints and none can be loaded.
    """
    watchdog.enter(0, "verifying checkpoints")

    def state_to_fill() -> dict[str, Any]:
        watchdog.enter(0, "loading a checkpoint")
        return engine.sharded_state(loading=True)

    parallel = describe(config)["parallel"]
    checkpoint, loaded, problems = load_newest(
        checkpoints,
        state_to_fill,
        trust=config.checkpoint.trust,
        same_layout=lambda checkpoint: checkpoint.facts["parallel"] == parallel,
    )
    tell_of_problems(problems)
    if checkpoint is not None:
        engine.load_state(loaded)
    elif checkpoints:
        raise UserError(f"run.dir={config.run.dir}: none of its checkpoints can be loaded; move them away to begin anew")
    return checkpoint


def agree_on_experts(config: RunConfig, checkpoint: Checkpoint | None) -> str:
    """compute.experts without auto: as the run began, or as is fastest on the first rank; a collective on every rank.

    The rounding of all results depends on it, and a resumed run shall be the same to the bit.
    """
    import torch.distributed as dist

    from mone_model.expert_backends import choose_backend

    model, parallel, compute = config.model, config.parallel, config.compute
    if compute.experts != "auto":
        return choose_backend(model, parallel, compute)
    chosen = [""]
    if dist.get_rank() == 0:
        before = "auto" if checkpoint is None else checkpoint.facts.get("experts", "auto")
        before = "sparse" if before == "skip" else before  # its name before version 0.2
        try:
            chosen = [choose_backend(model, parallel, dataclasses.replace(compute, experts=before))]
        except ValueError:  # another machine than before
            chosen = [choose_backend(model, parallel, compute)]
    dist.broadcast_object_list(chosen)
    return chosen[0]


def write_status(config: RunConfig, state: str, **more: Any) -> None:
    """Note what the run does in status.json; with its folder gone or full, it has said so elsewhere already."""
    with contextlib.suppress(OSError), writing(Path(config.run.dir) / STATUS_FILE) as temporary:
        temporary.write_text(json.dumps({"state": state, "time": round(time.time(), 3), **more}) + "\n")


def note_failure(config: RunConfig, reason: str, exit_code: int) -> None:
    """Note in status.json why the run failed, unless another rank has done so: what followed from that is no reason."""
    with contextlib.suppress(OSError, ValueError):
        if read_status(Path(config.run.dir)).get("state") == "running":
            write_status(config, "failed", reason=reason, exit_code=exit_code)


def write_reading(config: RunConfig, reading: list[Reading]) -> None:
    """Note what the run reads of each source in data.json, for the report."""
    with contextlib.suppress(OSError), writing(Path(config.run.dir) / READING_FILE) as temporary:
        temporary.write_text(json.dumps([dataclasses.asdict(source) for source in reading], indent=1) + "\n")


def take_run_folder(config: RunConfig) -> IO[str]:
    """Lock the run folder and note there what runs and where: config.yaml and environment.json.

    ValueError if another run has the folder, or it cannot be written. The lock is held while the returned file is open.
    """
    folder = Path(config.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_run_folder(folder)
        for name, text in {
            CONFIG_FILE: OmegaConf.to_yaml(OmegaConf.structured(config)),
            ENVIRONMENT_FILE: json.dumps(environment(), indent=1) + "\n",
        }.items():
            with writing(folder / name) as temporary:
                temporary.write_text(text)
        return lock
    except OSError as error:
        raise ValueError(f"run.dir={folder}: cannot be written ({error}); give another run.dir") from error


def environment() -> dict[str, Any]:
    """Versions, machine and command of this process."""
    packages = ("mone", "torch", "megatron-core", "deepspeed", "transformer-engine", "triton", "numpy")
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "command": sys.orig_argv,
        "commit": commit(),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "world_size": rank_and_world_size()[1],
        "packages": versions,
    }


def commit() -> str | None:
    """The commit of this checkout, with -dirty if it was changed; None where this is no checkout or there is no git.

    Of code that `launch.slurm` has put into a run folder, that of the checkout it came from.
    """
    checkout = Path(__file__).parent.parent
    if (checkout / "COMMIT").exists():
        return (checkout / "COMMIT").read_text().strip()
    if not (checkout / ".git").exists() or shutil.which("git") is None:
        return None
    git = subprocess.run(["git", "-C", str(checkout), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return git.stdout.strip() or None


def describe_run(config: RunConfig, world_size: int) -> str:
    """What is about to run, in a few lines."""
    from mone_model.accounting import count_flops, count_parameters
    from mone_model.megatron.layer_spec import uses_transformer_engine

    model, parallel, training = config.model, config.parallel, config.training
    parameters, flops = count_parameters(model), count_flops(model)
    tokens = training.steps * training.global_batch_size * model.seq_length
    memory = config.estimate_memory(world_size, fused=uses_transformer_engine(config.compute))
    return "\n".join(
        [
            f"model     {parameters.total / 1e6:.1f}M parameters, {parameters.active / 1e6:.1f}M active; "
            f"{model.num_experts} experts of {model.moe_ffn_hidden_size} neurons, top {model.router_topk}",
            f"neurons   activation_ratio {model.activation_ratio:g} (K = {model.active_neurons}), "
            f"active_expert_params {parameters.active_expert_params:.1%}, "
            f"active_moe_params {parameters.active_moe_params:.1%} with router and shared expert",
            f"layout    {world_size} processes: data {config.data_parallel_size(world_size)}, tensor {parallel.tensor}, "
            f"pipeline {parallel.pipeline}, expert {parallel.expert}, expert_tensor {parallel.expert_tensor}; "
            f"{config.micro_batches(world_size)} micro-batches a step; engine {config.engine}",
            f"memory    about {memory.total / 2**30:.2f} GiB a rank for the model: weights {memory.weights / 2**30:.2f}, "
            f"gradients {memory.gradients / 2**30:.2f}, optimizer {memory.optimizer / 2**30:.2f}, "
            f"activations {memory.activations / 2**30:.2f}, working space {memory.working / 2**30:.2f}",
            f"          {describe_process_memory(memory.total)}",
            f"training  {training.steps} steps of {training.global_batch_size} x {model.seq_length} tokens "
            f"= {tokens / 1e6:.2f}M tokens, {3 * tokens * flops.dense / 1e15:.3g} PFLOP; "
            f"{config.optimizer.warmup_steps} steps of warm-up",
        ]
    )


def describe_process_memory(model: float) -> str:
    """What the estimate leaves out, so that it can be held against `memory/peak_gib`; model: its estimate in bytes."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return "of device memory; what CUDA and NCCL take for themselves comes on top"
    resident = psutil.Process().memory_info().rss
    return (
        f"and {resident / 2**30:.2f} GiB for Python and its libraries, which are loaded: about "
        f"{(model + resident) / 2**30:.2f} GiB of memory; W&B, figures and saves add some"
    )


def describe_end(trainer: "Trainer", complete: bool) -> str:
    """What came of it, and where it lies."""
    lines = []
    if trainer.validated is not None:
        step, loss = trainer.validated
        lines.append(
            f"validation loss {loss:.3f} nats per token at step {step}; "
            f"knowing only how frequent each token is would give {trainer.data.unigram_entropy:.3f}"
        )
    folder = trainer.checkpoints.parent
    figures = ", ".join(sorted(path.name for path in (folder / "figures").glob("*.png")))
    wandb = f"; {folder}/wandb/ the same for W&B (`wandb sync` uploads it)" if (folder / "wandb").is_dir() else ""
    lines += [
        "complete" if complete else f"stopped at step {trainer.step}; the same command continues",
        *([f"  {folder}/figures/        {figures}"] if figures else []),
        f"  {folder}/metrics.jsonl   every record{wandb}",
        f"  {folder}/checkpoints/    {', '.join(found.path.name for found in list_checkpoints(trainer.checkpoints)[0])}",
        f"  {folder}/config.yaml     the composed configuration; environment.json versions and machine",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
