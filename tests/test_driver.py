"""The driver on one and several gloo ranks: sharding, padding and travelling change no number."""
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from optim.adamw import AdamW
from optim.driver import Optimizer
from optim.groups import Group
from optim.muon import Muon
from optim.schedules import Schedule
from optim.splus import SPlus

FLAT = Schedule(shape="wsd", cooldown_steps=0)
GROUPS = (Group(name="hidden", params=("q", "mlp_in"), rule="muon", hyper=Muon(lr=0.02, ns_dtype="float32")),
          Group(name="whitened", params=("attn_out",), rule="splus", hyper=SPlus(lr=0.1, inverse_every=3)),
          Group(name="rest", params=("rest",), rule="adamw", hyper=AdamW(lr=0.01, weight_decay=0.1)))


def make(average=None, grad_clip=None) -> tuple[dict[str, nn.Parameter], Optimizer]:
    """Five square matrices, two wide ones, three of SPlus's, and odd small tensors: no count divides 2 or 3."""
    g = torch.Generator().manual_seed(0)
    shapes = {**{f"q{i}": ("q", (8, 8)) for i in range(5)}, **{f"up{i}": ("mlp_in", (16, 8)) for i in range(2)},
              **{f"out{i}": ("attn_out", (8, 4)) for i in range(3)}, "gain": ("gain", (7,)), "scale": ("scalar", ()),
              "embed": ("embed", (11, 3))}
    params = {name: nn.Parameter(torch.randn(shape, generator=g)) for name, (_, shape) in shapes.items()}
    return params, Optimizer(params, {name: role for name, (role, _) in shapes.items()}, GROUPS, average, grad_clip)


def run_steps(params, optimizer, first: int, last: int, only_rank: int | None = None) -> list:
    """Steps with known gradients, all of them on one rank (zeros elsewhere), so sums over ranks are exact."""
    reports = []
    for step in range(first, last):
        g = torch.Generator().manual_seed(100 + step)
        for p in params.values():
            grad = torch.randn(p.shape, generator=g)
            p.grad = grad if only_rank in (None, optimizer.rank) else torch.zeros_like(grad)
        optimizer.set_hyperparameters(step, FLAT, 100)
        reports.append(optimizer.step(step, torch.tensor(float(step))))
    return reports


def on_ranks(world: int, task, *arguments):
    """Run task(rank, *arguments) on gloo ranks; what rank 0 saved with torch.save, or None."""
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(_one_rank, (world, directory, task, arguments), nprocs=world)
        result = Path(directory) / "result"
        return torch.load(result) if result.exists() else None


def _one_rank(rank, world, directory, task, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{directory}/meet", rank=rank, world_size=world)
    result = task(rank, *arguments)
    if rank == 0:
        torch.save(result, Path(directory) / "result")
    dist.destroy_process_group()


def _train(rank, only_rank):
    params, optimizer = make(average=0.9, grad_clip=5.0)
    reports = run_steps(params, optimizer, 0, 6, only_rank)
    with optimizer.averaged_weights():
        averaged = {name: p.detach().clone() for name, p in params.items()}
    return dict(weights={name: p.detach().clone() for name, p in params.items()}, averaged=averaged,
                norms=[r.grad_norm.item() for r in reports], state=optimizer.state_dict())


@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_number_of_ranks_equals_one_process_bit_for_bit(world):
    """Given exact gradient sums; the gradient's norm, a sum over shards, may differ by rounding and clips after."""
    one, many = _train(0, None), on_ranks(world, _train, 1)
    assert many["norms"] == pytest.approx(one["norms"], rel=1e-14)
    for kind in ("weights", "averaged"):
        for name in one[kind]:
            torch.testing.assert_close(many[kind][name], one[kind][name], rtol=1e-6, atol=1e-7, msg=name)
    assert many["state"].keys() == one["state"].keys()
    for name, state in one["state"].items():
        assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in many["state"][name].items()}


def _train_unclipped(rank, only_rank):
    params, optimizer = make()
    run_steps(params, optimizer, 0, 6, only_rank)
    return {name: p.detach().clone() for name, p in params.items()}


def test_two_ranks_equal_one_process_to_the_bit_without_clipping():
    one, two = _train_unclipped(0, None), on_ranks(2, _train_unclipped, 0)
    for name in one:
        assert torch.equal(one[name], two[name]), name


def _save_after_three(rank):
    params, optimizer = make(average=0.9)
    run_steps(params, optimizer, 0, 3, 0)
    return dict(model={name: p.detach().clone() for name, p in params.items()}, state=optimizer.state_dict())


def _continue(rank, saved):
    params, optimizer = make(average=0.9)
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(saved["model"][name])
    optimizer.load_state_dict(saved["state"], 3)
    run_steps(params, optimizer, 3, 6, 0)
    with optimizer.averaged_weights():
        return {name: p.detach().clone() for name, p in params.items()}


def test_state_saved_by_two_ranks_continues_on_one_and_on_three():
    params, optimizer = make(average=0.9)
    run_steps(params, optimizer, 0, 6)
    with optimizer.averaged_weights():
        whole = {name: p.detach().clone() for name, p in params.items()}
    saved = on_ranks(2, _save_after_three)
    for continued in (_continue(0, saved), on_ranks(3, _continue, saved)):
        for name in whole:
            torch.testing.assert_close(continued[name], whole[name], rtol=1e-6, atol=1e-7, msg=name)


def _one_bad_gradient(rank):
    params, optimizer = make(average=0.9)
    run_steps(params, optimizer, 0, 2)
    before = {name: p.detach().clone() for name, p in params.items()}
    state_before = optimizer.state_dict()
    for p in params.values():
        p.grad = torch.zeros_like(p)
    if rank == dist.get_world_size() - 1:
        params["up1"].grad[3, 3] = torch.nan
    optimizer.set_hyperparameters(2, FLAT, 100)
    report = optimizer.step(2, torch.tensor(1.0))
    after = run_steps(params, optimizer, 3, 4)[0]                   # a good gradient after a bad one: still nothing
    state = optimizer.state_dict()
    same = all(torch.equal(before[n], p) for n, p in params.items()) and all(
        torch.equal(v, state_before[n][k]) for n in state for k, v in state[n].items())
    seen = torch.tensor([float(same), float(report.ok), float(after.ok)])
    dist.all_reduce(seen)
    return seen


def test_a_bad_gradient_on_one_rank_writes_nothing_on_any():
    assert on_ranks(2, _one_bad_gradient).tolist() == [2.0, 0.0, 0.0]      # unchanged on both; not ok on both, ever after


def _one_wants_to_stop(rank):
    params, optimizer = make()
    for p in params.values():
        p.grad = torch.ones_like(p)
    optimizer.set_hyperparameters(0, FLAT, 100)
    report = optimizer.step(0, torch.tensor(2.0), stop=rank == 1)
    seen = torch.stack([report.stops, report.loss])
    dist.all_reduce(seen)
    return seen


def test_every_rank_learns_that_one_wants_to_stop_and_the_whole_loss():
    assert on_ranks(2, _one_wants_to_stop).tolist() == [2.0, 8.0]


def test_parameters_of_one_shape_are_views_of_one_tensor():
    params, optimizer = make()
    bank = next(b for b in optimizer.banks if "q0" in b.params)
    assert bank.weights.shape == (5, 8, 8)
    for i in range(5):
        assert params[f"q{i}"].data_ptr() == bank.weights[i].data_ptr()
    flat = next(b for b in optimizer.banks if "gain" in b.params)
    assert flat.weights.ndim == 1 and {"gain", "scale", "embed"} == set(flat.params)


def test_the_average_is_the_bias_corrected_running_mean_of_the_weights_after_each_step():
    params, optimizer = make(average=0.9)
    expected, total = torch.zeros(8, 8, dtype=torch.float64), 0.0
    for step in range(5):
        run_steps(params, optimizer, step, step + 1)
        expected = 0.9 * expected + 0.1 * params["q2"].detach().double()
        total = 0.9 * total + 0.1
    raw = params["q2"].detach().clone()
    with optimizer.averaged_weights():
        torch.testing.assert_close(params["q2"].double(), expected / total, rtol=1e-6, atol=1e-7)
    assert torch.equal(params["q2"], raw)


def test_the_weights_come_back_even_when_evaluation_fails():
    params, optimizer = make(average=0.9)
    run_steps(params, optimizer, 0, 2)
    raw = params["gain"].detach().clone()
    with pytest.raises(RuntimeError), optimizer.averaged_weights():
        raise RuntimeError
    assert torch.equal(params["gain"], raw)


def test_gradients_are_not_written_to_and_are_freed():
    params, optimizer = make()
    grads = {name: torch.ones_like(p) for name, p in params.items()}
    for name, p in params.items():
        p.grad = grads[name]
    optimizer.set_hyperparameters(0, FLAT, 100)
    optimizer.step(0, torch.tensor(0.0))
    assert all(torch.equal(g, torch.ones_like(g)) for g in grads.values())
    assert all(p.grad is None for p in params.values())


def test_a_parameter_without_gradient_is_named():
    params, optimizer = make()
    for name, p in params.items():
        p.grad = None if name == "embed" else torch.ones_like(p)
    optimizer.set_hyperparameters(0, FLAT, 100)
    with pytest.raises(AssertionError, match="embed"):
        optimizer.step(0, torch.tensor(0.0))


def test_clipping_scales_the_gradient_to_the_limit():
    """Seen through AdamW's first moment, which is (1 - beta1) times the gradient after one step."""
    params, optimizer = make(grad_clip=0.5)
    report = run_steps(params, optimizer, 0, 1)[0]
    assert report.grad_norm.item() > 5
    g = torch.Generator().manual_seed(100)
    grads = {name: torch.randn(p.shape, generator=g) for name, p in params.items()}
    factor = 0.5 / (report.grad_norm.item() + 1e-6)
    torch.testing.assert_close(optimizer.state_dict()["gain"]["m"], 0.1 * factor * grads["gain"], rtol=1e-5, atol=1e-9)


def test_reset_forgets_every_step():
    params, optimizer = make(average=0.9)
    fresh = optimizer.state_dict()
    run_steps(params, optimizer, 0, 3)
    optimizer.reset()
    again = optimizer.state_dict()
    assert all(torch.equal(again[n][k], v) for n in fresh for k, v in fresh[n].items())
