"""The measure of the kernels' resources, on a kernel whose resources are plain."""
import pytest

from tests.aot import CAPABILITIES, resources


def doubling():
    import triton
    import triton.language as tl

    @triton.jit
    def double(x, y, n, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        values = tl.load(x + i, mask=i < n, other=0.0)
        tl.store(y + i, values - tl.sum(values), mask=i < n)
    return double


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_kernel_that_holds_too_much_is_seen_to_spill(capability):
    signature = {"x": "*fp32", "y": "*fp32", "n": "i32"}
    registers, shared, spilled = resources(doubling(), signature, {"BLOCK": 1024}, capability)
    assert 8 <= registers < 64 and shared == 16 and spilled == 0        # 8 values a thread; one float32 of 4 warps
    assert resources(doubling(), signature, {"BLOCK": 65536}, capability)[2] > 1000


def test_a_signature_that_is_not_the_kernels_is_an_error():
    with pytest.raises(ValueError, match="double takes .*'n'.*, not .*'m'"):
        resources(doubling(), {"x": "*fp32", "y": "*fp32", "m": "i32"}, {"BLOCK": 64}, 90)
