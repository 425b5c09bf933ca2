"""Every kernel compiles ahead of time for the GPUs it is meant for, and no register spills to memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own: the interpreter, which the other tests use, is chosen when triton is imported.
PROGRAM = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dsalign_kernels import row_kernels as k

target, options = json.loads(sys.argv[1]), {"num_warps": k.WARPS}
aim = GPUTarget("hip", target, 64) if isinstance(target, str) else GPUTarget("cuda", target, 32)
pointers = {"logits": "*bf16", "out": "*bf16", "targets": "*i64", "tops": "*i1"}
floats = {"scale", "softcap", "temperature"}
found = {}
for name, kernel, flags in (
    ("stats", k._stats_kernel, {"ENTROPY": True, "TOP": True, "WRITE": False}),
    ("stats and gradient", k._stats_kernel, {"ENTROPY": False, "TOP": False, "WRITE": True}),
    ("gradient", k._grad_kernel, {"HAS_WEIGHTS": True}),
):
    constants = {"HAS_SOFTCAP": True, "BLOCK": k.BLOCK, **flags}
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in floats:
            signature[argument] = "fp32"
        elif argument in ("stride", "out_stride", "columns", "first", "ignore_index"):
            signature[argument] = "i32"
        else:
            signature[argument] = pointers.get(argument, "*fp32")
    built = triton.compile(ASTSource(kernel, signature, constants), target=aim, options=options)
    spills = None
    if aim.backend == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "kernel.ptx"
            source.write_text(built.asm["ptx"])
            arch = re.search(r"\\.target (sm_\\w+)", built.asm["ptx"]).group(1)
            tools = Path(triton.__file__).parent / "backends/nvidia/bin"
            ptxas = max(tools.glob("ptxas*"), key=lambda x: len(x.name))  # ptxas-blackwell, the newer, knows all
            command = [ptxas, "-v", f"-arch={arch}", source, "-o", Path(folder) / "x"]
            said = subprocess.run(command, capture_output=True, text=True)
            assert not said.returncode, said.stderr
            spills = sum(int(n) for n in re.findall(r"(\\d+) bytes spill stores", said.stderr))
    else:
        spills = int(re.search(r"\\.vgpr_spill_count:\\s*(\\d+)", built.asm["amdgcn"]).group(1))
    found[name] = {"spills": spills, "shared": built.metadata.shared}
print(json.dumps(found))
"""


@pytest.mark.parametrize("target", [80, 90, 100, "gfx942"])
def test_compiles_without_spills(target: int | str, tmp_path: Path) -> None:
    """For A100, H100 and H200, B200 and MI300; shared memory stays within 48 KiB."""
    more = {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | more
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(target)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert len(found) == 3
    for name, numbers in found.items():
        assert numbers["spills"] == 0 and numbers["shared"] <= 48 * 1024, (name, numbers)
