"""Compile our Triton kernels for GPUs that need not be here, and print what ptxas says of each.

    python -m tests.kernels.compile_ahead [80 90]

A line for each kernel and compute capability: registers, bytes of spill stores and of spill loads of one thread.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODULES = ("triton_log_rules", "triton_layers", "triton_refresh")
# sizes that the penalty of a ResNet-18 asks for
SIZES: dict[str, Any] = {"R": 16, "T": 4, "P": 8, "V": 64, "U": 4, "BLOCK": 1024, "TINY": 2.0**-126}
SIZES |= {
    "TURNS": 4,
    "LAST": False,
    "OUTPUT": True,
    "BC": 1,
    "BM": 1024,
    "SP": 16,
    "CP": 64,
    "BR": 4,
    "BS": 1024,
    "PARTS": 64,
}
INTEGERS = {"integers", "index", "results", "of", "at", "targets", "places", "image_places"}  # tables
COUNTS = {
    *("width", "count", "num_leaves", "num_values", "slope", "curvature", "steps", "backward", "rows", "columns"),
    *("per_group", "taps", "groups", "size", "channels", "inner", "chunk", "splits"),
}  # fmt: skip


def kernels() -> Iterator[tuple[str, Any]]:
    from triton import JITFunction

    for name in MODULES:
        module = importlib.import_module(f"lightning_lcnn.kernels.{name}")
        yield from ((k, v) for k, v in vars(module).items() if isinstance(v, JITFunction) and k.endswith("_kernel"))


def compiled(kernel: Any, capability: int) -> str:
    """The PTX of a kernel for float32."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    SIZES["WIDE"] = tl.float32
    constants = {p.name: SIZES.get(p.name, True) for p in kernel.params if p.is_constexpr}
    signature = {p.name: "constexpr" if p.name in constants else kind(p.name) for p in kernel.params}
    source = ASTSource(
        fn=kernel, signature=signature, constexprs={(kernel.arg_names.index(k),): v for k, v in constants.items()}
    )
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8 if kernel.__name__ in WIDE else 4}
    ).asm["ptx"]


def kind(name: str) -> str:
    if name in COUNTS:
        return "i32"
    if name == "batches":
        return "*i64"
    return "*i32" if name in INTEGERS else "fp32" if name in NUMBERS else "*fp32"


NUMBERS = {"momentum", "eps"}
WIDE = {
    "solve_kernel",
    "normalize_kernel",
    "normalize_gradient_kernel",
    "unit_kernel",
    "first_kernel",
    "following_kernel",
    "last_kernel",
}  # launched with eight warps


def resources(ptx: str, capability: int) -> tuple[int, int, int]:
    """Registers, bytes of spill stores and of spill loads."""
    import triton

    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        architecture = f"sm_{capability}{'a' if capability >= 90 else ''}"
        said = subprocess.run(
            [ptxas, "-v", f"-arch={architecture}", file.name, "-o", "/dev/null"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    return tuple(
        int(re.search(pattern, said)[1])
        for pattern in (r"Used (\d+) reg", r"(\d+) bytes spill st", r"(\d+) bytes spill lo")
    )  # type: ignore[index, return-value]


def main() -> None:
    for capability in [int(a) for a in sys.argv[1:]] or [80, 90]:
        for name, kernel in kernels():
            registers, stores, loads = resources(compiled(kernel, capability), capability)
            print(f"{name} sm_{capability}: {registers} registers, spills {stores} + {loads} bytes", flush=True)


if __name__ == "__main__":
    main()
