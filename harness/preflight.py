"""What a run would do and whether it could, before anything is started: --print-config and --dry-run."""
import importlib.util
import os

import torch

from harness.config import Config
from harness.load import ConfigError, Loaded, format_resolved
from harness.processes import activation_dtype, device_name, peak_flops
from model.head import LossError, check_loss
from optim.backend import why_not_triton
from optim.groups import GroupError
from optim.table import ParameterRow, parameter_table


def check(config: Config, model: torch.nn.Module) -> None:
    """Refuse what only the model's parameters and the number of ranks can show; `model` may be on "meta".

    Raises:
        GroupError, ConfigError: one line a problem.
    """
    table = {row.name: row for row in table_of(config, model)}
    if problems := [*_clips_nothing(config, model, table), *_balls_at_zero(config, table)]:
        raise GroupError("\n".join(problems))
    if "wandb" in config.log and importlib.util.find_spec("wandb") is None:
        raise ConfigError("log: wandb is not installed; python -m pip install wandb, or leave it out")
    ranks, rows = int(os.environ.get("WORLD_SIZE", 1)), config.batch_tokens // config.seq_len
    if ranks > rows:
        raise ConfigError(f"{ranks} ranks, but a batch of {config.batch_tokens} tokens has {rows} rows of seq_len "
                          f"{config.seq_len}: use at most {rows} ranks, or shorter rows")


def check_kernels(config: Config, device: torch.device) -> None:
    """Refuse kernels that `device` cannot run and that were asked for by name.

    Raises:
        ConfigError: one line a problem.
    """
    problems = []
    try:
        check_loss(config.model, device)
    except LossError as error:
        problems.append(str(error))
    if config.kernels == "triton" and (missing := why_not_triton(device)):
        problems.append(f"kernels: triton cannot be had here: {missing}; set kernels: auto or kernels: torch")
    if problems:
        raise ConfigError("\n".join(problems))


def _clips_nothing(config: Config, model: torch.nn.Module, table: dict[str, ParameterRow]):
    """Groups that clip attention logits where there is nothing to clip, or only half of it to scale."""
    clipping = {group.name: group.rule for group in config.optim if group.hyper.clips_heads}
    weights = [[name for name in names if table[name].role in ("q", "k")] for names in model.qk_parameters().values()]
    for name, rule in clipping.items():
        if config.model.qk_norm != "none":
            yield (f"optim.{name}: {rule} clips attention logits, which model.qk_norm bounds already: set "
                   "model.qk_norm: none, or take muon with variant: moonlight")
        if not any(table[weight].group == name for pair in weights for weight in pair):
            yield (f"optim.{name}: {rule} clips attention logits, but has neither q nor k: take muon with variant: "
                   "moonlight")
    for pair in weights:
        owners = list(dict.fromkeys(table[weight].group for weight in pair))
        if len(owners) > 1 and clipping.keys() & set(owners):
            yield (f"{' and '.join(pair)} are in the groups {' and '.join(owners)}: a rule that clips their logits "
                   "must have both")
            return                                                    # the other layers are alike


def _balls_at_zero(config: Config, table: dict[str, ParameterRow]):
    """Matrices that hyperball would keep at the norm that they start with: none."""
    groups = {group.name: group for group in config.optim}
    zero = {role for role in ("embed", "pos", "head", "attn_out", "mlp_in", "mlp_out")
            if getattr(config.model.init, role) == "zeros"}
    zero |= {"q", "k", "v"} if config.model.init.qkv == "zeros" else set()
    for role, name in dict.fromkeys((row.role, row.group) for row in table.values()):
        if groups[name].hyperball and role in zero:
            yield (f"optim.{name}: hyperball keeps {role} at zero, where it starts: give it other values in "
                   f"model.init.{'qkv' if role in ('q', 'k', 'v') else role}, or leave it out")


def table_of(config: Config, model: torch.nn.Module, world: int = 1) -> list[ParameterRow]:
    return parameter_table(config.optim, dict(model.named_parameters()), model.roles(), config.model.heads,
                           config.model.tied, world)


def describe(loaded: Loaded, model: torch.nn.Module) -> str:
    """The resolved configuration with origins, and a line for every parameter; `model` may be on "meta"."""
    rows = table_of(loaded.config, model, int(os.environ.get("WORLD_SIZE", 1)))
    width = max(len(r.name) for r in rows)
    lines = [format_resolved(loaded).rstrip(), "",
             "# parameters: one update at the peak of the schedule changes an entry by about `step rms` and takes",
             "# the share `decay` of it away; with hyperball the step is lr times the weight's own norm",
             f"# {'parameter':<{width}} {'role':<9}{'block':<10}{'fan out':>8}{'fan in':>8}  {'rule':<11}{'lr':>9}"
             f"{'step rms':>10}{'decay':>9}{'state bytes':>13}{'owner':>6}"]
    lines += [f"# {r.name:<{width}} {r.role:<9}{r.block:<10}{r.fan_out:>8}{r.fan_in:>8}  {r.rule:<11}{r.lr:>9.3g}"
              + (f"{r.step_rms:>10.3g}" if r.step_rms is not None else f"{'lr |W|':>10}")
              + f"{r.decay:>9.2g}{r.state_bytes:>13,}{r.owner:>6}" for r in rows]
    lines += ["", f"# {'group':<12}{'rule':<11}{'parameters':>13}{'state bytes a parameter':>25}{'by the formula':>16}"]
    for group in loaded.config.optim:
        own = [r for r in rows if r.group == group.name]
        numel = sum(r.numel for r in own)
        lines.append(f"# {group.name:<12}{group.rule:<11}{numel:>13,}{sum(r.state_bytes for r in own) / numel:>25.3f}"
                     f"{sum(r.formula_bytes for r in own) / numel:>16.3f}")
    return "\n".join(lines)


def memory_bytes(config: Config, model: torch.nn.Module, micro_tokens: int, world: int, activation: int,
                 compiled: bool, matmul: bool) -> dict[str, int]:
    """An estimate of what one rank holds, in bytes, by what for; `activation` is the bytes of one activation.

    Activations are what the backward pass keeps of a token: in each layer about 14 widths and 3 MLP widths, and twice
    the logits in float32; uncompiled 30 and 8, and eight times the logits; and with `matmul` attention four times the
    scores. The fused loss has the logits once, as activations. State is exact: the rules' own, made on "meta".
    """
    params = dict(model.named_parameters())
    weights = sum(p.numel() * p.element_size() for p in params.values())
    state = sum(row.state_bytes for row in table_of(config, model))
    state += sum(4 * p.numel() for p in params.values()) if config.average is not None else 0
    m = config.model
    widths, mlps, logits = (14, 3, 2) if compiled else (30, 8, 8)
    scores = 4 * m.heads * config.seq_len if matmul else 0
    of_logits = activation if m.loss == "triton" else logits * 4
    per_token = m.layers * (widths * m.width + mlps * m.mlp_hidden + scores) * activation + of_logits * m.vocab_rows
    gradients = sum(4 * p.numel() for p in params.values())
    return {"weights": weights, "gradients": 2 * gradients, "optimizer state": state // world,
            "activations": per_token * micro_tokens}


def report(config: Config, model: torch.nn.Module, train, val) -> int:
    """Print what --dry-run found; 0 if the run could start, else 2. The loaders have checked their shards already."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_kernels(config, device)
    dtype, reason = activation_dtype(config.precision, device)
    needed = config.steps * config.batch_tokens + 1
    rank_tokens = config.batch_tokens // world
    micro_tokens = min(config.micro_batch_tokens or rank_tokens, rank_tokens)
    on_gpu, form = device.type == "cuda", config.model.attention
    memory = memory_bytes(config, model, micro_tokens, world, 2 if dtype == torch.bfloat16 else 4,
                          on_gpu if config.compile is None else config.compile,
                          form == "matmul" or (form == "auto" and not on_gpu))
    total = sum(memory.values())
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else _host_memory()
    flops = model.flops_per_token() * config.steps * config.batch_tokens
    peak = peak_flops(device_name(device))
    lines = [
        f"configuration   {config.name}: {config.steps} steps of {config.batch_tokens:,} tokens, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters",
        f"training data   {train.tokens.total:,} tokens present in {len(train.tokens.paths)} shards, "
        f"{needed:,} needed: headers good",
        *_documents(train, config.steps, config.batch_tokens),
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


def _documents(train, steps: int, batch_tokens: int):
    """What rows that begin with documents leave of the tokens."""
    if train.packing is not None:
        used = train.packing.rows * train.seq_len
        yield (f"documents       {train.packing.documents:,}; rows that begin with one hold {used:,} tokens "
               f"({used / train.tokens.total:.1%}), enough for {train.steps_before_repeat(batch_tokens):,} steps of "
               f"{steps:,}")


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
