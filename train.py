"""Train a GPT-2-sized model to a target validation loss and say how long that took.

    torchrun --standalone --nproc_per_node=8 train.py --config muon.yaml
    python train.py --config demo.yaml steps=20 optim.0.lr=0.01        # one process; --key=value works too
    python train.py --config muon.yaml --print-config | --dry-run      # what it would do; whether it could
    python train.py --config muon.yaml --resume auto                   # or --resume runs/<run>

The number of processes, the micro-batch, restarts and compilation do not change the mathematics.
"""
import argparse
import json
import math
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "2000")      # on busy cores 96 ms a CPU step, not 175: waiting threads sleep
import torch
import torch.distributed as dist

from data.loader import open_data, row_range
from data.prefetch import Prefetcher
from data.shards import ShardError, fingerprint
from data.tokenizers import count_bytes
from harness import checkpoint, preflight, processes, rundir
from harness.config import Config, config_identity, to_yaml
from harness.curve import draw
from harness.diagnose import name_culprit
from harness.inflight import InFlight, NotFinite
from harness.load import ConfigError, load
from harness.mirrors import open_sinks
from harness.progress import Progress
from model.gpt import GPT
from optim.diagnostics import Probe
from optim.driver import Optimizer
from optim.groups import GroupError


# ---------------------------------------------------------------- the clock: in a speedrun this is the claim

class Clock:
    """Every second of a run belongs to one activity of the ledger; only "training" is on the clock."""

    def __init__(self, device: torch.device):
        self.device, self.ledger = device, {}
        self.activity, self.since = "setup", time.perf_counter()

    def enter(self, activity: str) -> None:
        """Wait for the device, book the time since the last call, and go on as `activity`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.ledger[self.activity] = self.ledger.get(self.activity, 0.0) + now - self.since
        self.activity, self.since = activity, now

    @property
    def train_s(self) -> float:
        running = time.perf_counter() - self.since if self.activity == "training" else 0.0
        return self.ledger.get("training", 0.0) + running


# ---------------------------------------------------------------- what changes over a run

@dataclass(frozen=True)
class Stage:
    """What may differ from step to step; the untimed warm-up visits every distinct one."""
    batch_tokens: int


def stage(cfg: Config, step: int) -> Stage:
    return Stage(cfg.batch_tokens)


def main(argv: list[str]) -> int:
    # ------------------------------------------------------------ 1. configuration
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="a path, or the name of a file in configs/")
    parser.add_argument("--print-config", action="store_true", help="show the resolved configuration and its sources")
    parser.add_argument("--dry-run", action="store_true", help="check data, memory and settings; train nothing")
    parser.add_argument("--resume", metavar="DIR|auto", help="continue a run; auto: the newest unfinished like it")
    args, overrides = parser.parse_known_args(argv)
    if args.config is None and args.resume not in (None, "auto"):
        args.config = str(Path(args.resume) / "config.yaml")
    if args.config is None:
        raise ConfigError("--config is missing: give a path or the name of a file in configs/, e.g. --config demo.yaml")
    loaded = load(args.config, overrides)
    cfg = loaded.config
    if args.resume not in (None, "auto"):
        if cfg.trials > 1:
            raise rundir.ResumeError("--resume DIR names one run: with trials above 1 use --resume auto")
        rundir.where_to_run(args.resume, cfg.runs_dir, config_identity(cfg), several=False)
    with torch.device("meta"):
        sketch = GPT(cfg.model, cfg.seq_len)                          # shapes and roles, no memory
    preflight.check(cfg, sketch)
    if args.print_config:
        if os.environ.get("RANK", "0") == "0":
            print(preflight.describe(loaded, sketch))
        return 0

    # ------------------------------------------------------------ 2. data
    batch_tokens = [stage(cfg, step).batch_tokens for step in range(cfg.steps)]
    positions = list(accumulate(batch_tokens, initial=0))             # tokens read before each step
    train, val = open_data(cfg.data, cfg.seq_len, cfg.val_tokens, cfg.model.vocab_size, batch_tokens)
    train.check_enough(cfg.steps, cfg.batch_tokens)
    train.rows(0, 0, batch_tokens[0], 0, batch_tokens[0] // cfg.seq_len)          # a wrong vocabulary shows at once
    if args.dry_run:
        return preflight.report(cfg, sketch, train, val)

    # ------------------------------------------------------------ 3. processes and device
    procs = processes.start(cfg.deterministic)
    device, clock, stop = procs.device, Clock(procs.device), processes.StopRequest()
    preflight.check_kernels(cfg, device)
    dtype, dtype_reason = processes.activation_dtype(cfg.precision, device)
    compiled, compiled_in_words = processes.compilation(cfg.compile, device)

    # ------------------------------------------------------------ 4. model
    with device:
        model = GPT(cfg.model, cfg.seq_len, dtype, track_logits=cfg.needs_logits)
    model.init_weights(cfg.seed)
    params, roles = dict(model.named_parameters()), model.roles()
    forward = torch.compile(model, dynamic=False) if compiled else model
    attention = model.attention_over(cfg.data.documents == "separate")             # its form

    # ------------------------------------------------------------ 5. optimizer
    optimizer = Optimizer(params, roles, cfg.optim, cfg.average, cfg.grad_clip, compiled,
                          cfg.model.heads, cfg.model.tied, model.qk_parameters(), cfg.kernels)
    peak = processes.peak_flops(processes.device_name(device))
    progress = Progress(cfg.steps, cfg.batch_tokens, model.flops_per_token() * cfg.batch_tokens,
                        peak and peak * procs.world, shown=procs.is_main)
    progress.say(f"{cfg.name}: {sum(p.numel() for p in params.values()):,} parameters, {cfg.steps} steps of "
                 f"{cfg.batch_tokens:,} tokens, {procs.world} x {processes.device_name(device)}\n"
                 f"precision {str(dtype).removeprefix('torch.')} ({dtype_reason}); attention {attention}; "
                 f"loss {cfg.model.loss}; compiled {compiled_in_words}; "
                 f"orthogonalisation {optimizer.orthogonalisation}")

    # ------------------------------------------------------------ 6. a step, and a validation
    micro_rows = (cfg.micro_batch_tokens or cfg.batch_tokens) // cfg.seq_len

    def micro_batches(rows: int) -> list[tuple[int, int]]:
        """This rank's rows of a global batch of `rows`, as (first, last) runs of at most micro_rows."""
        first, last = row_range(rows, procs.rank, procs.world)
        return [(i, min(i + micro_rows, last)) for i in range(first, last, micro_rows)]

    def read_batch(step: int) -> list:
        runs = micro_batches(batch_tokens[step] // cfg.seq_len) if step < cfg.steps else []
        return [train.rows(step, positions[step], batch_tokens[step], *run) for run in runs]

    def to_device(batch) -> list[torch.Tensor]:
        return [torch.from_numpy(array).to(device) for array in batch]

    def backward(batch, tokens: int, send: bool = True) -> torch.Tensor:
        """Leave the gradient of the batch's loss in .grad, or with `send` already on its way to the owners.
        Returns this rank's loss, summed over its tokens."""
        loss = torch.zeros((), dtype=torch.float64, device=device)
        for micro, arrays in enumerate(batch, 1):                     # inputs, targets (rows, seq_len), documents?
            micro_loss = forward(*arrays, longest=train.longest_document)             # summed over tokens
            if send and micro == len(batch):
                optimizer.expect_last_gradients()
            (micro_loss / tokens if cfg.loss_reduction == "mean" else micro_loss).backward()
            loss += micro_loss.detach()
        return loss

    def train_step(step: int, batch) -> InFlight:
        optimizer.set_hyperparameters(step, cfg.schedule, cfg.steps)
        model.reset_max_logits()
        loss = backward(batch, batch_tokens[step])
        return InFlight(step + 1, optimizer.step(step, loss, stop.requested, model.max_logits()))

    def gradients(step: int, batch) -> list[torch.Tensor]:
        """The gradient that train_step would use, this rank's share of every bank; for diagnostics."""
        backward(batch, batch_tokens[step])
        return optimizer.reduced_gradients()

    @torch.no_grad()
    def val_loss() -> float:
        """Mean over val_tokens, nats per token."""
        total = torch.zeros((), dtype=torch.float64, device=device)
        for run in micro_batches(cfg.val_tokens // cfg.seq_len):
            total += forward(*to_device(val.rows(*run)), longest=val.longest_document)
        if procs.world > 1:
            dist.all_reduce(total)
        return total.item() / cfg.val_tokens

    # ------------------------------------------------------------ 7. untimed warm-up on dummy data
    # Compiles every shape of every stage. Weights and optimizer state are made anew for every trial after it.
    clock.enter("warm-up")
    stages = dict.fromkeys(stage(cfg, step) for step in range(cfg.steps))          # distinct, in order

    def dummy(loader, rows: int) -> list:
        sizes = [last - first for first, last in micro_batches(rows)]
        return [to_device(loader.dummy(n)) for n in dict.fromkeys(sizes)]

    while True:
        out_of_memory = False
        try:
            for s in stages:
                for _ in range(2):                                    # the second finds gradients there, as a step does
                    backward(dummy(train, s.batch_tokens // cfg.seq_len), s.batch_tokens, send=False)
            with torch.no_grad():
                for arrays in dummy(val, val.row_count):
                    forward(*arrays, longest=val.longest_document)
        except torch.OutOfMemoryError:
            if micro_rows == 1:
                raise
            out_of_memory = True
        if not procs.all_max(out_of_memory):                          # every rank must take the same micro-batch
            break
        micro_rows = -(-micro_rows // 2)
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        progress.say(f"out of memory: micro-batch halved to {micro_rows * cfg.seq_len:,} tokens a rank "
                     f"(to start there: micro_batch_tokens={micro_rows * cfg.seq_len})")
    optimizer.set_hyperparameters(0, cfg.schedule, cfg.steps)
    optimizer.step(0, torch.zeros((), device=device), False, model.max_logits())
    def run_trial(cfg: Config, several: bool, held: ExitStack) -> int:
        """One run with one seed, in its own directory, which is locked for as long as `held` is open; the exit code."""
        # -------------------------------------------------------- 8. a fresh start, or where a run stopped
        identity = config_identity(cfg)
        directory, resumed = procs.broadcast(
            rundir.where_to_run(args.resume, cfg.runs_dir, identity, several) if procs.is_main else None)
        if directory is None:
            progress.say(f"seed {cfg.seed}: finished already, skipped")
            return 0
        facts = dict(identity=identity, world_size=procs.world, device=processes.device_name(device),
                     activation_dtype=str(dtype), compiled=compiled, attention=attention, micro_batch_rows=micro_rows,
                     train_data=fingerprint(train.tokens.paths), val_data=fingerprint(val.tokens.paths))
        if procs.is_main and not resumed:
            directory = rundir.create(cfg.runs_dir, cfg.name, cfg.seed, to_yaml(cfg), facts)
        directory = Path(procs.broadcast(str(directory)))
        if procs.is_main:
            held.enter_context(rundir.hold(directory))                # no second process continues this run meanwhile
        model.init_weights(cfg.seed)
        optimizer.init_weights(cfg.seed)                              # of the rules that have their own
        optimizer.reset()
        start, target, clock.ledger = 0, {}, {k: clock.ledger.get(k, 0.0) for k in ("setup", "warm-up")}
        newest = checkpoint.newest_intact(directory / "checkpoints") if resumed and procs.is_main else None
        path = procs.broadcast(newest and newest[0])                  # rank 0 chooses: all must take the same one
        if path is not None:
            content = newest[1] if newest else checkpoint.load(path)
            start, target = content["step"], content["target"]
            clock.ledger = {k: clock.ledger.get(k, 0.0) + s for k, s in content["ledger"].items()}
            with torch.no_grad():
                for name, p in params.items():
                    p.copy_(content["model"][name])
            optimizer.load_state_dict(content["optimizer"], start)
            torch.set_rng_state(content["rng"])
        if resumed and procs.is_main:
            progress.say(f"resumed {rundir.note_resume(directory, start, path, facts)}")
        sinks = (open_sinks(directory, cfg, start if resumed else None, clock.train_s, progress.say)
                 if procs.is_main else [])
        progress.say(f"run directory {directory}")

        def save(step: int) -> Path:
            clock.enter("checkpoint")
            content = dict(step=step, seed=cfg.seed, identity=identity, target=target, ledger=dict(clock.ledger),
                           position=positions[step], rng=torch.get_rng_state(), optimizer=optimizer.state_dict(),
                           model={name: p.detach().cpu() for name, p in params.items()})
            where = directory / "checkpoints" / f"step_{step:06d}.pt"
            if procs.is_main:
                checkpoint.save(where.parent, step, content, cfg.keep_checkpoints)
            return where

        def summary(status: str, step: int, **last) -> None:
            clock.enter("summary")
            tokens_per_s = (positions[step] - positions[0]) / max(clock.train_s, 1e-9)
            memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
            rundir.write_text(directory / "summary.json", json.dumps(dict(
                status=status, steps=step, **last, target_val_loss=cfg.target_val_loss, target_on=cfg.target_on,
                target_step=target.get("step"), target_train_s=target.get("train_s"), train_s=clock.train_s,
                seed=cfg.seed, world_size=procs.world, tokens_per_s=tokens_per_s,
                peak_memory_bytes=memory, on_the_clock=["training"], ledger_s=clock.ledger), indent=1) + "\n")

        def note(report: InFlight) -> bool:
            """Log a finished step; whether somebody asked to stop. Raises NotFinite."""
            nonlocal noted_s
            loss, grad_norm, ok, stops = report.read()
            if not ok:
                raise NotFinite(report.completed - 1)
            completed, train_s, train_loss = report.completed, clock.train_s, loss / batch_tokens[report.completed - 1]
            lr = cfg.optim[0].hyper.lr * (cfg.optim[0].schedule or cfg.schedule).at(completed - 1, cfg.steps)
            for sink in sinks:
                sink.write(step=completed, train_s=round(train_s, 4), train_loss=train_loss, grad_norm=grad_norm, lr=lr)
            progress.step(completed, train_loss, train_s - noted_s)
            noted_s = train_s
            return stops

        def validate(step: int) -> dict[str, float]:
            clock.enter("validation")
            losses = dict(val_loss=val_loss())
            if cfg.average is not None:
                with optimizer.averaged_weights():
                    losses["val_loss_avg"] = val_loss()
            if not all(map(math.isfinite, losses.values())):
                raise NotFinite(step)
            judged = losses["val_loss_avg" if cfg.target_on == "average" else "val_loss"]
            if cfg.target_val_loss is not None and not target and judged <= cfg.target_val_loss:
                target.update(step=step, train_s=clock.train_s)
            for sink in sinks:
                sink.write(step=step, train_s=round(clock.train_s, 4), **losses)
            progress.say(f"step {step}/{cfg.steps}  " + "  ".join(f"{k} {v:.4f}" for k, v in losses.items())
                         + f"  train_s {clock.train_s:.1f}")
            return losses

        def diagnose(step: int) -> None:
            clock.enter("diagnostics")
            logits = {name: procs.all_max(S.tolist()) for name, S in model.max_logits().items()}
            found = procs.merged(probe.after())
            for sink in sinks:
                sink.write(step=step, train_s=round(clock.train_s, 4), diagnostics=found, max_logits=logits)
            clock.enter("training")

        # -------------------------------------------------------- 9. the loop: save, validate, stop?, step, log
        prefetcher, probe = Prefetcher(read_batch, device), Probe(optimizer, cfg.diagnostics)
        step, in_flight, stopping, last = start, None, False, {}
        validate_at, save_at = cfg.validation_steps(), cfg.checkpoint_steps()
        clock.enter("training")
        noted_s = clock.train_s
        try:
            while True:
                if stopping or step in validate_at or step in save_at:
                    if in_flight is not None:
                        stopping, in_flight = note(in_flight) or stopping, None
                    if stopping:
                        break
                    if step in save_at and start < step < cfg.steps:
                        save(step)
                    if step in validate_at:
                        last = validate(step)
                    clock.enter("training")
                if step == cfg.steps:
                    break
                batch, probing = prefetcher.get(step), bool(cfg.diagnostics) and step in validate_at
                if probing:
                    clock.enter("diagnostics")
                    probe.before(lambda step=step, batch=batch: gradients(step, batch))
                    clock.enter("training")
                before, in_flight = in_flight, train_step(step, batch)
                step += 1
                if device.type == "cpu" or probing:                   # nothing to wait for, or waited for already:
                    before, in_flight = in_flight, None               # read it at once (nothing else was in flight)
                if before is not None:
                    stopping = note(before)
                if probing:
                    diagnose(step)
        except NotFinite as bad:                                      # raised on every rank at the same step
            where = save(bad.step)
            culprit = name_culprit(procs, model, prefetcher.get(min(bad.step, cfg.steps - 1)))
            if procs.is_main:
                summary("not_finite", bad.step, **last)
                print(f"error: step {bad.step + 1}: {culprit} is not finite; nothing was written from it; the state "
                      f"from before it is in {where}", file=sys.stderr)
            return processes.EXIT_NOT_FINITE
        finally:
            prefetcher.close()
            for sink in sinks:
                sink.close()

        # -------------------------------------------------------- 10. the end: finished, or stopped by a signal
        where, last["decompositions_failed"] = save(step), optimizer.failures()
        if procs.is_main:
            if "val_loss" in last and cfg.data.tokenizer == "bytes":
                text_bytes = count_bytes(val.rows(0, val.row_count)[1])
                last["val_bits_per_byte"] = last["val_loss"] * cfg.val_tokens / text_bytes / math.log(2)
            clock.enter("summary")
            draw(directory, cfg.target_val_loss)
            summary("stopped" if stopping else "finished", step, **last)
        if stopping:
            progress.say(f"stopped by a signal after step {step}, saved in {where}; continue with --resume {directory}")
            return processes.EXIT_REQUEUE
        reached = (f"target {cfg.target_val_loss} reached at step {target['step']}, {target['train_s']:.1f} s"
                   if target else f"target {cfg.target_val_loss} not reached" if cfg.target_val_loss else "no target")
        progress.say(f"{directory}: val_loss {last['val_loss']:.4f}; {clock.train_s:.1f} s on the clock; {reached}")
        return 0

    for trial in range(cfg.trials):
        clock.enter("setup")
        with ExitStack() as held:
            code = run_trial(replace(cfg, seed=cfg.seed + trial, trials=1), cfg.trials > 1, held)
        if code:
            break
    progress.close()
    stop.close()
    processes.finish()
    return code


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ConfigError, ShardError, GroupError, rundir.ResumeError) as error:
        if os.environ.get("RANK", "0") == "0":
            print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(processes.EXIT_BAD_INPUT)
