"""What the bench of the kernels counts and compares; its times are not tested."""
import pytest
import torch

from optim import backend
from scripts.bench.kernels import LAYERS, measure, stacks, works

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(2, 32, 32), (2, 64, 16), (2, 16, 64)], ids=str)
def test_every_work_makes_what_its_float64_form_says(shape):
    backend.choose("torch", CPU)
    for work in works(shape):
        row, = measure(work, shape, torch.float32, CPU, ["torch"], rounds=2)
        assert row.error < 5e-5 and len(row.seconds) == 2, work.what


def test_operations_are_counted_once_for_each_half_of_a_symmetric_product():
    found = {work.what: work.flops for work in works((1, 20, 10))}
    assert found["A = XXᵀ"] == 20 * 10 * 10 and found["B = bA + cA²"] == 10**3
    assert found["kj5, standard"] == 5 * (20 * 10**2 + 10**3 + 2 * 20 * 10**2)
    assert found["kj5, gram"] == (4 * 5 + 6 * 2 - 6) * 10**3
    assert not any("gram" in work.what for work in works((1, 10, 10)))


def test_the_matrices_are_those_of_the_models_layers():
    assert stacks("small") == [(48, 768, 768), (12, 3072, 768), (12, 768, 3072)]
    assert {model: sum(n * r * c for n, r, c in stacks(model)) for model in LAYERS} == {
        "demo": 786_432, "small": 84_934_656, "medium": 301_989_888, "1.5B": 1_474_560_000}


@pytest.mark.parametrize("shape", [(2, 64, 16), (2, 16, 64)], ids=str)
def test_torch_has_no_half_to_mirror_where_a_product_is_symmetric_by_itself(monkeypatch, shape):
    """It would be slower, and the kernels' gain too large."""
    monkeypatch.setattr(torch.Tensor, "tril", lambda *_: pytest.fail("mirrored"))
    backend.choose("torch", CPU)
    for work in works(shape):
        if "gram" not in work.what:
            work.make(torch.randn(shape))
