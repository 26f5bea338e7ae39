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


def shape_factor(m, n, scale):
    return {"spectral": max(1, m / n) ** .5, "unclamped": (m / n) ** .5, "rms": .2 * max(m, n) ** .5,
            "rms1": max(m, n) ** .5, "none": 1}[scale]


def muon(W, G, M, lr, momentum, weight_decay, form="ema", nesterov=True, preset="kj5", scale="spectral",
         decay="lr", cautious=False):
    """(W, M) after one update."""
    fresh = 1 - momentum if form == "ema" else 1
    M = momentum * M + fresh * G
    U = fresh * G + momentum * M if nesterov else M
    O = newton_schulz(U, preset)
    m, n = W.shape
    s = shape_factor(m, n, scale)
    shrink = {"lr": lr, "lr2": lr ** 2, "scaled": lr * s}[decay] * weight_decay
    mask = (O * W >= 0).double() if cautious else 1
    return W - lr * s * O - shrink * mask * W, M


# ---- Muon as each publication has it, from its own text and with its own defaults; not through the switches above.

def muon_kj(W, G, M, lr=.02, momentum=.95, weight_decay=0):
    """KellerJordan/Muon: lerp, lerp, NS5, √max(1, m/n); decay first."""
    M = M + (1 - momentum) * (G - M)
    U = G + momentum * (M - G)
    m, n = W.shape
    return W * (1 - lr * weight_decay) - lr * max(1, m / n) ** .5 * newton_schulz(U, "kj5"), M


def muon_moonlight(W, G, M, lr=1e-3, momentum=.95, weight_decay=.1):
    """arXiv:2502.16982: W - η(.2 √max(m, n) O + λW)."""
    M = momentum * M + G
    O = newton_schulz(momentum * M + G, "kj5")
    return W - lr * (.2 * max(W.shape) ** .5 * O + weight_decay * W), M


def muon_torch(W, G, M, lr=1e-3, momentum=.95, weight_decay=.1):
    """torch.optim.Muon: the code, an average, and not its docstring, a sum."""
    M = momentum * M + (1 - momentum) * G
    m, n = W.shape
    ratio = (m / n) ** .5 if m > n else 1
    return W - lr * weight_decay * W - lr * ratio * newton_schulz((1 - momentum) * G + momentum * M, "kj5"), M


def muon_dion(W, G, M, lr=.01, momentum=.95, weight_decay=.01):
    """microsoft/dion's Muon: no Nesterov, Polar Express, √(fan out / fan in)."""
    M = momentum * M + G
    fan_out, fan_in = W.shape
    O = newton_schulz(M, "polar_express5")
    return W - lr * weight_decay * W - lr * (fan_out / fan_in) ** .5 * O, M


def muon_record4(W, G, M, lr=.1 * .0036, momentum=.95, weight_decay=0):
    """modded-nanogpt 2024-10-10: an update of RMS 1, no decay."""
    M = momentum * M + G
    O = newton_schulz(G + momentum * M, "kj5")
    return W - lr * O * max(O.shape[0], O.shape[1]) ** .5, M


def muon_record8(W, G, M, lr=.02, momentum=.95, weight_decay=0):
    """modded-nanogpt 2024-11-03: the same with √max(1, rows/cols)."""
    M = momentum * M + G
    O = newton_schulz(G + momentum * M, "kj5")
    return W - lr * O * max(1, O.shape[0] / O.shape[1]) ** .5, M


def muon_track3(W, G, M, lr=.025, momentum=.95, weight_decay=.05):
    """modded-nanogpt's track 3, result #36: twelve steps of (2, -1.5, .5)."""
    M = momentum * M + (1 - momentum) * G
    O = newton_schulz((1 - momentum) * G + momentum * M, "exact12")
    return W - lr * weight_decay * W - lr * O * max(1, O.shape[0] / O.shape[1]) ** .5, M


# ---- relatives of Muon

def normuon(W, G, M, v, lr, momentum, weight_decay, form="ema", nesterov=True, preset="kj5", beta2=.95, eps=1e-10,
            statistic="longer", restore="update", scale="spectral", decay="lr"):
    """(W, M, v) after one update; v is (m, 1) or (1, n)."""
    fresh = 1 - momentum if form == "ema" else 1
    M = momentum * M + fresh * G
    O = newton_schulz(fresh * G + momentum * M if nesterov else M, preset)
    m, n = W.shape
    per_row = statistic == "rows" or m >= n
    v = beta2 * v + (1 - beta2) * (O ** 2).mean(dim=1 if per_row else 0, keepdim=True)
    O_hat = O / v.clamp(min=eps).sqrt()
    norm = O.norm() if restore == "update" else min(m, n) ** .5
    s = shape_factor(m, n, scale)
    shrink = {"lr": lr, "lr2": lr ** 2, "scaled": lr * s}[decay] * weight_decay
    if O_hat.norm() == 0:
        return W - shrink * W, M, v
    return W - lr * s * norm * O_hat / O_hat.norm() - shrink * W, M, v


def normuon_paper(W, G, M, v, lr=1e-3, momentum=.95, weight_decay=0):
    """arXiv:2510.05491, Algorithm 1."""
    M = momentum * M + (1 - momentum) * G
    O = newton_schulz(M, "kj5")
    m, n = W.shape
    v = .95 * v + .05 * (O * O).sum(1, keepdim=True) / n
    O_hat = O / (v.sqrt() + 1e-10)
    eta = .2 * lr * (m * n) ** .5 / O_hat.norm()
    return W - lr * weight_decay * W - eta * O_hat, M, v


def normuon_record41(W, G, M, v, lr=.06, momentum=.95, weight_decay=0):
    """modded-nanogpt 2025-10-24, on weights as they lie there: tall ones transposed, so that no shape has a factor."""
    if W.shape[0] > W.shape[1]:
        return tuple(X.T for X in normuon_record41(W.T, G.T, M.T, v.T, lr, momentum, weight_decay))
    M = momentum * M + (1 - momentum) * G
    O = newton_schulz((1 - momentum) * G + momentum * M, "polar_express5")
    v = .95 * v + .05 * (O * O).mean(0 if W.shape[0] < W.shape[1] else 1, keepdim=True)
    O_hat = O * v.clamp(min=1e-10).rsqrt()
    return W - lr * O_hat * O.norm() / O_hat.norm(), M, v


def normuon_track3(W, G, M, v, lr=.035, momentum=.95, weight_decay=.025):
    """modded-nanogpt's track 3, result #10: the statistics are of the scaled O, whose norm is restored."""
    M = momentum * M + (1 - momentum) * G
    m, n = W.shape
    O = newton_schulz((1 - momentum) * G + momentum * M, "exact12") * max(1, m / n) ** .5
    v = .95 * v + .05 * (O * O).mean(1 if m >= n else 0, keepdim=True)
    O_hat = O * v.clamp(min=1e-10).rsqrt()
    return W - lr * weight_decay * W - lr * O_hat * O.norm() / O_hat.norm(), M, v


def adamuon(W, G, M, V, lr, momentum, weight_decay, form="ema", nesterov=True, preset="kj5", eps=1e-8):
    """(W, M, V) after one update (arXiv:2507.11005, from version 2 on)."""
    fresh = 1 - momentum if form == "ema" else 1
    M = momentum * M + fresh * G
    O = newton_schulz(torch.sign(fresh * G + momentum * M if nesterov else M), preset)
    V = momentum * V + (1 - momentum) * O * O
    O_hat = O / (V.sqrt() + eps)
    W = W - lr * weight_decay * W
    return (W - .2 * lr * W.numel() ** .5 * O_hat / O_hat.norm() if O_hat.norm() > 0 else W), M, V


def muon2(W, G, M, V, lr, momentum, weight_decay, form="ema", nesterov=True, preset="exact12", beta2=.95, eps=1e-10,
          scale="spectral"):
    """(W, M, V) after one update (arXiv:2604.09967)."""
    fresh = 1 - momentum if form == "ema" else 1
    M = momentum * M + fresh * G
    V = beta2 * V + (1 - beta2) * G * G
    O = newton_schulz((fresh * G + momentum * M if nesterov else M) / (V.sqrt() + eps), preset)
    return W * (1 - lr * weight_decay) - lr * shape_factor(*W.shape, scale) * O, M, V


def spectral_descent(W, G, lr, weight_decay, preset="exact12", scale="spectral"):
    """W after one update."""
    return W * (1 - lr * weight_decay) - lr * shape_factor(*W.shape, scale) * newton_schulz(G, preset)


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
