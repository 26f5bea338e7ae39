"""Records 1 to 11 of the speedrun's track 1 and its two ladders as plain mathematics, read from their descriptions.

A record is a number: 1 llm.c, 2 AdamW, 4 Muon, 5 ModernArch, 6 and 7, 8 UntieEmbed, 9 ShortcutsTweaks, 10 CastBf16,
11 UNet; 8.1 to 8.4 are the rungs between records 8 and 9 (value residual, learnable, embed shortcut, momentum warm-up).
The comparison of 2024-10-29 is record 7 with another rule for its hidden matrices.

Weights are a dict by name: wte, wpe, head, lam (L,), mix (L, 2), skip (L/2,); N.q, N.k, N.v, N.o, N.up, N.down of
layer N, with N.q.b and so on for biases; N.ln1, N.ln2, lnf and their .b. Matrices are (out, in). Where weights are
float64 everything is; else products are bfloat16 as each record had them, by autocast until 9, of cast weights from 10.
"""
import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F

FP32_EPS = 2.0 ** -23
# record: steps, warm-up, warmdown
STEPS = {1: (19560, 700, None), 2: (9536, 256, 2048), 4: (6200, 0, 1800), 5: (5100, 0, 1450), 6: (5100, 0, 1450),
         7: (5100, 0, 1450), 8: (4578, 0, 1308), 8.1: (3200, 0, 914), 8.2: (3200, 0, 914), 8.3: (3200, 0, 914),
         8.4: (3200, 0, 914), 9: (3200, 0, 914), 10: (3242, 0, 926), 11: (3000, 0, 900)}
# record: learning rates of embedding (tied: of both), head, hidden matrices, scalars
RATES = {1: (6e-4, 0, 6e-4, 6e-4), 2: (.0018, 0, .0018, 0), 4: (.0036, 0, .00036, 0), 5: (.0036, 0, .00036, 0),
         6: (.0036, 0, .00036, 0), 7: (.0036, 0, .00036, 0), 8: (.3, .002, .02, .02), 9: (.3, .002, .02, .02),
         10: (.3, .002, .02, .02), 11: (.6, .008, .04, .04)}
WARMUP_OF_COMPARISON = {"muon": 0, "adam": 250, "shampoo": 250, "soap": 250}
RATES_OF_COMPARISON = {"muon": .02, "adam": .0018, "shampoo": .0018, "soap": .0018}
MOMENTUM_RAMP, CLIP = 500, 1.0


# ---------------------------------------------------------------- schedules

def eta(record: float, s: int, steps: int, warmup: int, warmdown: int | None) -> float:
    """What multiplies every learning rate in the update after s others."""
    if s < warmup:
        return (s + 1) / warmup
    if record == 1:
        return 0.5 * (1 + math.cos(math.pi * (s - warmup) / (steps - warmup)))
    return 1.0 if s < steps - warmdown else (steps - s) / warmdown


def momentum(record: float, s: int, ramp: int) -> float:
    return 0.95 if record < 8.4 else 0.85 + 0.1 * min(s / ramp, 1)


# ---------------------------------------------------------------- the network

def loss(record: float, W: dict, tokens, targets, layers: int, heads: int, vocab: int):
    """Mean cross-entropy of tokens (b, t)."""
    exact = W["wte"].dtype == torch.float64
    with nullcontext() if exact or record in (1, 10, 11) else torch.autocast("cpu", torch.bfloat16):
        logits = network(record, W, tokens, layers, heads, exact)
        if record >= 9:
            logits = 30 * torch.tanh(logits / 30)
    logits = logits if exact else logits.float()
    if record == 1:
        logits = logits[..., :vocab]                             # llm.c: the padding is no token
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def network(record, W, tokens, layers, heads, exact):
    x = W["wte"][tokens]
    if record == 1:
        x = x + W["wpe"][:tokens.shape[1]]
        x = x if exact else x.bfloat16()
    if record >= 8:
        x = norm(record, x, W)
    x0, v1, below = x, None, []
    for layer in range(layers):
        if record >= 11 and layer >= layers // 2:
            x = x + W["skip"][layer - layers // 2] * below.pop()
        if record >= 8.3:
            x = W["mix"][layer, 0] * x + W["mix"][layer, 1] * x0
        y, v = attention(record, W, layer, norm(record, x, W, f"{layer}.ln1"), heads, v1, exact)
        v1 = v if v1 is None else v1
        x = x + (y / math.sqrt(24) if 2 <= record < 5 else y)
        h = linear(norm(record, x, W, f"{layer}.ln2"), W, f"{layer}.up")
        h = F.gelu(h, approximate="tanh") if record == 1 else F.gelu(h) if record < 5 else F.relu(h).square()
        x = x + linear(h, W, f"{layer}.down")
        if record >= 11 and layer < layers // 2:
            below.append(x)
    x = norm(record, x, W, "lnf")
    head = W["wte"] if record < 8 else W["head"]
    return F.linear(x, head.to(x.dtype))


def attention(record, W, layer, x, heads, v1, exact):
    b, t, _ = x.shape
    q, k, v = (linear(x, W, f"{layer}.{name}").view(b, t, heads, -1) for name in "qkv")
    own = v
    if v1 is not None and record >= 8.1:
        lam = 0.5 if record == 8.1 else W["lam"][layer]
        v = (1 - lam) * v + lam * v1
    if record >= 6:
        q, k = norm(record, q, W), norm(record, k, W)
    if record >= 2:
        q, k = rotate(record, q, exact), rotate(record, k, exact)
    if record == 5:
        q, k = norm(record, q, W), norm(record, k, W)
    q, k = q.to(v.dtype), k.to(v.dtype)
    y = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), is_causal=True)
    return linear(y.transpose(1, 2).reshape(b, t, -1), W, f"{layer}.o"), own


def rotate(record, x, exact):
    t, d = x.shape[1], x.shape[-1]
    angles = torch.outer(torch.arange(t), 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d))[:, None]
    table = torch.float64 if exact else torch.float32 if record < 5 else torch.bfloat16
    cos, sin = angles.cos().to(table), angles.sin().to(table)
    x1, x2 = x[..., :d // 2], x[..., d // 2:]
    return torch.cat([x1 * cos + x2 * sin, -x1 * sin + x2 * cos], -1).to(x.dtype)


def norm(record, x, W, name=None):
    if record == 1:
        return F.layer_norm(x, x.shape[-1:], W[name].to(x.dtype), W[name + ".b"].to(x.dtype), 1e-5)
    if record < 5:
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    return F.rms_norm(x, x.shape[-1:], eps=FP32_EPS)


def linear(x, W, name):
    bias = W.get(name + ".b")
    return F.linear(x, W[name].to(x.dtype), None if bias is None else bias.to(x.dtype))


# ---------------------------------------------------------------- the optimizers

def adam(p, g, state, lr, betas, decay=0.0, eps=1e-8):
    if not state:
        state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
    state["t"] += 1
    t, m, v, (b1, b2) = state["t"], state["m"], state["v"], betas
    p.mul_(1 - lr * decay)
    m.mul_(b1).add_(g, alpha=1 - b1)
    v.mul_(b2).addcmul_(g, g, value=1 - b2)
    p.addcdiv_(m, (v.sqrt() / math.sqrt(1 - b2 ** t)).add_(eps), value=-lr / (1 - b1 ** t))


def muon(record, p, g, state, lr, mu):
    """From record 8 on, and in the comparison, lr is in units of the spectral norm; before, of the RMS."""
    if not state:
        state["buf"] = torch.zeros_like(p)
    state["buf"].mul_(mu).add_(g)
    rows, cols = p.shape
    scale = math.sqrt(max(rows, cols)) if record < 8 else math.sqrt(max(1, rows / cols))
    p.sub_(lr * scale * newton_schulz(g + mu * state["buf"]))


def newton_schulz(u):
    """Five steps; in float64 without the 1e-7 beside the norm, which is for zeros and would not be lost there."""
    a, b, c = 3.4445, -4.7750, 2.0315
    if u.dtype == torch.float64:
        x = u / (u.norm() if u.any() else 1.0)
    else:
        x = u.bfloat16()
        x = x / (x.norm() + 1e-7)
    x = x.T if u.shape[0] > u.shape[1] else x
    for _ in range(5):
        A = x @ x.T
        x = a * x + (b * A + c * A @ A) @ x
    return (x.T if u.shape[0] > u.shape[1] else x).to(u.dtype)


def soap(p, g, state, lr, b=.95, decay=.01, eps=1e-8):
    """Every tenth step new bases, by one QR each; the first step only makes them."""
    if not state:
        state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p), L=(1 - b) * g @ g.T, R=(1 - b) * g.T @ g)
        for side in "LR":
            ridge = 1e-30 * torch.eye(len(state[side]))
            state["Q" + side] = torch.linalg.eigh(state[side] + ridge).eigenvectors.flip(1)
        return
    state["t"] += 1
    t, QL, QR = state["t"], state["QL"], state["QR"]
    rotated = QL.T @ g @ QR
    state["m"].mul_(b).add_(rotated, alpha=1 - b)
    state["v"].mul_(b).addcmul_(rotated, rotated, value=1 - b)
    step = math.sqrt(1 - b ** t) / (1 - b ** t) * state["m"] / (state["v"].sqrt() + eps)
    p.sub_(lr * QL @ step @ QR.T).mul_(1 - lr * decay)
    state["L"].lerp_(g @ g.T, 1 - b)
    state["R"].lerp_(g.T @ g, 1 - b)
    if t % 10 == 0:
        averaged = QL @ state["m"] @ QR.T
        for side, Q, dim in (("L", QL, 0), ("R", QR, 1)):
            order = torch.argsort((Q.T @ state[side] @ Q).diagonal(), descending=True, stable=True)
            state["v"] = state["v"].index_select(dim, order)
            state["Q" + side] = torch.linalg.qr(state[side] @ Q[:, order])[0] if state[side].any() else Q
        state["m"] = state["QL"].T @ averaged @ state["QR"]


def shampoo(p, g, state, lr, b=.95, eps=1e-12, graft_eps=1e-8):
    """L^-1/4 M R^-1/4 as long as Adam's step; roots every tenth step, and Adam's step itself until the first."""
    if not state:
        n, m = p.shape
        state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p), L=torch.zeros(n, n), R=torch.zeros(m, m),
                     roots=None)
    state["t"] += 1
    t = state["t"]
    state["m"].lerp_(g, 1 - b)
    state["v"].lerp_(g * g, 1 - b)
    state["L"].lerp_(g @ g.T, 1 - b)
    state["R"].lerp_(g.T @ g, 1 - b)
    direction = state["m"] / (1 - b ** t)
    grafted = direction / ((state["v"] / (1 - b ** t)).sqrt() + graft_eps)
    if state["roots"] is not None:
        direction = state["roots"][0] @ direction @ state["roots"][1]
        grafted = direction * (grafted.norm() / direction.norm()) if direction.any() else grafted
    p.sub_(lr * grafted)
    if t % 10 == 0:
        state["roots"] = [inverse_fourth_root(state[side] / (1 - b ** t), eps) for side in "LR"]


def inverse_fourth_root(S, eps):
    values, vectors = torch.linalg.eigh(S)
    return vectors @ torch.diag((values.clamp(min=0) + eps) ** -0.25) @ vectors.T


# ---------------------------------------------------------------- a run

def train(record: float, W: dict, batches: list, layers: int, heads: int, vocab: int, steps: int, warmup: int,
          warmdown: int | None, ramp: int, clip: float, hidden: str | None = None) -> list[float]:
    """The losses before each update, one a batch of `batches` [(tokens, targets)]; changes the weights W in place.

    ramp: steps in which the momentum rises. clip: record 1's largest gradient norm. hidden: the rule of the hidden
    matrices in the comparison of 2024-10-29.
    """
    states, losses = {name: {} for name in W}, []
    embed_lr, head_lr, hidden_lr, scalar_lr = RATES[record if record in RATES else 8]
    for s, (tokens, targets) in enumerate(batches):
        value = loss(record, {k: w.requires_grad_() for k, w in W.items()}, tokens, targets, layers, heads, vocab)
        grads = dict(zip(W, torch.autograd.grad(value, W.values(), materialize_grads=True)))
        losses.append(value.item())
        if record == 1:
            total = math.sqrt(sum(g.double().square().sum().item() for g in grads.values()))
            grads = {k: g * min(1, clip / total) for k, g in grads.items()}
        factor, mu = eta(record, s, steps, warmup, warmdown), momentum(record, s, ramp)
        for name, w in W.items():
            p, g, state = w.detach(), grads[name], states[name]
            matrix = name.split(".")[-1] in ("q", "k", "v", "o", "up", "down")
            if record in (1, 2):
                adam(p, g, state, hidden_lr * factor, (.9, .95), decay=.1 if p.dim() >= 2 else 0)
            elif not matrix:
                lr = {"wte": embed_lr, "head": head_lr}.get(name, scalar_lr)
                adam(p, g, state, lr * factor, (.9, .95))
            elif hidden in (None, "muon"):
                lr = hidden_lr if hidden is None else RATES_OF_COMPARISON[hidden]
                muon(8 if hidden else record, p, g, state, lr * factor, mu)
            else:
                lr = RATES_OF_COMPARISON[hidden] * factor
                {"adam": lambda: adam(p, g, state, lr, (.9, .95)), "soap": lambda: soap(p, g, state, lr),
                 "shampoo": lambda: shampoo(p, g, state, lr)}[hidden]()
    return losses
