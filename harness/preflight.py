"""What a run would do and whether it could, before anything is started: --print-config and --dry-run."""
import os

import torch

from harness.config import Config
from harness.load import ConfigError, Loaded, format_resolved
from harness.processes import activation_dtype, device_name, peak_flops
from optim.groups import assign, update_table


def check(config: Config, model: torch.nn.Module) -> None:
    """Refuse what only the model's parameters and the number of ranks can show; `model` may be on "meta".

    Raises:
        GroupError, ConfigError: one line a problem.
    """
    params = dict(model.named_parameters())
    assignment = assign(config.optim, model.roles(), {name: tuple(p.shape) for name, p in params.items()})
    for group in config.optim:
        for name in assignment[group.name]:
            p = params[name]
            slot = torch.empty(p.numel() if group.hyper.elementwise else (1, *p.shape), device="meta")
            try:
                group.hyper.init(slot)
            except ValueError as error:
                raise ConfigError(f"optim.{group.name}: {name}: {error}") from None
    ranks, rows = int(os.environ.get("WORLD_SIZE", 1)), config.batch_tokens // config.seq_len
    if ranks > rows:
        raise ConfigError(f"{ranks} ranks, but a batch of {config.batch_tokens} tokens has {rows} rows of seq_len "
                          f"{config.seq_len}: use at most {rows} ranks, or shorter rows")


def describe(loaded: Loaded, model: torch.nn.Module) -> str:
    """The resolved configuration with origins, and a line for each group and shape; `model` may be on "meta"."""
    groups, shapes = loaded.config.optim, {name: tuple(p.shape) for name, p in model.named_parameters()}
    rows = update_table(groups, assign(groups, model.roles(), shapes), shapes)
    lines = [format_resolved(loaded).rstrip(), "",
             "# parameter groups: one update moves a parameter by about (effective lr) x (the rule's direction)",
             f"# {'group':<12}{'rule':<8}{'tensors':>8}  {'shape':<16}{'lr':>10}{'x shape':>9}{'effective':>11}"
             f"{'decay':>9}"]
    lines += [f"# {r.group:<12}{r.rule:<8}{r.count:>8}  {'x'.join(map(str, r.shape)) or 'scalar':<16}{r.lr:>10.4g}"
              f"{r.multiplier:>9.4g}{r.effective_lr:>11.4g}{r.weight_decay:>9.4g}" for r in rows]
    return "\n".join(lines)


def memory_bytes(config: Config, model: torch.nn.Module, micro_tokens: int, world: int,
                 activation: int) -> dict[str, int]:
    """An estimate of what one rank holds, in bytes, by what for; `activation` is the bytes of one activation.

    Activations are counted as torch.compile keeps them for the backward pass: per token and layer about 14 widths and 3
    MLP widths, and twice the logits in float32. State is exact: the rules' own, made on "meta".
    """
    params = dict(model.named_parameters())
    weights = sum(p.numel() * p.element_size() for p in params.values())
    assignment = assign(config.optim, model.roles(), {name: tuple(p.shape) for name, p in params.items()})
    state = 0
    for group in config.optim:
        for name in assignment[group.name]:
            p = params[name]
            slot = torch.empty(p.numel() if group.hyper.elementwise else (1, *p.shape), dtype=p.dtype, device="meta")
            state += sum(t.numel() * t.element_size() for t in group.hyper.init(slot).values())
            state += 4 * p.numel() if config.average is not None else 0
    m = config.model
    per_token = m.layers * (14 * m.width + 3 * (m.mlp_width or 4 * m.width)) * activation + 2 * 4 * m.vocab_size
    gradients = sum(4 * p.numel() for p in params.values())
    return {"weights": weights, "gradients": 2 * gradients, "optimizer state": state // world,
            "activations": per_token * micro_tokens}


def report(config: Config, model: torch.nn.Module, train, val) -> int:
    """Print what --dry-run found; 0 if the run could start, else 2. The loaders have checked their shards already."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, reason = activation_dtype(config.precision, device)
    needed = config.steps * config.batch_tokens + 1
    rank_tokens = config.batch_tokens // world
    micro_tokens = min(config.micro_batch_tokens or rank_tokens, rank_tokens)
    memory = memory_bytes(config, model, micro_tokens, world, 2 if dtype == torch.bfloat16 else 4)
    total = sum(memory.values())
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else _host_memory()
    flops = model.flops_per_token() * config.steps * config.batch_tokens
    peak = peak_flops(device_name(device))
    lines = [
        f"configuration   {config.name}: {config.steps} steps of {config.batch_tokens:,} tokens, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters",
        f"training data   {train.tokens.total:,} tokens present in {len(train.tokens.paths)} shards, "
        f"{needed:,} needed: headers good",
        f"validation      {config.val_tokens:,} tokens, {len(config.validation_steps())} times",
        f"device          {world} x {device_name(device)}, {str(dtype).removeprefix('torch.')} ({reason})",
        f"memory a rank   about {total / 2**30:.1f} GiB of {free / 2**30:.1f}: "
        + ", ".join(f"{key} {value / 2**30:.2f}" for key, value in memory.items()),
        f"work            {flops:.2e} FLOP" + (f", {flops / peak / world / 0.4 / 3600:.1f} hours at 40% of peak" if peak
                                              else "; this device's peak is not known, so no time"),
    ]
    print("\n".join(lines))
    if total > free:
        fixed = total - memory["activations"]
        fits = int((free - fixed) / memory["activations"] * micro_tokens) // config.seq_len * config.seq_len
        remedy = f"micro_batch_tokens={fits}" if fits > 0 else "more ranks or a smaller model"
        print(f"error: memory: about {total / 2**30:.1f} GiB wanted a rank, {free / 2**30:.1f} there; try {remedy}")
        return 2
    print("ready: nothing is missing")
    return 0


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
