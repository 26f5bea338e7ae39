"""Errors and times of the orthogonalisation's kernels, beside cuBLAS and compiled torch.

    python -m scripts.bench kernels --models small medium 1.5B      on a GPU
    python -m scripts.bench kernels                                 on a CPU: torch alone, on the demo's matrices
    python -m scripts.bench kernels --tune                          candidates for optim/kernels/configurations.py

For every stack of equal matrices of a model's layers: A = XXᵀ, B = bA + cA², and whole iterations. Operations are those
that have to be made: half of a symmetric product. The floor is their number over the rate of a large product of two
square matrices, measured first. Errors are relative to float64, of one matrix. The codes take turns; ratios are of
paired rounds, with their 95 % interval.
"""
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

from data.arguments import at_least
from scripts.bench.report import BenchError, Parser, header, one_device

# Model -> (how many, rows, cols) of the matrices in its layers: q, k, v and attn_out; mlp_in; mlp_out.
LAYERS = {"demo": (4, 128), "small": (12, 768), "medium": (24, 1024), "1.5B": (48, 1600)}
PRESETS = ("kj5", "exact12")


def stacks(model: str) -> list[tuple[int, int, int]]:
    layers, width = LAYERS[model]
    return [(4 * layers, width, width), (layers, 4 * width, width), (layers, width, 4 * width)]


class Work(NamedTuple):
    what: str
    flops: float                                # that have to be made
    make: Callable                              # X -> result, by whatever backend.chosen says
    exact: Callable                             # the same in float64


class Row(NamedTuple):
    code: str
    seconds: list[float]                        # of every round
    error: float


def works(shape: tuple[int, int, int]) -> list[Work]:
    import torch

    from optim.backend import symmetric_product
    from optim.gram import gram_flops, worth_it
    from optim.orthogonalise import iterate, polynomials
    count, rows, cols = shape
    n, m = sorted((rows, cols))

    def long(X):
        return X.mT if rows > cols else X

    def gram(X):
        P = long(X)                             # one tensor: torch, too, is to see that the product is symmetric
        return symmetric_product(P, P)

    def polynomial(X):
        A = X[:, :n, :n]                        # symmetric, see `draw`
        return symmetric_product(A, A, A, 2.03, -4.77)

    found = [Work("A = XXᵀ", count * m * n**2, gram, lambda X: long(X) @ long(X).mT),
             Work("B = bA + cA²", count * n**3, polynomial, lambda X: -4.77 * X[:, :n, :n]
                  + 2.03 * X[:, :n, :n] @ X[:, :n, :n].mT)]
    for preset in PRESETS:
        steps = polynomials(preset, None)
        standard = count * sum(3 * m * n**2 + (n**3 if c else 0) for _, _, c in steps)
        for form, flops in (("standard", standard), ("gram", count * gram_flops(rows, cols, steps))):
            if form == "standard" or worth_it(rows, cols):
                def make(X, preset=preset, form=form):
                    narrow = X.dtype if form == "standard" else torch.float16 if X.is_cuda else torch.float32
                    return iterate(X.to(narrow), preset, None, form)
                found.append(Work(f"{preset}, {form}", flops, make,
                                  lambda X, preset=preset: iterate(X, preset, None, "standard")))
    return found


def draw(shape, dtype, device):
    """A stack of normalised matrices whose first columns are symmetric ones."""
    import torch
    n = min(shape[1:])
    X = torch.randn(shape, device=device)
    X[:, :n, :n] = (X[:, :n, :n] + X[:, :n, :n].mT) / 2
    return (X / (1.02 * torch.linalg.matrix_norm(X, keepdim=True))).to(dtype)


def measure(work: Work, shape, dtype, device, codes: list[str], rounds: int) -> list[Row]:
    import torch

    from optim import backend
    from scripts.bench.interleave import interleave, seconds
    torch._dynamo.config.recompile_limit = 256  # one code object, a graph for each shape and work
    X = draw(shape, dtype, device)
    backend.chosen = "torch"
    exact = work.exact(X[:1].double())

    def side(code: str):
        make = torch.compile(work.make, dynamic=False) if code == "compiled torch" else work.make

        def run():
            backend.chosen = "triton" if code == "triton" else "torch"
            return make(X)
        return run
    sides = [side(code) for code in codes]
    errors = [((run()[:1].double() - exact).norm() / exact.norm()).item() for run in sides]
    once = max(seconds(sides[0], 1, device), 1e-6)
    times = max(1, round(0.05 / once))
    taken = interleave([lambda run=run: seconds(run, times, device) for run in sides], rounds)
    return [Row(*each) for each in zip(codes, taken, errors)]


def table(model: str, dtype, device, codes: list[str], rounds: int, rate: float) -> list[str]:
    from scripts.bench.interleave import ratio
    lines = ["", f"| {model} | what | code | ms | TFLOP/s | of rate | floor, ms | torch's time over its own | error |",
             "|-|-|-|-:|-:|-:|-:|-:|-:|"]
    whole: dict[tuple[str, str], list[float]] = {}              # (what, code) -> seconds of every round, of all stacks
    for shape in stacks(model):
        for work in works(shape):
            rows = measure(work, shape, dtype, device, codes, rounds)
            for row in rows:
                took = statistics.median(row.seconds)
                gain = ratio(rows[0].seconds, row.seconds)
                if "gram" not in work.what:     # which is not for the square ones
                    sums = whole.setdefault((work.what, row.code), [0.0] * rounds)
                    sums[:] = [a + b for a, b in zip(sums, row.seconds)]
                lines.append(f"| {'×'.join(map(str, shape))} | {work.what} | {row.code} | {1e3 * took:.3f} | "
                             f"{work.flops / took / 1e12:.3g} | {work.flops / took / rate:.0%} | "
                             f"{1e3 * work.flops / rate:.3f} | {gain.mean:.2f} ({gain.low:.2f} to {gain.high:.2f}) | "
                             f"{row.error:.1e} |")
    for (what, code), sums in whole.items():
        gain = ratio(whole[what, codes[0]], sums)
        lines.append(f"| all | {what} | {code} | {1e3 * statistics.median(sums):.3f} | | | | "
                     f"{gain.mean:.2f} ({gain.low:.2f} to {gain.high:.2f}) | |")
    return lines


def tune(models: list[str], device) -> list[str]:
    """The fastest launch for every stack, of those that this GPU can run."""
    import itertools

    import torch

    from optim.kernels.configurations import Launch, symmetric_launch
    from optim.kernels.symmetric import symmetric_product
    from scripts.bench.interleave import seconds
    lines = [f"device {torch.cuda.get_device_name(device)}, {time.strftime('%Y-%m-%d')}"]
    candidates = [Launch(*each) for each in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4, 5))]
    for shape in dict.fromkeys(stack for model in models for stack in stacks(model)):
        X = draw(shape, torch.bfloat16, device)
        P, times, took = X.mT if shape[1] > shape[2] else X, 20, {}
        for launch in candidates:
            try:
                symmetric_product(P, P, launch=launch)
                took[launch] = min(seconds(lambda: symmetric_product(P, P, launch=launch), times, device)
                                   for _ in range(3))
            except Exception as error:          # out of shared memory, of registers: other devices may have them
                lines.append(f"  {launch}: {type(error).__name__}")
        ranked = sorted(took, key=took.get)
        now = symmetric_launch(P.shape[1], torch.cuda.get_device_capability(device))
        lines += [f"{'×'.join(map(str, shape))}: in the table {now}, {1e3 * took.get(now, float('nan')):.3f} ms",
                  *(f"    {1e3 * took[launch]:.3f} ms  {launch}" for launch in ranked[:3])]
    return lines


def main(arguments: list[str]) -> int:
    parser = Parser("kernels", __doc__)
    parser.add_argument("--models", nargs="+", choices=LAYERS, metavar="MODEL", help=f"of {', '.join(LAYERS)}")
    parser.add_argument("--rounds", type=at_least(2), default=10)
    parser.add_argument("--tune", action="store_true", help="time the candidates for the table of configurations")
    args = parser.parse_args(arguments)
    device = one_device()
    from optim import backend
    from optim.orthogonalise import iteration_dtype
    from scripts.bench.breakdown import matrix_rate
    on_gpu = device.type == "cuda"
    models = args.models or (["small", "medium", "1.5B"] if on_gpu else ["demo"])
    missing = backend.why_not_triton(device)
    if args.tune and missing:
        raise BenchError(f"nothing to tune: {missing}")
    if args.tune:
        print("\n".join([header(device), *tune(models, device)]))
        return 0
    codes = ["torch", "compiled torch", *(() if missing else ("triton",))]
    dtype = iteration_dtype("auto", device)
    n, rate = matrix_rate(dtype, device)
    print(header(device, f"{args.rounds} rounds"))
    print(f"{str(dtype).removeprefix('torch.')}; a product of two {n} × {n} matrices makes {rate / 1e12:.2f} TFLOP/s"
          + (f"; no Triton: {missing}" if missing else ""))
    for model in models:
        print("\n".join(table(model, dtype, device, codes, args.rounds, rate)), flush=True)
    return 0
