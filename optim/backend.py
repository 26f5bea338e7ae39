"""Which code makes the symmetric products of the orthogonalisation: our Triton kernels, or torch.

    auto      Triton on a GPU from compute capability 8.0 on, after it has passed a check there; else torch
    triton    Triton, or an error that says why not
    torch     torch: compiled where the run compiles its updates

The choice holds for the process, as torch's own switches do; a run makes it once and announces it. It changes rounding
and no more. Triton is imported only when it is chosen.
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


def interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, as tests have it do."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check(device: torch.device) -> str:
    """Compare the kernels with float64 on a small product; empty if they agree, within what rounding may do."""
    from optim.kernels.symmetric import reference, symmetric_product as kernel
    dtype = torch.float16 if interpreted() else torch.bfloat16
    X = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for P in (X, X.mT):
        C = kernel(P, P, P @ P.mT, 0.5, -2.0)
        exact = reference(P, P, P @ P.mT, 0.5, -2.0)
        error = ((C.double() - exact).norm() / exact.norm()).item()
        if not error < 1e-2:                    # NaN is not either
            return f"the kernels failed their check (error {error:.1e} against float64)"
    return ""


def symmetric_product(P: Tensor, Q: Tensor, D: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """α P Qᵀ + β D of every matrix of a stack (n, rows, inner), where P Qᵀ and D (n, rows, rows) are symmetric."""
    if chosen == "triton":
        from optim.kernels.operator import symmetric_product as kernel
        return kernel(P, Q, D, alpha, beta)
    C = P @ Q.mT if D is None else torch.baddbmm(D, P, Q.mT, beta=beta, alpha=alpha)
    C = C if D is not None or alpha == 1 else alpha * C
    return C if P is Q else C.tril() + C.tril(-1).mT
