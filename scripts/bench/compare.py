"""Two configurations in turns on one machine: which trains faster, and how sure that is.

    python -m scripts.bench compare muon.yaml --against adamw.yaml
    python -m scripts.bench compare demo.yaml compile=false --against demo.yaml --rounds 20

Overrides before --against are A's, those behind it B's. The rounds go A B B A A B ...; each gives one ratio of tokens a
second, A's over B's. Of their logs: the mean, its 95 % confidence interval by Student's t, and a verdict only where the
interval leaves 1 out.
"""
import statistics

from data.arguments import at_least
from scripts.bench.report import Parser, header, one_device


def main(arguments: list[str]) -> int:
    parser = Parser("compare", __doc__)
    parser.add_argument("--rounds", type=at_least(2), default=10)
    parser.add_argument("--steps", type=at_least(1), default=10, help="steps a round")
    args, words = parser.parse_known_args(arguments)
    if words.count("--against") != 1:
        parser.error("A.yaml [key=value ...] --against B.yaml [key=value ...] is expected")
    middle = words.index("--against")
    sides = {"A": words[:middle], "B": words[middle + 1:]}
    for side, asked in sides.items():
        if not asked or asked[0].startswith("-") or "=" in asked[0]:
            parser.error(f"{side} has no configuration: A.yaml [key=value ...] --against B.yaml [key=value ...]")
    from harness.load import load
    configs = [load(asked[0], asked[1:]).config for asked in sides.values()]
    device = one_device()
    print("\n".join(compare(configs, [" ".join(asked) for asked in sides.values()], device, args.rounds, args.steps)))
    return 0


def compare(configs, names: list[str], device, rounds: int, steps: int) -> list[str]:
    from scripts.bench.interleave import interleave, ratio, seconds, verdict
    from scripts.bench.step import speed
    from scripts.bench.training import TrainingStep

    def side(cfg):
        training = TrainingStep(cfg, device)
        training.settle()
        batch = training.batch()
        return lambda: seconds(lambda: training.take(batch), steps, device) / cfg.batch_tokens

    times = interleave([side(cfg) for cfg in configs], rounds)                     # seconds a token
    found = ratio(times[1], times[0])
    lines = [header(device, f"{rounds} rounds of {steps} steps")]
    for letter, name, cfg, runs in zip("AB", names, configs, times):
        lines.append(speed(f"{letter}  {name}", statistics.median(runs) * cfg.batch_tokens, cfg.batch_tokens))
    return [*lines, f"{'tokens/s, A over B':<30}{found.mean:8.3f} x  (95 % interval {found.low:.3f} to "
                    f"{found.high:.3f})", *verdict(found)]
