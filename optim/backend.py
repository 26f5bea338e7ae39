"""Which code makes the symmetric products of the orthogonalisation: our Triton kernels, or torch.

    auto      Triton on a GPU from compute capability 8.0 on, after it has passed a check there; else torch
    triton    Triton, or an error that says why not
    torch     torch: compiled where the run compiles its updates

The choice holds for the process, as torch's own switches do; a run makes it once and announces it. It changes rounding
and no more. Triton is imported only when it is chosen. On a GPU its kernels are for bfloat16 and float16: products in
float32 stay torch's, for no matrix unit makes exact ones, and the kernel would spill.
"""
import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

Kernels = Literal["auto", "triton", "torch"]

chosen: Literal["triton", "torch"] = "torch"


def choose(kernels: Kernels, device: torch.device) -> str:
    """Set what `symmetric_product` uses from now on; why it is not Triton, in words, where a GPU made one hope.

    Raises:
        ValueError: `triton` was asked for and cannot be had; a run has refused it before (harness/preflight.py).
    """
    global chosen
    wanted = kernels == "triton" or (kernels == "auto" and device.type == "cuda")
    missing = why_not_triton(device) if wanted else ""
    if kernels == "triton" and missing:
        raise ValueError(f"no Triton here: {missing}")
    chosen = "triton" if wanted and not missing else "torch"
    return missing


def why_not_triton(device: torch.device) -> str:
    """Empty where the kernels can be used on `device`, and have been seen to be right there."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda" and not interpreted():
        return "the kernels need a GPU"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU's compute capability is below 8.0"
    try:
        return check(device)
    except Exception as error:                  # of a compiler, a driver: of any kind
        return f"the kernels failed their check ({type(error).__name__}: {str(error).splitlines()[0][:80]})"


def takes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels are in use for matrices of this type there."""
    return chosen == "triton" and (dtype.itemsize == 2 if device.type == "cuda" else interpreted())


def interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, as tests have it do."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check(device: torch.device) -> str:
    """Compare the kernels with float64 on small matrices, the products in all of the device's configurations; empty
    if they agree, within what rounding may do."""
    from optim.kernels import passes
    from optim.kernels.configurations import launches
    from optim.kernels.symmetric import reference, symmetric_product as kernel
    dtype = torch.float16 if interpreted() else torch.bfloat16
    X = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    pairs = []                                  # (by the kernels, in float64)
    for launch in launches(torch.cuda.get_device_capability(device)) if device.type == "cuda" else (None,):
        for P in (X, X.mT):
            D = P @ P.mT
            pairs.append((kernel(P, P, D, 0.5, -2.0, launch=launch), reference(P, P, D, 0.5, -2.0)))
    G, M, half, keep = X.float(), X.flip(1).float(), X.new_tensor(0.5, dtype=torch.float64), X.new_ones((), dtype=bool)
    exact = passes.reference(G, M, 0.5, True, True)
    O = passes.momentum_and_norm(G, M, half, True, True, 1.0, dtype, None, keep)
    pairs += zip((M, O), exact)
    before = exact[1].flip(1).float()           # as large as O, so that a wrong step shows
    passes.step_and_decay(W := before.clone(), O, half, 1.5, half, keep)
    pairs.append((W, 0.5 * before.double() - 0.75 * exact[1]))
    for value, exact in pairs:
        error = ((value.double() - exact).norm() / exact.norm()).item()
        if not error < 1e-2:                    # NaN is not either
            return f"the kernels failed their check (error {error:.1e} against float64)"
    return ""


def symmetric_product(P: Tensor, Q: Tensor, D: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """α P Qᵀ + β D of every matrix of a stack (n, rows, inner), where P Qᵀ and D (n, rows, rows) are symmetric."""
    if takes(P.device, P.dtype):
        from optim.kernels.operator import symmetric_product as kernel
        return kernel(P, Q, D, alpha, beta)
    C = P @ Q.mT if D is None else torch.baddbmm(D, P, Q.mT, beta=beta, alpha=alpha)
    C = C if D is not None or alpha == 1 else alpha * C
    return C if P is Q else C.tril() + C.tril(-1).mT
