"""Where the time of a training step goes, what memory it takes, and which share of the device's matrix rate it uses.

The step runs with marks on the device's timeline wherever one part ends and another begins, forward and backward; the
time between two marks belongs to the part that the first one opens. So the parts are measured where they run, one after
another, and leave nothing out. Where the run compiles, attention, MLP, norms and head are graphs of their own in this
marked step, for a mark cannot lie within a graph; what one graph for all of it is worth stands below the table.
"""
import gc
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from data.prefetch import Prefetcher
from harness import processes
from harness.config import Config
from model.gpt import GPT
from model.head import head_loss
from model.layers import Norm
from scripts.bench.interleave import seconds
from scripts.bench.report import header
from scripts.bench.training import TrainingStep

ATTENTION, MLP, HEAD, REST = "attention", "MLP", "head and loss", "embedding, norms, rest"
MODEL_PARTS = (ATTENTION, MLP, HEAD, REST)
OTHER_PARTS = {"optimizer": "optimizer", "data": "data: wait, copy", "loop": "loop (host)"}
PRODUCTS = {"cuda": 8192, "cpu": 1024}      # rows and columns of the matrices whose product is the device's rate

Part = tuple[str, str]                      # what, and "forward", "backward" or ""


# ------------------------------------------------------------ marks

class Timeline:
    """Marks in the order in which the device passes them."""

    def __init__(self, device: torch.device):
        self.cuda, self.marks = device.type == "cuda", []

    def enter(self, part: Part) -> None:
        if self.cuda:
            at = torch.cuda.Event(enable_timing=True)
            at.record()
        else:
            at = time.perf_counter()
        self.marks.append((part, at))

    def totals(self) -> dict[Part, float]:
        """Seconds of every part from its marks to the next ones."""
        if self.cuda:
            torch.cuda.synchronize()
        found: dict[Part, float] = {}
        for (part, began), (_, ended) in zip(self.marks, self.marks[1:]):
            span = began.elapsed_time(ended) / 1e3 if self.cuda else ended - began
            found[part] = found.get(part, 0.0) + span
        return found


class Boundary(torch.autograd.Function):
    """The identity. A forward pass through it enters `after`; the backward pass, which comes from there, `before`."""

    @staticmethod
    def forward(ctx, x: Tensor, timeline: Timeline, before: str, after: str) -> Tensor:
        ctx.timeline, ctx.before = timeline, before
        timeline.enter((after, "forward"))
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.timeline.enter((ctx.before, "backward"))
        return gradient, None, None, None


def marked_forward(model: GPT, timeline: Timeline, compiled: bool) -> Callable[..., Tensor]:
    """What `model` computes, with boundaries around its attention, MLPs and head; it changes the model for good."""
    def own_graph(module) -> None:
        if compiled:
            module.forward = torch.compile(module.forward, dynamic=False)

    def surround(module, part: str) -> None:
        own_graph(module)
        module.register_forward_pre_hook(
            lambda _, inputs: (Boundary.apply(inputs[0], timeline, REST, part), *inputs[1:]))
        module.register_forward_hook(lambda _, inputs, output: (
            (Boundary.apply(output[0], timeline, part, REST), *output[1:]) if isinstance(output, tuple)
            else Boundary.apply(output, timeline, part, REST)))

    for block in model.blocks:
        surround(block.attn, ATTENTION)
        surround(block.mlp, MLP)
    for module in model.modules():
        if isinstance(module, Norm):
            own_graph(module)
    head = torch.compile(head_loss, dynamic=False) if compiled else head_loss

    def forward(tokens: Tensor, targets: Tensor, *documents) -> Tensor:
        timeline.enter((REST, "forward"))
        x = Boundary.apply(model.trunk(tokens, *documents), timeline, REST, HEAD)
        return Boundary.apply(head(x, *model.head_weights(), targets, model.config), timeline, HEAD, REST)
    return forward


# ------------------------------------------------------------ measurements

def train(step: TrainingStep, times: int, timeline: Timeline | None = None) -> float:
    """Seconds of one of `times` steps that read their batches as training does."""
    with Prefetcher(step.read, step.device) as prefetcher:
        def work() -> None:
            if timeline:
                timeline.enter(("data", ""))
            batch = prefetcher.get(step.step)
            step.take(batch)
        work()                                                        # now the next batch is being read
        if timeline:
            timeline.marks.clear()
        measured = seconds(work, times, step.device)
        if timeline:
            timeline.enter(("end", ""))
    return measured


def matrix_rate(dtype: torch.dtype, device: torch.device) -> tuple[int, float]:
    """(n, FLOP/s) of the product of two n x n matrices of this type: the median of five runs of several."""
    n = PRODUCTS[device.type]
    A, B = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    once = seconds(lambda: A @ B, 1, device), seconds(lambda: A @ B, 1, device)
    times = max(1, round(0.1 / once[1]))
    runs = sorted(seconds(lambda: A @ B, times, device) for _ in range(5))
    return n, 2 * n**3 / runs[2]


def peak_bytes(step: TrainingStep, batch) -> tuple[int, int]:
    """(at rest, at the peak of a step) bytes of tensors. On a CPU from the allocations that the profiler saw."""
    if step.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        at_rest = torch.cuda.memory_allocated()
        step.take(batch)
        torch.cuda.synchronize()
        return at_rest, torch.cuda.max_memory_allocated()
    from torch.profiler import ProfilerActivity, profile
    held = [bank.weights for bank in step.optimizer.banks]
    held += [t for bank in step.optimizer.banks for _, t, _ in bank.kept()]
    at_rest = sum(t.numel() * t.element_size() for t in held)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step.take(batch)
    events = profiled.profiler.kineto_results.events()
    return at_rest, at_rest + peak((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")


def peak(changes: Iterable[tuple[int, int]]) -> int:
    """The largest sum on the way through (time, bytes gained or given back)."""
    held = largest = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        held += change
        largest = max(largest, held)
    return largest


def busy_s(step: TrainingStep, batch) -> float:
    """Seconds of one step in which the GPU had a kernel or a copy to do."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step.take(batch)
        torch.cuda.synchronize()
    return union((e.start_ns(), e.start_ns() + e.duration_ns()) for e in profiled.profiler.kineto_results.events()
                 if e.device_type() == DeviceType.CUDA and not e.is_user_annotation()) / 1e9


def union(intervals: Iterable[tuple[int, int]]) -> int:
    """The length of all (start, end) together, what they share counted once."""
    length = reached = 0
    for start, end in sorted(intervals):
        length += max(0, end - max(start, reached))
        reached = max(reached, end)
    return length


# ------------------------------------------------------------ the report

def breakdown(cfg: Config, device: torch.device, times: int) -> list[str]:
    step = TrainingStep(cfg, device)
    step.settle()
    n, rate = matrix_rate(step.dtype, device)
    as_trained_s = train(step, times)
    at_rest, at_peak = peak_bytes(step, step.batch())
    busy = busy_s(step, step.batch()) if device.type == "cuda" else None
    flops, dtype, tokens = step.model.flops_per_token() * cfg.batch_tokens, step.dtype, step.tokens
    micro_rows, compiled = step.micro_rows, step.compiled
    del step                                                          # one at a time: memory
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    timeline, marked = Timeline(device), TrainingStep(cfg, device)
    marked.micro_rows = micro_rows
    marked.forward = marked_forward(marked.model, timeline, marked.compiled)
    marked.note = lambda part: timeline.enter((part, ""))
    marked.settle()
    marked_s = train(marked, times, timeline)
    parts = {part: total / times for part, total in timeline.totals().items()}

    lines = [header(device, f"mean over {times} x {cfg.batch_tokens:,} tokens"),
             f"{cfg.name}: micro-batches of {micro_rows * cfg.seq_len:,} tokens, {str(dtype).removeprefix('torch.')}, "
             f"{'compiled' if compiled else 'eager'}; tokens: {tokens}", *table(parts, marked_s)]
    if marked.micro_rows != micro_rows:
        lines.append(f"(with marks in micro-batches of {marked.micro_rows * cfg.seq_len:,} tokens: no more fit)")
    lines.append(f"{'step without marks':<44}{1e3 * as_trained_s:10.2f} ms{cfg.batch_tokens / as_trained_s:14,.0f} "
                 f"tokens/s{', one graph' if compiled else ''}")
    if busy is not None:
        lines.append(f"{'  of which the GPU waits for the host':<44}{1e3 * max(0.0, as_trained_s - busy):10.2f} ms")
    lines += [f"{'peak memory, tensors':<44}{at_peak / 2**20:10,.1f} MiB, {at_rest / 2**20:,.1f} of them between steps",
              f"{'model FLOP/s (6N + 12LHQT a token)':<44}{flops / as_trained_s / 1e12:10.3f} TFLOP/s",
              f"{f'MFU against a product of {n} x {n}':<44}{100 * flops / as_trained_s / rate:10.1f} % of "
              f"{rate / 1e12:.3f} TFLOP/s, measured"]
    sheet = processes.peak_flops(processes.device_name(device))
    if sheet and dtype == torch.bfloat16:
        lines.append(f"{'MFU against the data sheet':<44}{100 * flops / as_trained_s / sheet:10.1f} % of "
                     f"{sheet / 1e12:.0f} TFLOP/s")
    return lines


def table(parts: dict[Part, float], whole_s: float) -> list[str]:
    """The parts' milliseconds, their sum, and what of the whole they leave over."""
    def row(name: str, forward: float | None, backward: float | None, total: float) -> str:
        cells = "".join(f"{1e3 * t:10.2f}" if t is not None else f"{'':10}" for t in (forward, backward))
        return f"{name:<24}{cells}{1e3 * total:10.2f}{100 * total / whole_s:8.1f} %"

    lines = [f"{'ms a step':<24}{'forward':>10}{'backward':>10}{'both':>10}{'share':>10}"]
    for name in MODEL_PARTS:
        passes = [parts.get((name, which), 0.0) for which in ("forward", "backward")]
        lines.append(row(name, *passes, sum(passes)))
    lines += [row(words, None, None, parts.get((name, ""), 0.0)) for name, words in OTHER_PARTS.items()]
    total = sum(parts.values())
    return [*lines, row("sum", None, None, total), row("remainder", None, None, round(whole_s - total, 5) + 0.0),
            row("step with marks", None, None, whole_s)]
