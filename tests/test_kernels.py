"""The kernels of the orthogonalisation in Triton's interpreter: float32 and float16, for it is wrong in bfloat16."""
import ctypes
import mmap
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from optim import backend
from optim.driver import Optimizer
from optim.groups import Group
from optim.muon import Muon
from optim.orthogonalise import COEFFICIENTS, iterate
from optim.schedules import Schedule
from tests.conftest import ROOT
from tests.interpreted import interpreter

# Matrices a stack, rows, inner: tiny, odd, one and several tiles of 16, tall and wide.
SHAPES = [(1, 1, 1), (3, 2, 5), (2, 16, 16), (2, 17, 3), (1, 33, 50), (2, 50, 33), (1, 5, 70)]
BOUND = {torch.float32: 3e-7, torch.float16: 5e-4}       # measured: 9e-8 and 2.5e-4


@pytest.fixture(scope="module")
def interpreted():
    with interpreter() as run:
        yield run


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(value, exact):
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


# ---------------------------------------------------------------- the symmetric product

def errors_of_products(n, rows, inner, dtype):
    """Errors of XXᵀ, of X's columns by a view, of bA + cA², of a product of two commuting matrices; all symmetric."""
    from optim.kernels.symmetric import reference, symmetric_product
    X, T = (draw(*shape) / (rows * inner) ** 0.5 for shape in ((n, rows, inner), (n, inner, rows)))
    X, T = X.to(dtype), T.to(dtype)
    A = symmetric_product(X, X)
    tall = symmetric_product(T.mT, T.mT)
    B = symmetric_product(A, A, A, 0.5, -2.0)
    AB = symmetric_product(A, B, A, -1.0, 0.25)
    every = torch.stack([A, tall, B, AB])
    assert (every == every.mT).all() and every.dtype == dtype
    return [error(A, reference(X, X)), error(tall, reference(T.mT, T.mT)), error(B, reference(A, A, A, 0.5, -2.0)),
            error(AB, reference(A, B, A, -1.0, 0.25)) / 4]            # B is rounded, so not quite a polynomial of A


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_symmetric_products_equal_float64_and_their_own_transpose(interpreted, shape, dtype):
    assert max(interpreted(errors_of_products, *shape, dtype)) < BOUND[dtype]


def products_of_strided():
    """Of every second matrix, row and number of a larger stack, into every second matrix of a stack that must keep
    the others; and of two matrices of one stack that are far apart."""
    from optim.kernels.symmetric import reference, symmetric_product
    X, out = draw(6, 40, 60)[::2, ::2, ::2], torch.full((6, 20, 24), 7.0)
    symmetric_product(X, X, out=out[::2, :, :20])
    assert error(out[::2, :, :20], reference(X, X)) < 3e-7
    assert (out[1::2] == 7).all() and (out[:, :, 20:] == 7).all()
    D = draw(6, 20, 24)[::2, :, :20]
    D = (D + D.mT).contiguous()
    assert error(symmetric_product(X, X, D, 2.0, 3.0), reference(X, X, D, 2.0, 3.0)) < 3e-7


def test_symmetric_products_take_any_strides_and_write_nothing_else(interpreted):
    interpreted(products_of_strided)


def product_of_distant_matrices():
    """Strides of 2³⁰ numbers: the third matrix begins at 2³¹. Memory that is not touched is not used."""
    from optim.kernels.symmetric import reference, symmetric_product
    far = torch.empty(2**31 + 2**12, dtype=torch.float16).as_strided((3, 20, 24), (2**30, 24, 1))
    far.copy_(draw(3, 20, 24, dtype=torch.float16))
    out = torch.empty(2**31 + 2**12, dtype=torch.float16).as_strided((3, 20, 20), (2**30, 20, 1))
    symmetric_product(far, far, far[:, :, :20] * 0, 1.0, 1.0, out=out)
    assert error(out, reference(far, far)) < 5e-4
    symmetric_product(far[:, :20, :20], far[:, :20, :20], out, 0.0, 1.0, out=(copy := torch.empty(3, 20, 20).half()))
    assert torch.equal(copy, out)


def product_at_the_end_of_memory():
    """Of a matrix whose last number is the last of a page; the next page may not be read."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address + page), page, 0) == 0
    for shape in ((1, 17, 3), (1, 3, 17)):
        X = torch.frombuffer(memory, dtype=torch.float32, count=51, offset=page - 4 * 51).view(shape).copy_(draw(*shape))
        from optim.kernels.symmetric import reference, symmetric_product
        assert error(symmetric_product(X, X, X @ X.mT, 1.0, 1.0), 2 * reference(X, X)) < 3e-7


@pytest.mark.parametrize("check", ["product_of_distant_matrices", "product_at_the_end_of_memory"])
def test_kernels_read_the_stack_and_nothing_else(check):
    """Stacks of more than 2³¹ numbers too. In a process of its own: if it reads what is not there, it dies."""
    code = f"from tests.test_kernels import {check}; {check}()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def tiles_that_are_made(side):
    """(i, j) of programs 0, 1, ... as the kernel finds them, by what each stores: its tile holds its own products."""
    from optim.kernels.symmetric import symmetric_kernel
    n = side * 16
    X = torch.zeros(1, n, 16)
    X[0, :, 0] = torch.arange(n) + 1.0
    found = []
    for programs in range(1, side * (side + 1) // 2 + 1):
        C = torch.zeros(1, n, n)
        tiles = side * (side + 1) // 2
        symmetric_kernel[(programs,)](X, X, C, C, 1.0, 0.0, n, 16, tiles, *X.stride(), *X.stride(), n * n, n, n * n, n,
                                      ADD=False, TILE=16, DEPTH=16)
        done = {(i, j) for i in range(side) for j in range(i + 1) if C[0, i * 16, j * 16] != 0}
        found.append(done)
    return found


def test_every_program_makes_one_tile_of_the_lower_triangle_and_none_is_made_twice(interpreted):
    found = interpreted(tiles_that_are_made, 5)
    assert [len(done) for done in found] == list(range(1, 16))
    assert found[-1] == {(i, j) for i in range(5) for j in range(i + 1)}


# ---------------------------------------------------------------- the passes before and after

SWITCHES = [(ema, nesterov, clip) for ema in (True, False) for nesterov in (True, False) for clip in (None, 0.25)]


def errors_of_first_passes(shape, ema, nesterov, clip, magnitude):
    from optim.kernels.passes import momentum_and_norm, reference
    n, rows, cols = shape
    G, M = (draw(2 * n, rows, cols, seed=seed)[::2] * magnitude for seed in (1, 2))
    G = torch.stack([G, G], 1).flatten(0, 1)[::2]        # every second matrix of a stack
    exact_M, exact_X = reference(G, M, 0.9, ema, nesterov, 1.02, clip or 1.0)
    X = momentum_and_norm(G, M, torch.tensor(0.9, dtype=torch.float64), ema, nesterov, 1.02, torch.float32,
                          clip and torch.tensor(clip), torch.ones((), dtype=torch.bool))
    return error(M / magnitude, exact_M / magnitude), error(X, exact_X)


@pytest.mark.parametrize("magnitude", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_the_first_passes_equal_float64_at_any_magnitude(interpreted, switches, magnitude):
    for shape in [(2, 3, 5), (3, 70, 90)]:               # one chunk of 4096 numbers, and two
        assert max(interpreted(errors_of_first_passes, shape, *switches, magnitude)) < 5e-7       # measured 2e-7


def errors_in_several_chunks():
    """Of matrices of which one program handles several chunks, of growing and of falling size."""
    import triton.language as tl

    from optim.kernels import passes
    before = passes.CHUNK, passes.CHUNKS
    passes.CHUNK, passes.CHUNKS = 64, tl.constexpr(2)
    G, M = draw(2, 20, 25, seed=1) * torch.logspace(-3, 3, 500).view(20, 25), torch.zeros(2, 20, 25)
    G[1] = G[1].flip(0)
    exact_M, exact_X = passes.reference(G, M, 0.9, True, True)
    X = passes.momentum_and_norm(G, M, torch.tensor(0.9), True, True, 1.0, torch.float32, None, torch.tensor(True))
    passes.CHUNK, passes.CHUNKS = before
    return max(error(M[i], exact_M[i]) for i in (0, 1)), max(error(X[i], exact_X[i]) for i in (0, 1))


def test_a_program_adds_up_chunks_of_any_size(interpreted):
    assert max(interpreted(errors_in_several_chunks)) < 5e-7


def results_of_unkept_steps():
    """One matrix of three is not kept; one is zero."""
    from optim.kernels.passes import momentum_and_norm, step_and_decay
    G, M, W, O = (draw(3, 70, 90, seed=seed) for seed in range(4))
    G[2], M[2] = 0, 0
    G[1, 5, 5] = torch.nan
    before, keep = (M.clone(), W.clone()), torch.tensor([True, False, True])
    mu, lr, decay = (torch.tensor(value, dtype=torch.float64) for value in (0.9, 0.02, 0.1))
    X = momentum_and_norm(G, M, mu, True, True, 1.0, torch.float16, None, keep)
    step_and_decay(W, O.half(), lr, 1.5, decay, keep)
    assert torch.equal(M[1], before[0][1]) and torch.equal(W[1], before[1][1])
    assert not torch.equal(M[0], before[0][0]) and (X[2] == 0).all() and X.dtype == torch.float16
    return error(W[::2], (before[1] - (0.03 * O.half().float() + 0.1 * before[1]))[::2])


def test_what_is_not_kept_stays_to_the_bit_and_zero_stays_zero(interpreted):
    assert interpreted(results_of_unkept_steps) < 1e-6


def long_matrices_are_cut(numbers):
    from optim.kernels.configurations import CHUNK
    from optim.kernels.passes import CHUNKS, _cut
    numbers, span, chunks = _cut(torch.empty(1, numbers, 1, device="meta"))
    assert chunks <= CHUNKS.value and span % CHUNK == 0 and (chunks - 1) * span < numbers <= chunks * span
    return span


def test_no_matrix_is_cut_into_more_pieces_than_the_second_pass_adds_up(interpreted):
    spans = [interpreted(long_matrices_are_cut, n) for n in (1, 4096, 4097, 768 * 3072, 4096 * 512 + 1, 16384 * 65536)]
    assert spans[:3] == [4096] * 3 and spans[-1] > 4096


# ---------------------------------------------------------------- whole steps

def muon_steps(kernels, shape, switches, dtype, keeps):
    """W and momentum after steps with gradients of changing size, by the rule's kernels or by its `update`."""
    backend.choose(kernels, torch.device("cpu"))
    rule = Muon(weight_decay=0.1, ns_dtype="float32", **switches)
    group = Group(name="hidden", params=("rest",), rule="muon", hyper=rule)
    from optim.constraints import fuses, guarded_update
    W = draw(*shape, dtype=dtype, seed=9)
    state = rule.init(W)
    assert fuses(group, W) == (kernels == "triton")
    for step, keep in enumerate(keeps):
        G = draw(*shape, seed=step) * 10.0 ** -step
        h = {"lr": 0.02 / (step + 1), "weight_decay": 0.1, "momentum": 0.9 + step / 100, "t": step + 1}
        h = {key: torch.tensor(value, dtype=torch.float64) for key, value in h.items()}
        arguments = (W, G, state, h, torch.tensor(0.5), torch.tensor(keep))
        rule.fused_update(*arguments) if kernels == "triton" else guarded_update(group, *arguments)
    return W, state["momentum"]


@pytest.mark.parametrize("shape, switches", [
    ((2, 24, 24), {}), ((2, 40, 12), {"momentum_form": "sgd", "nesterov": False, "ns_coefficients": "cubic5"}),
    ((1, 12, 40), {"ns_coefficients": "polar_express5", "scale": "rms", "decay": "scaled"}),
    ((2, 40, 12), {"ns_form": "gram", "ns_coefficients": "you5"}), ((1, 12, 40), {"ns_form": "gram"})], ids=str)
def test_the_fused_step_is_the_rules_update(interpreted, shape, switches):
    for keeps in ([True] * 3, [True, False, [True, False][:shape[0]]]):
        W, M = interpreted(muon_steps, "triton", shape, switches, torch.float32, keeps)
        plain_W, plain_M = muon_steps("torch", shape, switches, torch.float32, keeps)
        assert error(M, plain_M) < 1e-6 and error(W, plain_W) < 2e-5


def whether_the_gram_form_is_taken(form, shape):
    from optim import orthogonalise
    taken, right = [], orthogonalise.gram_steps
    orthogonalise.gram_steps = lambda *arguments: taken.append(True) or right(*arguments)
    muon_steps("triton", shape, {"ns_form": form}, torch.float32, [True])
    orthogonalise.gram_steps = right
    return taken


def test_the_fused_step_takes_the_gram_form_for_matrices_twice_as_long_as_wide(interpreted):
    forms = [("gram", (1, 8, 16)), ("gram", (1, 16, 8)), ("gram", (1, 8, 15)), ("standard", (1, 8, 16))]
    assert [interpreted(whether_the_gram_form_is_taken, *form) for form in forms] == [[True], [True], [], []]


def what_compiled_code_gets():
    """The operator under torch.compile, whole, and torch's own checks of how it is declared."""
    from optim.kernels.operator import symmetric_product
    backend.choose("triton", torch.device("cpu"))
    X = draw(2, 20, 12)
    X /= torch.linalg.matrix_norm(X, keepdim=True)
    compiled = torch.compile(lambda X: iterate(X, "you5", None, "standard"), backend="aot_eager", fullgraph=True)
    torch.library.opcheck(symmetric_product, (X, X, None, 1.0, 0.0))
    A = X @ X.mT
    torch.library.opcheck(symmetric_product, (A, A, A, 0.5, 0.25))
    return compiled(X), iterate(X, "you5", None, "standard")


def test_compiled_updates_take_the_kernels_as_they_are(interpreted):
    compiled, eager = interpreted(what_compiled_code_gets)
    backend.choose("torch", torch.device("cpu"))
    X = draw(2, 20, 12)
    assert torch.equal(compiled, eager)
    assert error(eager, iterate(X / torch.linalg.matrix_norm(X, keepdim=True), "you5", None, "standard")) < 1e-5


def driven(kernels):
    """Weights after three steps of a driver, one parameter without gradient in the last, and what it announces."""
    params = {f"{name}.{i}": nn.Parameter(draw(*shape, seed=10 * i + shape[1]))
              for name, shape in (("q", (16, 16)), ("mlp_in", (40, 16)), ("k", (16, 24))) for i in range(2)}
    rules = {"q": {}, "mlp_in": {"ns_form": "gram"}, "k": {}}
    groups = tuple(Group(name=role, params=(role,), rule="muon", cautious=role == "k",
                         hyper=Muon(weight_decay=0.1, ns_dtype="float32", **switches)) for role, switches in rules.items())
    optimizer = Optimizer(params, {name: name[:-2] for name in params}, groups, grad_clip=1.0, kernels=kernels)
    for step in range(3):
        for i, (name, p) in enumerate(params.items()):
            p.grad = None if step == 2 and name == "q.0" else draw(*p.shape, seed=100 * step + i)
        optimizer.set_hyperparameters(step, Schedule(), 3)
        optimizer.step(step, torch.zeros(()))
    return {name: p.detach().clone() for name, p in params.items()}, optimizer.orthogonalisation


def test_a_driven_step_with_the_kernels_is_the_step_without(interpreted):
    (by_kernels, announced), (plain, plainly) = interpreted(driven, "triton"), driven("torch")
    assert (announced, plainly) == ("Triton in float32", "plain torch in float32")
    for name in plain:
        assert error(by_kernels[name], plain[name]) < 1e-5, name


def test_every_preset_goes_through_the_kernels(interpreted):
    for preset in COEFFICIENTS:
        by_kernels = interpreted(iterated, preset, "triton")
        assert error(by_kernels, iterated(preset, "torch")) < 2e-5


def iterated(preset, kernels):
    backend.choose(kernels, torch.device("cpu"))
    X = draw(1, 10, 18)
    return iterate(X / (1.02 * torch.linalg.matrix_norm(X, keepdim=True)), preset, None, "standard")
