"""The head and its loss, forward and backward, in each of its forms: milliseconds and peak memory.

Shapes are those of the speedrun's model: 768 wide, 50,304 logits, softcap 15·z/√(z²+225), bfloat16 on a GPU.
"""
import statistics

WIDTH, VOCABULARY, CAP = 768, 50_304, 15.0
FORMS = {"torch": "torch", "compiled": "torch, compiled", "triton": "triton"}


class Head:
    """Activations, weights and targets of `tokens` tokens on `device`, and the loss of them in one form."""

    def __init__(self, form: str, tokens: int, device):
        import torch

        from model.config import ModelConfig, Softcap
        from model.head import head_loss
        self.device, dtype = device, torch.bfloat16 if device.type == "cuda" else torch.float32
        self.config = ModelConfig(vocab_size=VOCABULARY, layers=1, heads=1, width=WIDTH, tied=False,
                                  softcap=Softcap("isru", CAP), loss="triton" if form == "triton" else "torch")
        self.loss = torch.compile(head_loss, dynamic=False) if form == "compiled" else head_loss
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(1, tokens, WIDTH, generator=generator).to(device, dtype).requires_grad_()
        self.weight = (torch.randn(VOCABULARY, WIDTH, generator=generator) / 8).to(device).requires_grad_()
        self.targets = torch.randint(VOCABULARY, (1, tokens), generator=generator).to(device)

    def pass_once(self) -> None:
        self.x.grad = self.weight.grad = None
        self.loss(self.x, self.weight, None, self.targets, self.config).backward()

    def peak_bytes(self) -> int:
        """Most bytes that a pass had on the GPU beyond inputs and the gradients that it leaves."""
        import torch
        self.pass_once()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.pass_once()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def bench_rows(device, tokens: int | None = None, rounds: int = 10) -> list[str]:
    """Lines of a table: a form of the head, its ms for `tokens` tokens (16,384; on a CPU 256), and its peak memory.

    On a CPU there are torch's forms alone.
    """
    import torch

    from scripts.bench.interleave import interleave, seconds
    on_gpu = device.type == "cuda"
    tokens = tokens or (16_384 if on_gpu else 256)
    heads = {form: Head(form, tokens, device) for form in FORMS if on_gpu or form != "triton"}
    times = interleave([lambda head=head: seconds(head.pass_once, 1, device) for head in heads.values()], rounds)
    lines = [f"head and loss, forward and backward, {tokens:,} tokens x {VOCABULARY:,} logits, width {WIDTH}",
             f"{'form':<18}{'ms':>10}{'peak GiB':>12}"]
    for (form, head), measured in zip(heads.items(), times):
        peak = f"{head.peak_bytes() / 2**30:12.2f}" if on_gpu else f"{'-':>12}"
        lines.append(f"{FORMS[form]:<18}{1e3 * statistics.median(measured):10.3f}{peak}")
    if not on_gpu:
        return [*lines, f"{'triton':<18}  needs a GPU"]

    from model.cross_entropy import in_numbers, losses_of
    head = heads["triton"]
    z = torch.randn(tokens, VOCABULARY, device=device, dtype=torch.bfloat16)
    kernel_s = statistics.median(
        seconds(lambda: losses_of(z, head.targets[0], VOCABULARY, *in_numbers(head.config.softcap), True), 1, device)
        for _ in range(rounds + 1))
    rate = 4 * z.numel() / kernel_s         # bytes read once and written once; the second reading may come from a cache
    return [*lines, f"{'the kernel alone':<18}{1e3 * kernel_s:10.3f}    {rate / 1e12:.2f} TB/s, read and written once"]


def main(arguments: list[str]) -> int:
    from data.arguments import at_least
    from scripts.bench.report import Parser, header, one_device
    parser = Parser("head", __doc__)
    parser.add_argument("--tokens", type=at_least(1), help="of a pass (default: 16,384; on a CPU 256)")
    parser.add_argument("--rounds", type=at_least(1), default=10)
    args = parser.parse_args(arguments)
    device = one_device()
    print("\n".join([header(device, f"{args.rounds} rounds"), *bench_rows(device, args.tokens, args.rounds)]))
    return 0
