"""The norms, Scion, Gluon and the plain baselines in float64, a matrix at a time, from the equations.

As tests/oracles.py: nothing here imports the product, every function returns new tensors, letters are the papers'.
"""
import torch

from tests.oracles import newton_schulz, polar


def norm(A, geometry):
    """‖A‖ of one matrix (arXiv:2502.07529)."""
    m, n = A.shape
    sigma = torch.linalg.svdvals(A)
    return {"spectral": (n / m) ** .5 * sigma.max(),                    # RMS to RMS
            "spectral_clamped": min(1, (n / m) ** .5) * sigma.max(),
            "sign": n * A.abs().max(),
            "max": A.abs().max(),
            "colnorm": max(A[:, j].norm() for j in range(n)) / m ** .5,
            "rownorm": max(A[i].norm() for i in range(m)) * n ** .5,
            "bias_rms": A.square().mean().sqrt(),
            "frobenius": A.square().sum().sqrt()}[geometry]


def dual_norm(G, geometry):
    """max ⟨G, A⟩ over ‖A‖ ≤ 1, each in its closed form."""
    m, n = G.shape
    nuclear = torch.linalg.svdvals(G).sum()
    return {"spectral": (m / n) ** .5 * nuclear,
            "spectral_clamped": max(1, (m / n) ** .5) * nuclear,
            "sign": G.abs().sum() / n,
            "max": G.abs().sum(),
            "colnorm": m ** .5 * sum(G[:, j].norm() for j in range(n)),
            "rownorm": sum(G[i].norm() for i in range(m)) / n ** .5,
            "bias_rms": m ** .5 * G.norm(),
            "frobenius": G.norm()}[geometry]


def lmo(G, geometry, preset=None, eps=0):
    """argmin ⟨G, A⟩ over ‖A‖ ≤ 1; msign by a Newton-Schulz preset, or exactly."""
    m, n = G.shape
    msign = polar(G) if preset is None else newton_schulz(G, preset)

    def over(v, length):
        return v / (length + eps) if length > 0 else v
    if geometry == "spectral":
        return -(m / n) ** .5 * msign
    if geometry == "spectral_clamped":
        return -max(1, (m / n) ** .5) * msign
    if geometry == "sign":
        return -G.sign() / n
    if geometry == "max":
        return -G.sign()
    if geometry == "colnorm":
        return -torch.stack([over(G[:, j], G[:, j].square().mean().sqrt()) for j in range(n)], dim=1)
    if geometry == "rownorm":
        return -torch.stack([over(G[i], n ** .5 * G[i].norm()) for i in range(m)])
    return -over(G, G.square().mean().sqrt() if geometry == "bias_rms" else G.norm())


def scion(W, G, D, lr, alpha, radius, geometry, constrained=False, preset="kj5", eps=0):
    """(W, D) after one update (arXiv:2502.07529)."""
    D = (1 - alpha) * D + alpha * G
    shrunk = (1 - lr) * W if constrained else W
    return shrunk + lr * radius * lmo(D, geometry, preset, eps), D


def gluon(W, G, M, radius, beta, geometry, smooth=None, preset="kj5"):
    """(W, M) after one update (arXiv:2505.13416); smooth = (L0, L1) makes `radius` a factor on the smooth radius."""
    M = beta * M + (1 - beta) * G
    direction = -lmo(M, geometry, preset)
    if smooth is not None:
        dual = (M * direction).sum()
        radius = radius * dual / (smooth[0] + smooth[1] * dual)
    return W - radius * direction, M


def adam(w, g, m, v, t, lr, betas, eps, weight_decay):
    """(w, m, v) after update t = 1, 2, ... (arXiv:1412.6980, Algorithm 1, on the penalised loss)."""
    b1, b2 = betas
    g = g + weight_decay * w
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    return w - lr * (m / (1 - b1 ** t)) / ((v / (1 - b2 ** t)).sqrt() + eps), m, v


def lion(w, g, m, lr, betas, weight_decay):
    """(w, m) after one update (arXiv:2302.06675, Algorithm 2)."""
    b1, b2 = betas
    u = torch.sign(b1 * m + (1 - b1) * g)
    return w - lr * (u + weight_decay * w), b2 * m + (1 - b2) * g


def sgd(w, g, b, lr, momentum, weight_decay, nesterov=False):
    """(w, b) after one update, in torch's form (Sutskever et al. 2013 for Nesterov's)."""
    g = g + weight_decay * w
    b = momentum * b + g
    return w - lr * (g + momentum * b if nesterov else b), b
