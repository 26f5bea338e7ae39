"""Weights, gradients and hyperparameters as the tests of update rules draw them."""
import torch

COUNT = 20


def hyper(**values):
    """Values as an update gets them: 0-d float64 tensors."""
    return {name: torch.tensor(float(value), dtype=torch.float64) for name, value in values.items()}


def weights(shape=(3, 24, 16), dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) / 4


def gradients(shape=(3, 24, 16), count=COUNT, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def run(rule, W, grads, lr=.01, momentum=.95):
    """The state after updates with a learning rate and a momentum that both move, as schedules move them."""
    state = rule.init(W)
    for t, G in enumerate(grads):
        rule.update(W, G, state, hyper(lr=lr * (1 + t % 3), momentum=momentum - .01 * (t % 5),
                                       weight_decay=rule.weight_decay, t=t + 1))
    return state
