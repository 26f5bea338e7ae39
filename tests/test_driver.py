"""The driver on one and several gloo ranks: sharding, padding and travelling change no number."""
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from optim import RULES
from optim.adamw import AdamW
from optim.driver import Optimizer
from optim.groups import Group, GroupError
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
def test_any_number_of_ranks_equals_one_process(world):
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


def _step_without_some(rank, missing_here):
    """Two steps; in the second the named parameters have no gradient on the ranks that are listed."""
    params, optimizer = make(average=0.9)
    run_steps(params, optimizer, 0, 1, 0)
    before, state = {n: p.detach().clone() for n, p in params.items()}, optimizer.state_dict()
    for name, p in params.items():
        g = torch.Generator().manual_seed(7)
        grad = torch.randn(p.shape, generator=g)
        p.grad = None if rank in missing_here.get(name, ()) else grad if rank == 0 else torch.zeros_like(grad)
    optimizer.set_hyperparameters(1, FLAT, 100)
    assert optimizer.step(1, torch.tensor(1.0)).ok == 1
    after = optimizer.state_dict()
    return {n: (torch.equal(before[n], p), all(torch.equal(state[n][k], v) for k, v in after[n].items()
                                               if k != "average"), p.detach().clone()) for n, p in params.items()}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_parameter_without_gradient_on_any_rank_is_untouched(world):
    """Neither decay nor momentum; one that has none on some ranks takes the sum of the others."""
    everywhere, elsewhere = tuple(range(world)), tuple(range(1, world))
    missing = {"q2": everywhere, "embed": everywhere, "out1": everywhere, "up0": elsewhere, "gain": elsewhere}
    seen = on_ranks(world, _step_without_some, missing) if world > 1 else _step_without_some(0, missing)
    untouched = {name for name, (weights, state, _) in seen.items() if weights and state}
    assert untouched == {"q2", "embed", "out1"}
    for name, (_, _, value) in _step_without_some(0, {n: (0,) for n in untouched}).items():
        torch.testing.assert_close(seen[name][2], value, rtol=1e-6, atol=1e-7, msg=name)


def _refreshing_without(rank, missing):
    g = torch.Generator().manual_seed(0)
    params = {f"q{i}": nn.Parameter(torch.randn(6, 6, generator=g)) for i in range(3)}
    group = Group(name="hidden", params=("q",), rule="soap", hyper=RULES["soap"](precondition_frequency=1))
    optimizer = Optimizer(params, dict.fromkeys(params, "q"), (group,))
    run_steps(params, optimizer, 0, 2)
    before = optimizer.state_dict()
    for name, p in params.items():
        p.grad = None if name in missing else torch.randn(6, 6, generator=g)
    optimizer.set_hyperparameters(2, FLAT, 10)
    optimizer.step(2, torch.tensor(0.0))
    after = optimizer.state_dict()
    return {n for n in params if all(torch.equal(before[n][k], v) for k, v in after[n].items())}


def test_a_matrix_without_gradient_gets_no_new_basis_either():
    assert _refreshing_without(0, {"q1"}) == {"q1"}
    assert on_ranks(2, _refreshing_without, {"q0", "q2"}) == {"q0", "q2"}


def test_a_checkpoint_that_lacks_something_is_named():
    params, optimizer = make()
    saved = optimizer.state_dict()
    del saved["q3"]["momentum"]
    with pytest.raises(GroupError, match="the checkpoint has no momentum of q3"):
        optimizer.load_state_dict(saved, 1)


def test_a_step_inside_averaged_weights_is_refused():
    params, optimizer = make(average=0.9)
    with pytest.raises(AssertionError, match="would be lost"), optimizer.averaged_weights():
        run_steps(params, optimizer, 0, 1)
    run_steps(params, optimizer, 0, 1)


def test_a_device_that_decides_itself_writes_the_same_and_nothing_after_a_bad_gradient():
    (eager, one), (params, optimizer) = make(average=0.9), make(average=0.9)
    optimizer.host_may_look = False
    run_steps(eager, one, 0, 4), run_steps(params, optimizer, 0, 4)
    assert all(torch.equal(eager[n], p) for n, p in params.items())
    before, state = {n: p.detach().clone() for n, p in params.items()}, optimizer.state_dict()
    for p in params.values():
        p.grad = torch.full_like(p, torch.inf)
    optimizer.set_hyperparameters(5, FLAT, 100)                     # SPlus would refresh here
    assert optimizer.step(5, torch.tensor(1.0)).ok == 0
    assert all(torch.equal(before[n], p) for n, p in params.items())
    assert all(torch.equal(v, state[n][k]) for n, kept in optimizer.state_dict().items() for k, v in kept.items())


def _order_of_departure(rank):
    params, optimizer = make()
    gone, send = [], optimizer._send_gradients
    optimizer._send_gradients = lambda bank: gone.append(next(iter(bank.params))) or send(bank)
    optimizer.expect_last_gradients()
    chain = torch.zeros(())                                         # a backward pass meets the last parameter first
    for p in params.values():
        chain = chain * 0.5 + p.square().sum()
    during = []
    next(iter(params.values())).register_hook(lambda grad: during.extend(gone))
    chain.backward()
    optimizer.set_hyperparameters(0, FLAT, 100)
    optimizer.step(0, torch.tensor(0.0))
    return during, gone


def test_gradients_leave_in_backward_order_while_the_backward_pass_goes_on():
    during, gone = on_ranks(2, _order_of_departure)
    assert gone == ["gain", "out0", "up0", "q0"] and during == gone[:3]


def _with_rule(rank, name, options, only_rank):
    g = torch.Generator().manual_seed(0)
    shapes = {**{f"q{i}": ("q", (8, 8)) for i in range(3)}, **{f"up{i}": ("mlp_in", (12, 8)) for i in range(2)},
              "embed": ("embed", (9, 4)), "gain": ("gain", (7,))}
    params = {n: nn.Parameter(torch.randn(shape, generator=g)) for n, (_, shape) in shapes.items()}
    hyper = {"ns_dtype": "float32"} if "ns_dtype" in RULES[name].__dataclass_fields__ else {}
    if options and "weight_decay" in RULES[name].__dataclass_fields__:
        hyper["weight_decay"] = 0.0 if options.get("hyperball") else 0.1
    groups = (Group(name="hidden", params=("q", "mlp_in"), rule=name, hyper=RULES[name](**hyper), **options),
              Group(name="rest", params=("rest",), rule="adamw", hyper=AdamW()))
    optimizer = Optimizer(params, {n: role for n, (role, _) in shapes.items()}, groups, heads=2)
    optimizer.init_weights(0)
    optimizer.reset()
    run_steps(params, optimizer, 0, 4, only_rank)
    saved = optimizer.state_dict()
    optimizer.reset()
    optimizer.load_state_dict(saved, 4)
    run_steps(params, optimizer, 4, 12, only_rank)
    return {n: p.detach().clone() for n, p in params.items()}


OPTIONS = ({}, {"hyperball": True})


def _every_rule(rank, only_rank):
    return {(name, bool(options)): _with_rule(rank, name, options, only_rank) for name in RULES for options in OPTIONS}


@pytest.fixture(scope="module")
def every_rule_on_three_ranks():
    return on_ranks(3, _every_rule, 1)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "hyperball" if options else "plain")
@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_the_same_on_three_ranks_and_after_a_checkpoint(name, options, every_rule_on_three_ranks):
    """3 and 2 matrices on 3 ranks: some own none of a kind."""
    one, three = _with_rule(0, name, options, None), every_rule_on_three_ranks[name, bool(options)]
    for key in one:
        assert torch.isfinite(one[key]).all()
        torch.testing.assert_close(three[key], one[key], rtol=1e-5, atol=1e-6, msg=key)


def _by_head(rank, blocks):
    g = torch.Generator().manual_seed(0)
    params = {n: nn.Parameter(torch.randn(8, 8, generator=g)) for n in ("q", "attn_out")}
    muon = Muon(lr=0.02, ns_dtype="float32")
    optimizer = Optimizer(params, {n: n for n in params}, (Group(
        name="hidden", params=("rest",), rule="muon", hyper=muon, blocks=blocks),), heads=4)
    run_steps(params, optimizer, 0, 3)
    return {n: p.detach().clone() for n, p in params.items()}


def test_heads_are_updated_as_matrices_of_their_own():
    for blocks, count in (("heads", 4), ("head_pairs", 2)):
        cut, whole = _by_head(0, blocks), _by_head(0, "whole")
        g = torch.Generator().manual_seed(0)
        start = {n: torch.randn(8, 8, generator=g) for n in ("q", "attn_out")}
        rule = Muon(lr=0.02, ns_dtype="float32")
        W = {"q": torch.stack(start["q"].chunk(count)), "attn_out": torch.stack(start["attn_out"].chunk(count, 1))}
        state = {n: rule.init(w) for n, w in W.items()}
        h = {k: torch.tensor(v, dtype=torch.float64) for k, v in (("lr", .02), ("momentum", .95), ("weight_decay", 0.))}
        for step in range(3):
            g = torch.Generator().manual_seed(100 + step)
            for n, axis in (("q", 0), ("attn_out", 1)):
                rule.update(W[n], torch.stack(torch.randn(8, 8, generator=g).chunk(count, axis)), state[n], h)
        for n, axis in (("q", 0), ("attn_out", 1)):
            torch.testing.assert_close(cut[n], torch.cat(list(W[n]), axis), rtol=1e-6, atol=1e-7)
            assert not torch.allclose(cut[n], whole[n], atol=1e-3)


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


def _clip(rank, ok):
    """Two attentions of two heads; each rank has seen other logits, and rank 1 the larger ones of the second head."""
    g = torch.Generator().manual_seed(0)
    names = [f"{layer}.{what}" for layer in "ab" for what in ("q.weight", "q.bias", "k.weight")]
    params = {n: nn.Parameter(torch.randn((8, 6) if "weight" in n else (8,), generator=g)) for n in names}
    roles = {n: "bias" if "bias" in n else n[2] for n in names}
    groups = (Group(name="hidden", params=("q", "k"), rule="muonclip", hyper=RULES["muonclip"](lr=0.0, tau=50.0)),
              Group(name="rest", params=("rest",), rule="adamw", hyper=AdamW(lr=0.0)))
    qk = {layer: [n for n in names if n[0] == layer] for layer in "ab"}
    optimizer = Optimizer(params, roles, groups, average=0.5, heads=2, qk=qk)
    start = {n: p.detach().clone() for n, p in params.items()}
    for p in params.values():
        p.grad = torch.full_like(p, 1.0 if ok else torch.nan)
    optimizer.set_hyperparameters(0, FLAT, 10)
    logits = {"a": torch.tensor([49.0, 200.0 if rank == optimizer.world - 1 else 60.0]), "b": torch.tensor([-1.0, 2.0])}
    optimizer.step(0, torch.tensor(0.0), max_logits=logits)
    with optimizer.averaged_weights():
        averaged = {n: p.detach().clone() for n, p in params.items()}
    return {n: (start[n], p.detach().clone(), averaged[n]) for n, p in params.items()}


@pytest.mark.parametrize("world", [1, 2])
def test_heads_are_clipped_by_the_largest_logit_of_all_ranks(world):
    seen = on_ranks(world, _clip, True) if world > 1 else _clip(0, True)
    for name, (start, now, averaged) in seen.items():
        expected = start.clone()
        if name.startswith("a"):
            expected[4:] *= (50 / 200) ** .5
        torch.testing.assert_close(now, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(averaged, expected, rtol=1e-6, atol=0)        # averaged after the clip


def test_a_bad_gradient_clips_no_head():
    assert all(torch.equal(start, now) for start, now, _ in _clip(0, False).values())


def _scion(rank, seed):
    params = {"q": nn.Parameter(torch.zeros(8, 6)), "embed": nn.Parameter(torch.ones(9, 4)),
              "gain": nn.Parameter(torch.ones(5))}
    scion = RULES["scion"]
    groups = (Group(name="hidden", params=("q",), rule="scion", hyper=scion(radius=3.0), blocks="heads"),
              Group(name="embed", params=("embed",), rule="scion", hyper=scion(geometry="colnorm", radius=2.0)),
              Group(name="rest", params=("rest",), rule="scion", hyper=scion(geometry="max", init_on_ball=False)))
    optimizer = Optimizer(params, {n: n for n in params}, groups, heads=2)
    optimizer.init_weights(seed)
    return {n: p.detach().clone() for n, p in params.items()}


def test_rules_with_initial_weights_of_their_own_draw_them_for_every_logical_block():
    drawn = _scion(0, 0)
    for head in drawn["q"].split(4):                                  # spectral: 4 x 6, all singular values 3 sqrt(4/6)
        torch.testing.assert_close(torch.linalg.svdvals(head), torch.full((4,), 3 * (4 / 6) ** .5), rtol=1e-5, atol=0)
    torch.testing.assert_close(drawn["embed"].norm(dim=1), torch.full((9,), 2 * 4 ** .5), rtol=1e-5, atol=0)
    assert torch.equal(drawn["gain"], torch.ones(5))                  # the model's own
    assert not torch.equal(drawn["q"], _scion(0, 1)["q"])
    for name, values in on_ranks(3, _scion, 0).items():
        assert torch.equal(values, drawn[name])


def _heads_with_a_checkpoint(rank, saved, first, last):
    g = torch.Generator().manual_seed(0)
    params = {f"{n}{i}": nn.Parameter(torch.randn(8, 8, generator=g)) for n in ("q", "attn_out") for i in range(3)}
    optimizer = Optimizer(params, {n: n[:-1] for n in params}, (Group(
        name="hidden", params=("rest",), rule="muon", hyper=Muon(ns_dtype="float32"), blocks="heads"),), heads=4)
    if saved is not None:
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(saved["model"][name])
        optimizer.load_state_dict(saved["state"], first)
    run_steps(params, optimizer, first, last, 0)
    return dict(model={n: p.detach().clone() for n, p in params.items()}, state=optimizer.state_dict())


def test_the_state_of_heads_is_saved_a_parameter_at_a_time_and_continues_on_other_ranks():
    whole = _heads_with_a_checkpoint(0, None, 0, 4)
    saved = on_ranks(2, _heads_with_a_checkpoint, None, 0, 2)
    assert {name: state["momentum"].shape for name, state in saved["state"].items()} == {
        name: (4, 2, 8) if name.startswith("q") else (4, 8, 2) for name in whole["model"]}
    for continued in (_heads_with_a_checkpoint(0, saved, 2, 4), on_ranks(3, _heads_with_a_checkpoint, saved, 2, 4)):
        for name, p in whole["model"].items():
            torch.testing.assert_close(continued["model"][name], p, rtol=1e-6, atol=1e-7, msg=name)
