"""SOAP, KL-SOAP and Shampoo in float64, a matrix at a time, from the equations; and what their tests feed them.

Nothing here imports the product. SPlus's oracle is in oracles.py. Letters are those of the papers; decompositions are
LAPACK's as they come, so that the product's choice of signs is not copied.
"""
import torch

COUNT = 20


def hyper(**values):
    return {name: torch.tensor(float(value), dtype=torch.float64) for name, value in values.items()}


def weights(shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) / 4


def gradients(shape, count=COUNT, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def orthonormal(n, d, seed, dtype=torch.float64):
    A = torch.randn(n, d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(A)[0].to(dtype)


def run(rule, W, grads, lr=.01, index=0, count=1, refresh=True):
    """Updates with a learning rate that moves, refreshes where they are due; the state."""
    state = rule.init(W)
    for step, G in enumerate(grads):
        rule.update(W, G, state, hyper(lr=lr * (1 + step % 3), weight_decay=rule.weight_decay, t=step + 1))
        if refresh and rule.refresh_due(step, index, count):
            rule.refresh(state, step)
    return state


def failing_eigh(monkeypatch, dtypes, marker=None):
    """torch.linalg.eigh fails in these dtypes: always, or on stacks in which the number `marker` stands."""
    eigh = torch.linalg.eigh

    def patched(S):
        if S.dtype in dtypes and (marker is None or (S == marker).any()):
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(S)
    monkeypatch.setattr(torch.linalg, "eigh", patched)


# ---- oracles: `s` is the state, a dict that is changed; the first call gets an empty one

def falling_eigenvectors(S):
    return torch.linalg.eigh(S)[1].flip(1)


def soap(W, G, s, t, lr, betas=(.95, .95), beta=None, eps=1e-8, weight_decay=.01, every=10, correct=True, take=False,
         sort=True, first_bases=falling_eigenvectors, left=True, right=True, then=None):
    """W after update t. M is kept unrotated: the same as rotating it at every change of bases."""
    (b1, b2), (m, n) = betas, W.shape
    beta = b2 if beta is None else beta
    if t == 1:
        s.update(M=0 * W, V=0 * W, L=torch.zeros(m, m).double(), R=torch.zeros(n, n).double(),
                 Q_L=torch.eye(m).double(), Q_R=torch.eye(n).double())
    if t > 1 or take:
        steps = t if take else t - 1
        s["M"] = b1 * s["M"] + (1 - b1) * G
        s["V"] = b2 * s["V"] + (1 - b2) * (s["Q_L"].T @ G @ s["Q_R"]) ** 2
        U = s["Q_L"] @ ((s["Q_L"].T @ s["M"] @ s["Q_R"]) / (s["V"].sqrt() + eps)) @ s["Q_R"].T
        size = lr * ((1 - b2 ** steps) ** .5 / (1 - b1 ** steps) if correct and then is None else 1)
        W = W - size * (then(U) * max(1, m / n) ** .5 if then else U)
        W = W - lr * weight_decay * W
    s["L"], s["R"] = beta * s["L"] + (1 - beta) * G @ G.T, beta * s["R"] + (1 - beta) * G.T @ G
    if t == 1:
        s["Q_L"] = first_bases(s["L"]) if left else s["Q_L"]
        s["Q_R"] = first_bases(s["R"]) if right else s["Q_R"]
        if take:
            s["V"] = (1 - b2) * (s["Q_L"].T @ G @ s["Q_R"]) ** 2
    elif (t - 1) % every == 0:
        for side, S, axis in (("Q_L", s["L"], 0), ("Q_R", s["R"], 1)):
            if (left, right)[axis]:
                order = (s[side].T @ S @ s[side]).diag().argsort(descending=True) if sort else torch.arange(len(S))
                s["V"] = s["V"].index_select(axis, order)
                s[side] = torch.linalg.qr(S @ s[side][:, order])[0]
    return W


def root(S, p, eps):
    """(S + εI)^-p, a pseudo-inverse where ε = 0."""
    values, V = torch.linalg.eigh(S)
    powers = [(x + eps) ** -p if x + eps > len(S) * 2.2e-16 * values.max() else 0 for x in values.clamp(min=0)]
    return V @ torch.diag(torch.tensor(powers).double()) @ V.T


def shampoo(W, G, s, t, lr, betas=(.95, .95), eps=1e-12, weight_decay=0., every=10, graft="adam", graft_eps=1e-8,
            p=.25, left=True, right=True, given=(None, None)):
    """W after update t; `s["A"]`, `s["B"]` are the roots, None before the first unless `given`."""
    (b1, b2), (m, n) = betas, W.shape
    if t == 1:
        s.update(M=0 * W, V=0 * W, L=torch.zeros(m, m).double(), R=torch.zeros(n, n).double(), A=given[0],
                 B=given[1])
    s["M"], s["V"] = b1 * s["M"] + (1 - b1) * G, b2 * s["V"] + (1 - b2) * G * G
    M_hat = s["M"] / (1 - b1 ** t)
    T = {"adam": M_hat / ((s["V"] / (1 - b2 ** t)).sqrt() + graft_eps), "sgd": M_hat, "none": 0 * M_hat}[graft]
    D = T
    if s["A"] is not None:
        D = s["A"] @ M_hat @ s["B"]
        D = D if graft == "none" else D * T.norm() / D.norm()
    s["L"], s["R"] = b2 * s["L"] + (1 - b2) * G @ G.T, b2 * s["R"] + (1 - b2) * G.T @ G
    if t % every == 0:
        s["A"] = root(s["L"] / (1 - b2 ** t), p, eps) if left else torch.eye(m).double()
        s["B"] = root(s["R"] / (1 - b2 ** t), p, eps) if right else torch.eye(n).double()
    return W - lr * (D + weight_decay * W)


def klsoap(W, G, s, t, lr, betas=(.95, .9), beta=.9, eps=1e-8, weight_decay=0., every=1, left=True, right=True,
           first_bases=falling_eigenvectors):
    """W after update t. M is kept unrotated: the same as rotating it at every change of bases."""
    (b1, b2), (m, n) = betas, W.shape
    if t == 1:
        s.update(M=0 * W, V=0 * W, L=G @ G.T / n, R=G.T @ G / m, Q_L=torch.eye(m).double(), Q_R=torch.eye(n).double(),
                 l_L=torch.ones(m).double(), l_R=torch.ones(n).double())
        if left:
            s.update(Q_L=first_bases(s["L"]), l_L=torch.full((m,), .1, dtype=torch.float64))
        if right:
            s.update(Q_R=first_bases(s["R"]), l_R=torch.full((n,), .1, dtype=torch.float64))
        return W
    P = s["Q_L"].T @ G @ s["Q_R"]
    s["M"], s["V"] = b1 * s["M"] + (1 - b1) * G, b2 * s["V"] + (1 - b2) * P ** 2
    U = s["Q_L"] @ ((s["Q_L"].T @ s["M"] @ s["Q_R"]) / (s["V"].sqrt() + eps)) @ s["Q_R"].T
    W = (W - lr * U) * (1 - lr * weight_decay)
    i_L, i_R = 1 / s["l_L"], 1 / s["l_R"]                # without the bound, which ordinary gradients do not meet
    s["L"] = beta * s["L"] + (1 - beta) * G @ s["Q_R"] @ i_R.diag() @ s["Q_R"].T @ G.T / n
    s["R"] = beta * s["R"] + (1 - beta) * G.T @ s["Q_L"] @ i_L.diag() @ s["Q_L"].T @ G / m
    s["l_L"] = beta * s["l_L"] + (1 - beta) * (P ** 2 @ i_R.diag()).mean(1) if left else s["l_L"]
    s["l_R"] = beta * s["l_R"] + (1 - beta) * (i_L.diag() @ P ** 2).mean(0) if right else s["l_R"]
    if (t - 1) % every == 0:
        s["Q_L"] = torch.linalg.qr(s["L"] @ s["Q_L"])[0] if left else s["Q_L"]
        s["Q_R"] = torch.linalg.qr(s["R"] @ s["Q_R"])[0] if right else s["Q_R"]
    return W
