"""The whole optimizer step of a model under each rule: milliseconds, and the share of a training step.

    python -m scripts.bench optimizer                                     demo.yaml, every rule
    python -m scripts.bench optimizer --config muon.yaml --rules muon adamw splus

All of the configuration's groups take part. The rule of the one named `hidden` is replaced, as configs/demo/RULE.yaml
sets it; the configuration's own rule stays as it is. A step takes the gradients, updates and, where the rule refreshes
bases, does as much of that as the average step of a long run.
"""
import statistics
from dataclasses import replace

from data.arguments import at_least
from scripts.bench.report import BenchError, Parser, header, one_device

ENOUGH_TOKENS = 4096                        # of a batch for a CPU: the time of the others is the same again
LONG_RUN = range(1000, 2000)                # steps over which refreshes are averaged: their schedule has settled


def main(arguments: list[str]) -> int:
    parser = Parser("optimizer", __doc__)
    parser.add_argument("--config", default="demo.yaml")
    parser.add_argument("--rules", nargs="+", default=[], metavar="RULE", help="default: every rule")
    parser.add_argument("--rounds", type=at_least(1), default=10, help="steps timed; the median counts")
    args, overrides = parser.parse_known_args(arguments)
    overrides = [*[word for word in args.rules if "=" in word], *overrides]        # --rules takes what is behind it
    from harness.load import load
    from optim import RULES
    cfg = load(args.config, overrides).config
    rules = [word for word in args.rules if "=" not in word] or sorted(RULES)
    if unknown := [name for name in rules if name not in RULES]:
        parser.error(f"argument --rules: no rule {unknown[0]!r}: take some of {', '.join(sorted(RULES))}")
    if "hidden" not in [group.name for group in cfg.optim]:
        raise BenchError(f"{args.config}: no optim group is named hidden, so none can be given to another rule; its "
                         f"groups: {', '.join(group.name for group in cfg.optim)}")
    report(cfg, rules, args.rounds, one_device())
    return 0


def report(cfg, rules: list[str], rounds: int, device) -> None:
    """Print the table, a rule as soon as it is measured."""
    import torch

    from scripts.bench.training import TrainingStep, make_optimizer
    from scripts.optimizers import hidden_rule
    step = TrainingStep(cfg, device)
    passes_s, timed = forward_backward_s(step, rounds)
    print(header(device, f"median of {rounds} steps"))
    print(f"forward and backward of {cfg.name}: {1e3 * passes_s:,.2f} ms a step of {cfg.batch_tokens:,} tokens"
          + (f" ({timed:,} timed)" if timed < cfg.batch_tokens else ""))
    print(f"{'hidden rule':<14}{'ms/step':>12}{'share of a training step':>28}", flush=True)
    for name in rules:
        groups = tuple(group if group.name != "hidden" or group.rule == name else
                       replace(group, rule=name, hyper=hidden_rule(name), scheduled={}) for group in cfg.optim)
        if step.compiled:
            torch._dynamo.reset()                                     # else all rules share one limit of recompilations
        step.cfg = replace(cfg, optim=groups)
        step.optimizer = make_optimizer(step.cfg, step.model, step.compiled)
        step_s = optimizer_step_s(step, rounds)
        print(f"{name:<14}{1e3 * step_s:12,.2f}{100 * step_s / (step_s + passes_s):26.1f} %", flush=True)


def forward_backward_s(step, rounds: int) -> tuple[float, int]:
    """(seconds of a whole batch's passes, tokens that were timed: on a CPU no more than are enough); it warms up."""
    from scripts.bench.interleave import seconds
    cfg, device = step.cfg, step.device
    if device.type == "cpu":
        step.micro_rows = min(step.micro_rows, -(-ENOUGH_TOKENS // cfg.seq_len))
    step.settle(1)
    batch = step.batch()[:1]
    timed = batch[0][0].numel()
    passes_s = statistics.median(seconds(lambda: step.backward(batch), 1, device) for _ in range(rounds))
    return passes_s * cfg.batch_tokens / timed, timed


def optimizer_step_s(step, rounds: int) -> float:
    """Seconds of a step of the optimizer of `step`, refreshes averaged in."""
    import torch

    from scripts.bench.interleave import seconds
    cfg, device, optimizer, parameters = step.cfg, step.device, step.optimizer, list(step.model.parameters())
    gradients, loss = [torch.randn_like(p) for p in parameters], torch.zeros((), device=device)
    max_logits = {attn: torch.ones(cfg.model.heads, device=device) for attn in step.model.attentions()}

    def take(at: int) -> None:
        for p, g in zip(parameters, gradients):
            p.grad = g
        optimizer.set_hyperparameters(min(at, cfg.steps - 1), cfg.schedule, cfg.steps)
        optimizer.step(at, loss, False, max_logits)

    take(0), take(1)
    refreshing = [bank for bank in optimizer.banks if not bank.flat]
    due = {at: [refreshes_due(bank, at, optimizer.count[bank.group.name]) for bank in refreshing] for at in LONG_RUN}
    calmest = min(LONG_RUN, key=lambda at: sum(due[at]))              # here as few refreshes as ever, then the others
    total = statistics.median(seconds(lambda: take(calmest), 1, device) for _ in range(rounds))
    for place, bank in enumerate(refreshing):
        others = statistics.fmean(each[place] for each in due.values()) - due[calmest][place]
        if others:
            one = {key: value[:1] for key, value in bank.state.items()}
            total += others * statistics.median(seconds(lambda: bank.rule.refresh(one, calmest), 1, device)
                                                for _ in range(min(rounds, 3)))
    return total


def refreshes_due(bank, at: int, count: int) -> int:
    """How many of the bank's matrices the rule refreshes after step `at`, of `count` in its group."""
    return sum(bank.rule.refresh_due(at, bank.plan.first + i, count) for i in range(len(bank.mine) * bank.cut.blocks))
