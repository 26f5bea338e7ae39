"""Triton kernels compiled ahead of time, without a GPU: what each would take of an architecture's registers and memory."""
import re
import subprocess
import tempfile
from pathlib import Path

CAPABILITIES = (80, 90, 100, 120)                       # A100, H100 and H200, B200, RTX 50
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}    # most that one block may have


def code(kernel, signature: dict, constexprs: dict, capability: int, num_warps: int = 4, num_stages: int = 3,
         aligned: tuple[str, ...] = ()):
    """What a `@triton.jit` kernel compiles to, by kind: "ptx", "cubin" and others; `.metadata` beside it.

    `signature` gives the types of the arguments that are not constexprs, in Triton's words ("*bf16", "i64", "fp32").
    `aligned` names those whose values, or addresses, are multiples of 16, which the launcher finds out by itself.
    Not in a process with TRITON_INTERPRET=1: there a kernel has no machine code.
    """
    return compiled(kernel, signature, constexprs, capability, num_warps, num_stages, aligned).asm


def resources(kernel, signature: dict, constexprs: dict, capability: int, num_warps: int = 4, num_stages: int = 3,
              aligned: tuple[str, ...] = ()) -> tuple[int, int, int]:
    """(registers a thread, shared bytes a block, spilled bytes a thread) of a kernel; arguments as for `code`."""
    import triton
    found = compiled(kernel, signature, constexprs, capability, num_warps, num_stages, aligned)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    # Registers spill to the stack; a kernel written in Triton has nothing else there.
    return used["REG"], found.metadata.shared, used["STACK"] + used["LOCAL"]


def compiled(kernel, signature: dict, constexprs: dict, capability: int, num_warps: int, num_stages: int,
             aligned: tuple[str, ...]):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    if set(names) != signature.keys() | constexprs.keys():
        raise ValueError(f"{kernel.__name__} takes {names}, not {[*signature, *constexprs]}")
    types = {name: signature.get(name, "constexpr") for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return triton.compile(ASTSource(kernel, types, constexprs, attrs), target=GPUTarget("cuda", capability, 32),
                          options={"num_warps": num_warps, "num_stages": num_stages})
