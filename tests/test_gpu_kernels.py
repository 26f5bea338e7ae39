"""The orthogonalisation's kernels on a GPU, where they calculate in bfloat16; skipped without one."""
import pytest
import torch

from optim import backend
from optim.constraints import guarded_update
from optim.groups import Group
from optim.muon import Muon
from optim.orthogonalise import COEFFICIENTS, orthogonalise

pytestmark = pytest.mark.gpu
SHAPES = [(1, 64, 64), (3, 127, 65), (48, 768, 768), (12, 3072, 768), (12, 768, 3072), (2, 1600, 1600), (2, 6400, 1600)]


def draw(*shape, dtype=torch.bfloat16):
    X = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).cuda()
    return (X / torch.linalg.matrix_norm(X, keepdim=True)).to(dtype)


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_no_further_from_float64_than_cublas_and_symmetric(shape, dtype):
    from optim.kernels.symmetric import symmetric_product
    X = draw(*shape, dtype=dtype)[:2]
    P = X.mT if shape[1] > shape[2] else X
    A = symmetric_product(P, P)
    B = symmetric_product(A, A, A, 2.0315, -4.775)
    exact_A = P.double() @ P.double().mT
    exact_B = -4.775 * A.double() + 2.0315 * A.double() @ A.double()
    assert (A == A.mT).all() and (B == B.mT).all()
    assert error(A, exact_A) <= 1.02 * error(P @ P.mT, exact_A)
    assert error(B, exact_B) <= 1.02 * error(torch.baddbmm(A, A, A, beta=-4.775, alpha=2.0315), exact_B)


@pytest.mark.parametrize("form, dtype", [("standard", torch.bfloat16), ("gram", torch.float16)])
@pytest.mark.parametrize("preset", COEFFICIENTS)
def test_orthogonalisation_is_no_further_from_float64_than_torchs(preset, form, dtype):
    X = draw(4, 3072, 768, dtype=torch.float32)
    exact = orthogonalise(X.double(), preset, dtype=torch.float64)
    errors = {}
    for kernels in ("triton", "torch"):
        backend.choose(kernels, X.device)
        errors[kernels] = error(orthogonalise(X, preset, dtype=dtype, form=form), exact)
    assert errors["triton"] <= 1.1 * errors["torch"]


@pytest.mark.parametrize("shape", [(12, 3072, 768), (3, 100, 100)], ids=str)
def test_the_fused_step_is_the_rules_update_and_keeps_what_is_not_to_change(shape):
    rule = Muon(weight_decay=0.1)
    group = Group(name="hidden", params=("rest",), rule="muon", hyper=rule)
    kept = torch.tensor([i != 1 for i in range(shape[0])], device="cuda")
    h = {key: torch.tensor(value, dtype=torch.float64, device="cuda") for key, value in
         {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "t": 1.0}.items()}
    after = {}
    for kernels in ("triton", "torch"):
        backend.choose(kernels, torch.device("cuda", 0))
        W, G = draw(*shape, dtype=torch.float32), draw(*shape, dtype=torch.float32).flip(0)
        first, state = W.clone(), rule.init(W)
        arguments = (W, G, state, h, torch.tensor(0.5, device="cuda"), kept)
        rule.fused_update(*arguments) if kernels == "triton" else guarded_update(group, *arguments)
        assert torch.equal(W[1], first[1]) and (state["momentum"][1] == 0).all()
        after[kernels] = W - first, state["momentum"]
    assert error(after["triton"][1], after["torch"][1].double()) < 1e-6
    assert error(after["triton"][0], after["torch"][0].double()) < 2e-2                  # two roundings to bfloat16


def test_auto_takes_triton_here():
    assert backend.choose("auto", torch.device("cuda", 0)) == "" and backend.chosen == "triton"
