"""The update rules in float64, a matrix at a time, from the equations: what the tests compare against.

Nothing here imports the product. Every function returns new tensors; letters are those of the papers.
"""
import torch

# (a, b, c) of each Newton-Schulz step, typed from the publications a second time so that a wrong digit shows.
POLYNOMIALS = {
    "kj5": [(3.4445, -4.7750, 2.0315)] * 5,
    "you5": [(4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
             (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012)],
    "polar_express5": [(8.156554524902461, -22.48329292557795, 15.878769915207462),
                       (4.042929935166739, -2.808917465908714, .5000178451051316),
                       (3.8916678022926607, -2.772484153217685, .5060648178503393),
                       (3.285753657755655, -2.3681294933425376, .46449024233003106),
                       (2.3465413258596377, -1.7097828382687081, .42323551169305323)],
    "exact12": [(2, -1.5, .5)] * 12,
    "cubic5": [(3.3657, -3.3421, 0), (2.5744, -1.4957, 0), (2.5369, -1.4313, 0), (2.4418, -1.2764, 0),
               (2.2230, -.9631, 0)],
}
SAFETY = {"polar_express5": 1.02}


def polar(G):
    """UVᵀ of G = U S Vᵀ: where an exact orthogonalisation ends."""
    U, _, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    return U @ Vh


def newton_schulz(G, preset):
    """U p(S/‖S‖) Vᵀ, the polynomials applied to singular values rather than to matrices."""
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    if S.norm() == 0:
        return torch.zeros_like(G, dtype=torch.float64)
    S = S / (S.norm() * SAFETY.get(preset, 1))
    for a, b, c in POLYNOMIALS[preset]:
        S = a * S + b * S ** 3 + c * S ** 5
    return U @ torch.diag(S) @ Vh


def adamw(w, g, m, v, t, lr, betas, eps, weight_decay):
    """(w, m, v) after update t = 1, 2, ... (arXiv:1711.05101, Algorithm 2, in torch's form)."""
    b1, b2 = betas
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    m_hat, v_hat = m / (1 - b1 ** t), v / (1 - b2 ** t)
    return w * (1 - lr * weight_decay) - lr * m_hat / (v_hat.sqrt() + eps), m, v


def muon(W, G, M, lr, momentum, weight_decay, form="ema", nesterov=True, preset="kj5", scale="spectral",
         decay="lr", cautious=False):
    """(W, M) after one update."""
    fresh = 1 - momentum if form == "ema" else 1
    M = momentum * M + fresh * G
    U = fresh * G + momentum * M if nesterov else M
    O = newton_schulz(U, preset)
    m, n = W.shape
    s = {"spectral": max(1, m / n) ** .5, "unclamped": (m / n) ** .5, "rms": .2 * max(m, n) ** .5,
         "rms1": max(m, n) ** .5, "none": 1}[scale]
    shrink = {"lr": lr, "lr2": lr ** 2, "scaled": lr * s}[decay] * weight_decay
    mask = (O * W >= 0).double() if cautious else 1
    return W - lr * s * O - shrink * mask * W, M


def splus(W, G, M, L, R, Q_L, Q_R, lr, betas, weight_decay):
    """(W before the decay, W, M, L, R) after one update with the given bases; a missing side is None."""
    b1, b2 = betas
    m, n = W.shape
    M = b1 * M + (1 - b1) * G
    left, right = (torch.eye(m).double() if L is None else Q_L), (torch.eye(n).double() if R is None else Q_R)
    U = left @ torch.sign(left.T @ M @ right) @ right.T
    s = lr * (2 / (m + n) if L is not None and R is not None else .001)
    L = None if L is None else b2 * L + (1 - b2) * G @ G.T
    R = None if R is None else b2 * R + (1 - b2) * G.T @ G
    stepped = W - s * U
    return stepped, stepped * (1 - s * weight_decay), M, L, R


def eigenvectors(S):
    return torch.linalg.eigh(S + 1e-30 * torch.eye(len(S)).double())[1]
