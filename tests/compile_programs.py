"""Compiles every Triton program for a GPU that need not be here, and looks at its arithmetic.

Run by a test in a process of its own, since Triton decides on import whether it interprets. The
kernels run on tensors without data, and in place of each launch the program is compiled.
"""

import re
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from saefeat.kernels import triton as kernels
from saefeat.kernels import triton_products, triton_selection
from saefeat.kernels.codes import SparsityPattern

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
compiled: set[str] = set()


def compile_instead(
    program: JITFunction, *args: Any, grid: Any, warmup: bool, num_warps: int = 4, **kwargs: Any
) -> None:
    """What a launch does, up to the launch."""
    given = dict(zip((p.name for p in program.params), args, strict=False)) | kwargs
    signature, constants = {}, {}
    for parameter in program.params:
        value = given[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        elif parameter.is_constexpr or value is None or value == 1:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            signature[parameter.name] = "i32"
    binary = triton.compile(
        ASTSource(program, signature, constants),
        target=GPUTarget("cuda", 80, 32),
        options={"num_warps": num_warps},
    )
    for line in re.findall(r".*arith\.muli.*", binary.asm["ttir"]):
        # The number of a block of columns times its width stays within one row.
        if not re.search(r": (tensor<.*)?i64\b", line) and "%columns" not in line:
            raise AssertionError(f"{program.fn.__name__} multiplies in 32 bits: {line}")
    compiled.add(program.fn.__name__)


def main() -> None:
    JITFunction.run = compile_instead
    with torch.device("meta"):
        for dtype in (torch.float32, torch.bfloat16):
            scores, weight = torch.empty(8, 5000, dtype=dtype), torch.empty(5000, 200, dtype=dtype)
            pattern = SparsityPattern.from_top_k(kernels.top_k(scores, 64), 5000)
            kernels.batch_top_k(scores, 512)
            values = kernels.sampled_product(pattern, weight[:8], weight)
            kernels.product(pattern, values, weight)
            kernels.transposed_product(pattern, values, weight[:8])
            kernels.latent_sums(pattern, values)
    kernels.above(torch.zeros(8, 5000), torch.zeros(5000))  # it reads the count
    helpers = {"add_span", "load_keys", "count_from", "write_kept", "write_from", "passes"}
    everything = {
        name
        for module in (triton_products, triton_selection)
        for name, it in vars(module).items()
        if isinstance(it, JITFunction)
    }
    assert compiled == everything - helpers, everything - helpers - compiled
    print("compiled", *sorted(compiled))


if __name__ == "__main__":
    main()
