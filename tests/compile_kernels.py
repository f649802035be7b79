"""Compile every Triton kernel for a GPU that need not be there; run as a program, see ``test_triton.py``.

Triton's interpreter takes Python that its compiler does not. What is compiled is what a launch would ask for: pointers
and strides, with grouped queries, masks of both kinds, causality.
"""

import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from squeezeheads.divergence import triton as divergence
from squeezeheads.squeezing import triton_grams
from squeezeheads.triton_maps import _own_normalisers

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 99 * 1024  # bytes a block may take on every GPU since Ampere
INPUTS = ("query", "key", "value", "t_query", "t_key")
NUMBERS = ("scale", "inverse_temperature", "t_scale", "t_inverse_temperature")
RESULTS = (
    "mix", "out", "learned", "taught", "mass_out", "divergence_out", "gradient_out", "masses", "factors", "normalisers",
)  # fmt: skip
KERNELS = (
    _own_normalisers, divergence._student_normalisers, divergence._rows, divergence._keys,
    triton_grams._read_differences,
)  # fmt: skip


def shared_memory(kernel, dtype, width, mask_kind, own_masks, causal):
    """Bytes that a block of the compiled kernel asks for."""
    block = 32 if dtype == "fp32" else 64
    constants = {
        "CAUSAL": causal, "T_CAUSAL": causal, "KIND": mask_kind, "T_KIND": mask_kind, "T_OWN": own_masks, "D": width,
        "T_D": width, "V": width, "R": block, "C": block,
    }  # fmt: skip
    masks = {0: dtype, 1: "u8", 2: "fp32"}[mask_kind]
    types = {
        **dict.fromkeys(INPUTS, f"*{dtype}"), **dict.fromkeys(NUMBERS, "fp32"), **dict.fromkeys(RESULTS, "*fp32"),
        "mask": f"*{masks}", "t_mask": f"*{masks}", "which": "*i32",
    }  # fmt: skip
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items() if name in signature}
    return compile(ASTSource(kernel, signature, places), target=HOPPER, options={"num_stages": 1}).metadata.shared


if __name__ == "__main__":
    for kernel in KERNELS:
        for options in (("bf16", 64, 1, True, True), ("fp32", 128, 2, False, False)):
            needed = shared_memory(kernel, *options)
            print(kernel.__name__, *options, needed)
            if needed > SHARED_MEMORY:
                sys.exit(f"{kernel.__name__} {options} needs {needed} bytes of shared memory")
