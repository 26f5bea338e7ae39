"""The rows of track 3 as plain float64 mathematics, each from its description: what tests run the presets against.

Nothing here imports the product. The parameters go by the names that a run gives them; gradients are autograd's of
`losses`, written out below. A rule is a function of one weight W and its summed gradient G that returns the new
weight: s is the weight's own state, a dict, t counts updates from 1 and eta is the learning rate of this update.
"""
from typing import Callable, NamedTuple

import torch

LAYERS, HEADS, WIDTH, VOCAB = 2, 2, 32, 64                # of the tiny model; the MLP is 4 wide
EPS = 2.0 ** -23                                          # rms_norm's, that of float32
EXACT = [(2, -1.5, .5)] * 12
KJ = [(3.4445, -4.7750, 2.0315)] * 5


# ---- the model of train_gpt_simple.py

def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def linear(p, name, x):
    return x @ p[name + ".weight"].T + p[name + ".bias"]


def rope(x):
    """(b, h, t, d): a quarter of the d frequencies go from 1 to 1/1024, as many pairs stand still."""
    t, d = x.shape[-2:]
    frequencies = torch.cat([(1 / 1024) ** torch.linspace(0, 1, d // 4, dtype=x.dtype), torch.zeros(d // 4)])
    angle = torch.arange(t)[:, None] * frequencies
    x1, x2 = x[..., :d // 2], x[..., d // 2:]
    return torch.cat([x1 * angle.cos() + x2 * angle.sin(), x2 * angle.cos() - x1 * angle.sin()], -1)


def losses(p, tokens, targets, qk_norm=True, largest=None):
    """The cross-entropies of all tokens, summed; `largest` collects every layer's largest logit of each head."""
    b, t = tokens.shape
    x = rms(p["embed.weight"][tokens]) * p["embed_norm.gain"]
    for layer in range(LAYERS):
        at = f"blocks.{layer}."
        y = rms(x) * p[at + "attn_norm.gain"]
        q, k, v = (linear(p, at + "attn." + part, y).view(b, t, HEADS, -1).transpose(1, 2) for part in "qkv")
        q, k = (rope(rms(z) if qk_norm else z) for z in (q, k))
        scores = (.12 * q @ k.transpose(-1, -2)).masked_fill(torch.ones(t, t).triu(1).bool(), -torch.inf)
        if largest is not None:
            largest.append(scores.detach().amax((0, 2, 3)))
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1)
        x = x + linear(p, at + "attn.out", y)
        y = linear(p, at + "mlp.up", rms(x) * p[at + "mlp_norm.gain"])
        x = x + linear(p, at + "mlp.down", y.clamp(min=0) ** 2)
    z = linear(p, "head", rms(x) * p["head_norm.gain"])
    z = 15 * z / (z ** 2 + 225).sqrt()
    return (z.logsumexp(-1) - z.gather(-1, targets[..., None])[..., 0]).sum()


# ---- pieces of rules

def newton_schulz(X, polynomials, eps=0.):
    """The track's scripts add 1e-7 to the norm, the papers' formulas nothing."""
    if X.shape[0] > X.shape[1]:
        return newton_schulz(X.T, polynomials, eps).T
    if X.norm() == 0:
        return X
    X = X / (X.norm() + eps)
    for a, b, c in polynomials:
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X


def nesterov(G, s, mu):
    s["M"] = mu * s.get("M", 0) + (1 - mu) * G
    return mu * s["M"] + (1 - mu) * G


def adam_direction(G, s, t, b1, b2, eps):
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * G
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * G ** 2
    return s["m"] / (1 - b1 ** t) / ((s["v"] / (1 - b2 ** t)).sqrt() + eps)


def tall(W):
    return max(1, W.shape[0] / W.shape[1]) ** .5


def hyperball(direction):
    """A rule that moves on the sphere of W's own norm."""
    def update(W, G, s, t, eta, given):
        R, u = W.norm(), direction(W, G, s, t, given)
        moved = W - eta * R * u / max(u.norm(), 1e-10)
        return R * moved / max(moved.norm(), 1e-10)
    return update


def decaying(wd, direction):
    def update(W, G, s, t, eta, given):
        return W - eta * wd * W - eta * direction(W, G, s, t, given)
    return update


def own_bases(S, Q, kind):
    """New bases of a side: what a test replaces by the product's, having checked them."""
    if kind == "qr":
        return torch.linalg.qr(S @ Q)[0]
    vectors = torch.linalg.eigh(S)[1]
    return vectors.flip(1) if kind == "falling" else vectors


# ---- directions of the hidden matrices: (W, G, s, t, given) -> what is subtracted, at learning rate 1

def muon(W, G, s, t, given):
    return tall(W) * newton_schulz(nesterov(G, s, .95), EXACT, 1e-7)


def adam_9_95(eps):
    return lambda W, G, s, t, given: adam_direction(G, s, t, .9, .95, eps)


def muon2(W, G, s, t, given):
    s["V"] = .95 * s.get("V", 0) + .05 * G ** 2
    return tall(W) * newton_schulz(nesterov(G, s, .95) / (s["V"].sqrt() + 1e-10), EXACT, 1e-7)


def normuon(W, G, s, t, given):
    O = muon(W, G, s, t, given)
    s["v"] = .95 * s.get("v", 0) + .05 * (O ** 2).mean(1 if W.shape[0] >= W.shape[1] else 0, keepdim=True)
    evened = O / s["v"].clamp(min=1e-10).sqrt()
    return evened * O.norm() / evened.norm() if O.norm() > 0 else O


def spectral(W, G, s, t, given):
    return tall(W) * newton_schulz(G, EXACT, 1e-7)


def inverse_fourth_root(S):
    values, V = torch.linalg.eigh(S)
    return V @ torch.diag((values.clamp(min=0) + 1e-12) ** -.25) @ V.T


def shampoo(W, G, s, t, given):
    """Roots of every fifth update, in use from the next one on, at the length of Adam's step."""
    T, M = adam_direction(G, s, t, .9, .95, 1e-10), s["m"] / (1 - .9 ** t)
    U = s["A"] @ M @ s["B"] if "A" in s else 0 * M
    s["L"], s["R"] = (.95 * s.get(k, 0) + .05 * X for k, X in (("L", G @ G.T), ("R", G.T @ G)))
    if t % 5 == 0:
        s["A"], s["B"] = (inverse_fourth_root(s[k] / (1 - .95 ** t)) for k in "LR")
    return U * T.norm() / U.norm() if U.norm() > 0 else T


def soap_h(W, G, s, t, given):
    """No bias correction; M unrotated, V in place, the QR after the step."""
    s["L"], s["R"] = (.9 * s.get(k, 0) + .1 * X for k, X in (("L", G @ G.T), ("R", G.T @ G)))
    if t == 1:
        s["Q_L"], s["Q_R"] = given(s["L"], None, "falling"), given(s["R"], None, "falling")
    s["M"] = .95 * s.get("M", 0) + .05 * G
    s["V"] = .9 * s.get("V", 0) + .1 * (s["Q_L"].T @ G @ s["Q_R"]) ** 2
    U = s["Q_L"] @ (s["Q_L"].T @ s["M"] @ s["Q_R"] / (s["V"].sqrt() + 1e-8)) @ s["Q_R"].T
    if t > 1:
        s["Q_L"], s["Q_R"] = given(s["L"], s["Q_L"], "qr"), given(s["R"], s["Q_R"], "qr")
    return U


def kl_soap_h(W, G, s, t, given):
    m, n = W.shape
    if t == 1:
        s.update(L=G @ G.T / n, R=G.T @ G / m, M=0 * G, V=0 * G,
                 l=G.new_full((m,), .1), r=G.new_full((n,), .1))
        s["Q_L"], s["Q_R"] = given(s["L"], None, "falling"), given(s["R"], None, "falling")
        return 0 * G
    P = s["Q_L"].T @ G @ s["Q_R"]
    s["M"] = .95 * s["M"] + .05 * P
    s["V"] = .9 * s["V"] + .1 * P ** 2
    U = s["Q_L"] @ (s["M"] / (s["V"].sqrt() + 1e-8)) @ s["Q_R"].T
    left, right = (x.clamp(min=4000. ** -2) for x in (s["l"], s["r"]))
    s["L"] = .9 * s["L"] + .1 * G @ s["Q_R"] @ (1 / right).diag() @ s["Q_R"].T @ G.T / n
    s["R"] = .9 * s["R"] + .1 * G.T @ s["Q_L"] @ (1 / left).diag() @ s["Q_L"].T @ G / m
    s["l"] = .9 * s["l"] + .1 * (P ** 2 / right).mean(1)
    s["r"] = .9 * s["r"] + .1 * (P ** 2 / left[:, None]).mean(0)
    M = s["Q_L"] @ s["M"] @ s["Q_R"].T
    s["Q_L"], s["Q_R"] = given(s["L"], s["Q_L"], "qr"), given(s["R"], s["Q_R"], "qr")
    s["M"] = s["Q_L"].T @ M @ s["Q_R"]
    return U


# ---- rows that nobody has

def splus(W, G, s, t, eta, given):
    """Bases are renewed when `given` has new ones; matrices of one column and those of other roles step by signs."""
    s["M"] = .9 * s.get("M", 0) + .1 * G
    if given is None:
        U, size = s["M"].sign(), eta * .001
    else:
        s.setdefault("Q_L", torch.eye(len(W)).to(W)), s.setdefault("Q_R", torch.eye(W.shape[1]).to(W))
        U = s["Q_L"] @ (s["Q_L"].T @ s["M"] @ s["Q_R"]).sign() @ s["Q_R"].T
        s["L"], s["R"] = (.999 * s.get(k, 0) + .001 * X for k, X in (("L", G @ G.T), ("R", G.T @ G)))
        s["Q_L"], s["Q_R"] = given(s["L"], s["Q_L"], "rising"), given(s["R"], s["Q_R"], "rising")
        size = eta * 2 / sum(W.shape)
    return (W - size * U) * (1 - size * .01)


def step_to_border(M, name):
    """-lmo: embeddings by token, the head by signs over its inputs, gains by signs, biases by their RMS."""
    if name == "embed.weight":
        return M / (M.square().mean(1, keepdim=True).sqrt() + 1e-8)
    if name == "head.weight":
        return M.sign() / M.shape[1]
    if name.endswith("gain"):
        return M.sign()
    if name.endswith("bias"):
        return M / (M.square().mean().sqrt() + 1e-8)
    return (M.shape[0] / M.shape[1]) ** .5 * newton_schulz(M, KJ)


def muonclip(W, G, s, t, eta, given):
    s["M"] = .95 * s.get("M", 0) + G
    return W - eta * (.2 * max(W.shape) ** .5 * newton_schulz(s["M"], KJ) + .1 * W)


def clip_heads(p, largest, tau):
    """After the step: queries and keys of heads above tau by the root of tau/S."""
    for layer, S in enumerate(largest):
        root = (tau / S.clamp(min=tau)).sqrt().repeat_interleave(WIDTH // HEADS)
        for part in "qk":
            name = f"blocks.{layer}.attn.{part}."
            p[name + "weight"], p[name + "bias"] = p[name + "weight"] * root[:, None], p[name + "bias"] * root


# ---- schedules, s = updates done

def flat_then_linear(length, share, warmup=0):
    return lambda s: min(1, (length - s) / (share * length)) * (min(1, (s + 1) / warmup) if warmup else 1)


def rising_then_linear(length, warmup=250):
    return lambda s: s / warmup if s < warmup else (length - s) / length


def constant_after(warmup):
    return lambda s: min(1, (s + 1) / warmup)


# ---- the rows

class Row(NamedTuple):
    steps: int
    hidden: Callable                                      # (W, G, s, t, eta, given) -> W
    lr: float
    schedule: Callable                                    # of the hidden matrices
    rest: dict | Callable                                 # AdamW's settings, or a rule (name, W, G, s, t, eta)
    rest_schedule: Callable
    qk_norm: bool = True
    tau: float | None = None


OLD = {"embed": .3, "head": 1 / 320, "small": .01, "wd": 0}
TUNED = {"embed": .7, "head": .004, "small": .015, "wd": .001}


def scion(radii):
    def update(name, W, G, s, t, eta):
        s["D"] = .9 * s.get("D", 0) + .1 * G
        return W - eta * radii.get(kind(name), radii["hidden"]) * step_to_border(s["D"], name)
    return update


def kind(name):
    last = name.rpartition(".")[2]
    return last if last in ("gain", "bias") else name.split(".")[0] if name.count(".") == 1 else "hidden"


SCION = scion({"hidden": 50, "embed": 300, "head": 3000, "gain": 30, "bias": 50})
GLUON = scion({"hidden": 1 / 70, "embed": .1, "head": 1 / 1.3, "gain": .01, "bias": 1 / 70})


def _row(steps, hidden, lr, length=None, rest=OLD, **more):
    schedule = flat_then_linear(length or steps, .7)
    return Row(steps, hidden, lr, more.pop("schedule", schedule), rest, more.pop("rest_schedule", schedule), **more)


def _h_row(steps, direction, schedule, length=None):
    return Row(steps, hyperball(direction), .018, schedule, OLD, flat_then_linear(length or steps, .4))


ROWS = {
    "muon": _row(3250, decaying(.05, muon), .025, rest=TUNED),
    "adamw": _row(5625, decaying(.1, adam_9_95(1e-10)), .0015, schedule=flat_then_linear(5625, .7, 250),
                  rest_schedule=flat_then_linear(5625, .7, 250)),
    "adamh": _h_row(4875, adam_9_95(1e-8), rising_then_linear(4875)),
    "muonh": _h_row(3325, muon, rising_then_linear(3325)),
    "muon2": _row(3325, decaying(.0125, muon2), .1),
    "normuonh": _h_row(3250, normuon, flat_then_linear(3275, 1), 3275),
    "normuon": _row(3250, decaying(.025, normuon), .035, 3300),
    "klsoaph": _h_row(3125, kl_soap_h, flat_then_linear(3125, 1)),
    "shampoo": _row(4100, decaying(.2, shampoo), .0015, 4150),
    "spectral": _row(8225, decaying(.015, spectral), .03, 8500),
    "soaph": _h_row(3125, soap_h, lambda s: (1 - s / 3200) ** 1.25, 3200),
    "splus": Row(3250, splus, .2, constant_after(200), lambda name, W, G, s, t, eta: splus(W, G, s, t, .2 * eta, None),
                 constant_after(200)),
    "scion": _row(3250, lambda W, G, s, t, eta, given: SCION("", W, G, s, t, eta), 3.6e-4,
                  rest=lambda name, W, G, s, t, eta: SCION(name, W, G, s, t, 3.6e-4 * eta)),
    "gluon": _row(3250, lambda W, G, s, t, eta, given: GLUON("", W, G, s, t, eta), 1.,
                  rest=lambda name, W, G, s, t, eta: GLUON(name, W, G, s, t, eta)),
    "muonclip": _row(3250, muonclip, .0015, rest=TUNED, qk_norm=False, tau=100),
}


def step(row: Row, p: dict, state: dict, s: int, tokens, targets, given: Callable = lambda name: own_bases) -> float:
    """Update the weights `p` after `s` updates, in place of the old ones; the mean loss before it.

    given: a hidden weight's name -> what gives its bases, see `own_bases`.
    """
    p.update({name: w.detach().requires_grad_() for name, w in p.items()})
    largest = []
    loss = losses(p, tokens, targets, row.qk_norm, largest)
    loss.backward()
    with torch.no_grad():
        for name in list(p):
            W, G, own, t = p[name], p[name].grad, state.setdefault(name, {}), s + 1
            group = kind(name)
            if group == "hidden":
                p[name] = row.hidden(W, G, own, t, row.lr * row.schedule(s), given(name))
            elif callable(row.rest):
                p[name] = row.rest(name, W, G, own, t, row.rest_schedule(s))
            else:
                eta = row.rest.get(group, row.rest["small"]) * row.rest_schedule(s)
                p[name] = W - eta * row.rest["wd"] * W - eta * adam_direction(G, own, t, .8, .95, 1e-10)
        if row.tau is not None:
            clip_heads(p, largest, row.tau)
    return loss.item() / targets.numel()
