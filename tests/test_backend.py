"""Which code makes the orthogonalisation's products, and that kernels which are wrong where they run are not it."""
import subprocess
import sys

import pytest
import torch

from optim import backend
from optim.muon import Muon
from tests.conftest import ROOT
from tests.interpreted import interpreter
from tests.test_kernels import draw


def test_a_cpu_has_no_triton_unless_it_is_told_to_interpret():
    assert backend.choose("auto", torch.device("cpu")) == "" and backend.chosen == "torch"
    with pytest.raises(ValueError, match="no Triton here: the kernels need a GPU"):
        backend.choose("triton", torch.device("cpu"))
    assert backend.chosen == "torch"


def wrong_kernels_are_found():
    from optim.kernels import passes, symmetric
    assert backend.check(torch.device("cpu")) == ""
    right = {name: getattr(file, name) for file, name in
             ((symmetric, "symmetric_product"), (passes, "momentum_and_norm"), (passes, "step_and_decay"))}

    def broken(*a, **k):
        raise RuntimeError("no such instruction\nat line 3")
    for file, name, wrong in (
            (symmetric, "symmetric_product", lambda *a, **k: right["symmetric_product"](*a, **k) * 1.02),
            (symmetric, "symmetric_product", lambda *a, **k: right["symmetric_product"](*a, **k) * torch.nan),
            (passes, "momentum_and_norm", lambda G, M, mu, *a: right["momentum_and_norm"](G, M, mu * 1.1, *a)),
            (passes, "step_and_decay", lambda W, O, *a: right["step_and_decay"](W, O * 1.1, *a))):
        setattr(file, name, wrong)
        assert backend.why_not_triton(torch.device("cpu")).startswith("the kernels failed their check (error "), name
        setattr(file, name, right[name])
    symmetric.symmetric_product = broken
    expected = "the kernels failed their check (RuntimeError: no such instruction)"
    assert backend.why_not_triton(torch.device("cpu")) == expected


def test_kernels_that_are_wrong_where_they_run_are_not_used():
    with interpreter() as run:
        run(wrong_kernels_are_found)


@pytest.mark.parametrize("dtype, by_triton", [("bfloat16", True), ("float32", False)])
def test_on_a_gpu_the_kernels_are_for_half_precision_and_a_cpu_never_takes_them_uninterpreted(monkeypatch, dtype,
                                                                                              by_triton):
    monkeypatch.setattr(backend, "chosen", "triton")
    assert backend.takes(torch.device("cuda"), getattr(torch, dtype)) == by_triton
    W = torch.empty(2, 24, 24, device="meta")
    monkeypatch.setattr(torch.Tensor, "device", property(lambda _: torch.device("cuda")), raising=False)
    assert Muon(ns_dtype=dtype).fuses(W) == by_triton
    monkeypatch.undo()
    monkeypatch.setattr(backend, "chosen", "triton")
    X = draw(2, 24, 24)
    assert not Muon(ns_dtype=dtype).fuses(X) and backend.symmetric_product(X, X).equal(X @ X.mT)


def test_triton_is_not_imported_before_it_is_chosen():
    code = "import sys, optim.driver, optim.backend; print(sorted(m for m in sys.modules if m.split('.')[0] == 'triton'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
