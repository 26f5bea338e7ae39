"""Every kernel in every configuration that ships, compiled for every architecture: no GPU is needed to read what the
machine code takes."""
import re

import pytest
import torch

from optim.kernels.configurations import CHUNK, CHUNK_WARPS, SYMMETRIC, architecture, symmetric_launch
from tests.aot import CAPABILITIES, SHARED_BYTES, code, resources

STRIDES = ("P_matrix", "P_row", "P_col", "Q_matrix", "Q_row", "Q_col", "D_matrix", "D_row", "C_matrix", "C_row")
PRODUCTS = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma", 120: r"mma\.sync"}


def product(launch, dtype, tall, add, wide_index=False):
    """The symmetric product as it is launched on contiguous stacks whose sides are multiples of 16."""
    from optim.kernels.symmetric import symmetric_kernel
    ones = ("P_row", "Q_row") if tall else ("P_col", "Q_col")
    strides = {name: "i64" if wide_index and name.endswith("matrix") else "i32" for name in STRIDES if name not in ones}
    signature = {**dict.fromkeys("PQDC", dtype), "alpha": "fp32", "beta": "fp32", "rows": "i32", "inner": "i32",
                 "tiles": "i32", **strides}
    constexprs = {**dict.fromkeys(ones, 1), "ADD": add, "TILE": launch.tile, "DEPTH": launch.depth}
    return symmetric_kernel, signature, constexprs, (*"PQDC", "rows", "inner", *strides)


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_symmetric_products_fit_and_spill_nothing(capability, size):
    launch = SYMMETRIC[f"sm_{capability}"][size == "large"]
    for dtype in ("*bf16", "*fp16"):
        for tall, add, wide_index in ((False, False, False), (True, False, True), (False, True, False)):
            kernel, signature, constexprs, aligned = product(launch, dtype, tall, add, wide_index)
            registers, shared, spilled = resources(kernel, signature, constexprs, capability, launch.warps,
                                                   launch.stages, aligned)
            assert spilled == 0 and shared <= SHARED_BYTES[capability], (dtype, tall, add, registers, shared, spilled)
            assert registers * 32 * launch.warps <= 65536                   # of one multiprocessor, so that one block fits


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_symmetric_products_use_the_matrix_units_and_move_16_bytes_at_a_time(capability, tall):
    launch = SYMMETRIC[f"sm_{capability}"][1]
    kernel, signature, constexprs, aligned = product(launch, "*bf16", tall, True)
    ptx = code(kernel, signature, constexprs, capability, launch.warps, launch.stages, aligned)["ptx"]
    assert re.search(PRODUCTS[capability], ptx)
    copies = re.findall(r"cp\.async\.\w+\.shared\.global\S* \[.*?\], \[.*?\], (\w+)", ptx)
    assert copies and set(copies) == {"0x10"}                              # operands, straight to shared memory
    assert re.findall(r"(?:ld|st)\.global\S*", ptx) and not re.findall(r"(?:ld|st)\.global\.b(?:16|8)\b", ptx)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_passes_fit_and_spill_nothing(capability):
    from optim.kernels import passes
    common = {"numbers": "i32", "span": "i32", "chunks": "i32", "G_matrix": "i32", "M_matrix": "i32", "mu": "*fp64",
              "clip": "*fp32", "G": "*fp32", "M": "*fp32", "largest": "*fp32", "squares": "*fp32"}
    switches = {"EMA": True, "NESTEROV": True, "CLIP": True, "CHUNK": CHUNK}
    last = {"W": "*fp32", "O": "*bf16", "lr": "*fp64", "decay": "*fp64", "keep": "*i1", "factor": "fp32",
            "numbers": "i32", "span": "i32", "chunks": "i32", "W_matrix": "i32", "keep_each": "i32"}
    kernels = [(passes.first_kernel, {**common, "keep": "*i1", "keep_each": "i32"}, switches),
               (passes.second_kernel, {**common, "X": "*bf16", "safety": "fp32"},
                {**switches, "CHUNKS": passes.CHUNKS.value}), (passes.last_kernel, last, {"CHUNK": CHUNK})]
    for kernel, signature, constexprs in kernels:
        aligned = tuple(name for name, kind in signature.items() if kind.startswith("*f") or name == "O")
        _, shared, spilled = resources(kernel, signature, constexprs, capability, CHUNK_WARPS, 3, aligned)
        assert spilled == 0 and shared <= SHARED_BYTES[capability], (kernel.__name__, shared, spilled)


def test_every_gpu_from_ampere_on_has_a_configuration_that_fits_it():
    found = {(8, 0): "sm_80", (8, 6): "sm_120", (8, 9): "sm_120", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100",
             (12, 0): "sm_120", (12, 1): "sm_120"}
    assert {capability: architecture(capability) for capability in found} == found
    with pytest.raises(ValueError, match="7.5 has no bfloat16"):
        architecture((7, 5))
    assert symmetric_launch(128, (9, 0)) == SYMMETRIC["sm_90"][0] != symmetric_launch(768, (9, 0))


class Driver:
    """As much of Triton's driver as a launch needs up to the launch itself, for a GPU that is not there."""

    def __init__(self, capability):
        from triton.backends.compiler import GPUTarget
        self.target, self.launched = GPUTarget("cuda", capability, 32), []
        self.utils, self.launcher_cls = self, self.launcher

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch                                         # Triton keeps kernels and limits by number

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": SHARED_BYTES[self.target.arch]}

    def load_binary(self, name, *_):
        return None, None, 0, 0, 1024                                   # module, function, registers, spills, threads

    def launcher(self, source, metadata):
        return lambda *_: self.launched.append(metadata.target.arch)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_launchers_give_their_kernels_what_compiles_whatever_the_sizes(monkeypatch, capability):
    """Through Triton's own launch, which makes constants of ones and types of tensors; it refuses too much memory."""
    from triton.runtime import driver

    from optim.kernels import passes
    from optim.kernels.symmetric import symmetric_product
    monkeypatch.setattr(driver, "_active", gpu := Driver(capability))
    scalar, launched = torch.zeros((), dtype=torch.float64), 0
    for launch in SYMMETRIC[f"sm_{capability}"]:
        for shape in ((1, 1, 1), (3, 17, 5)):
            X = torch.empty(shape, dtype=torch.float16)
            A = symmetric_product(X, X, launch=launch)
            symmetric_product(A, A, A, 0.5, -2.0, launch=launch)
            symmetric_product(X.mT, X.mT, launch=launch)
            launched += 3
    for shape in ((1, 1, 1), (3, 17, 5)):
        for dtype, clip, keep in ((torch.float32, scalar, torch.tensor(True)),
                                  (torch.bfloat16, None, torch.ones(shape[0], dtype=torch.bool))):
            G, M, W = torch.empty(shape), torch.empty(shape), torch.empty(shape, dtype=dtype)
            O = passes.momentum_and_norm(G, M, scalar, True, True, 1.02, torch.bfloat16, clip, keep)
            passes.step_and_decay(W, O, scalar, 1.0, scalar, keep)
            launched += 3
    assert gpu.launched == [capability] * launched
