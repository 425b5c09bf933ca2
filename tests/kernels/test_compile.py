"""Every kernel compiles ahead of time for the GPUs it is meant for, and no register spills to memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import quick_if

# In a process of its own: the interpreter, which the other tests use, is chosen when triton is imported.
PROGRAM = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dsalign_kernels import decode_attention_kernels as d, pair_kernels as p, row_kernels as k
from dsalign_kernels import sampling_kernels as s, token_kernels as t

target = json.loads(sys.argv[1])
aim = GPUTarget("hip", target, 64) if isinstance(target, str) else GPUTarget("cuda", target, 32)
types = {"logits": "*bf16", "out": "*bf16", "tops": "*i1", "desirable": "*i1"}
types |= dict.fromkeys(("queries", "held_keys", "held_values"), "*bf16")
strides = [x for x in d._attend_kernel.arg_names if x.endswith(("_row", "_head", "_token"))]
types |= dict.fromkeys(strides, "i32")
types |= dict.fromkeys(("live", "window", "splits"), "i32")
types |= dict.fromkeys(("targets", "lengths", "segment", "keys", "positions"), "*i64")
types |= dict.fromkeys(("choices", "done"), "*i32")
types |= dict.fromkeys(("stride", "out_stride", "columns", "first", "ignore_index", "rows", "spans"), "i32")
types |= dict.fromkeys(("scale", "softcap", "temperature", "beta", "eps", "gamma", "tau", "alpha"), "fp32")
types |= dict.fromkeys(("weight0", "weight1", "weight2", "nll_scale", "z0", "decay", "cliprange"), "fp32")
types |= dict.fromkeys(("desirable_weight", "undesirable_weight", "tail_weight"), "fp32")
rows = {"HAS_SOFTCAP": True}
table = k.BLOCKS.get(f"sm_{target}" if aim.backend == "cuda" else target, k.BLOCKS["other"])
sums = {"GRADIENT": True, "COLUMNS": p.COLUMNS, "ROWS": p.ROWS}
heads = {"GROUP": 7, "BLOCK_GROUP": 16, "WINDOWED": True, "SPLIT": d.SPLIT, "ALONE": False}
wide = {"OUT": 256, "BLOCK_OUT": 256, "WIDTH": 256, "BLOCK_WIDTH": 256}
narrow = {"OUT": 80, "BLOCK_OUT": 128, "WIDTH": 80, "BLOCK_WIDTH": 128}
joined = {"OUT": 128, "BLOCK_OUT": 128, "WINDOWED": True, "SPLIT": d.SPLIT, "CHUNK": d.CHUNK}
pairs = {"DIVERGENCE": 3, "HAS_REFERENCE": True, "MEAN_REWARDS": False, **sums}
found = {}
for name, kernel, constants, (block, warps) in (
    ("stats", k._stats_kernel, {**rows, "ENTROPY": True, "TOP": True, "WRITE": False}, table["read"]),
    ("stats and gradient", k._stats_kernel, {**rows, "ENTROPY": True, "TOP": True, "WRITE": True}, table["write"]),
    ("gradient", k._grad_kernel, {**rows, "HAS_WEIGHTS": True}, table["gradient"]),
    ("pairs", p._pair_kernel, {**pairs, "LOSS0": 4, "LOSS1": 7, "LOSS2": 12}, (p.BLOCK, p.WARPS)),
    ("odds", p._pair_kernel, {**pairs, "LOSS0": 13, "LOSS1": 0, "LOSS2": 0}, (p.BLOCK, p.WARPS)),
    ("labels", p._label_kernel, sums, (p.BLOCK, p.WARPS)),
    ("gae", t._gae_kernel, {}, (t.BLOCK, t.WARPS)),
    ("policy", t._policy_kernel, sums, (t.BLOCK, t.WARPS)),
    ("value", t._value_kernel, sums, (t.BLOCK, t.WARPS)),
    ("sample", s._sample_kernel, {**rows, "FILTERED": True, "GREEDY": False, "SPAN": s.SPAN}, (s.BLOCK, s.WARPS)),
    ("merge", s._merge_kernel, rows, (32, 1)),
    ("attend, 80 wide", d._attend_kernel, {**rows, **heads, **narrow}, (d.READS[256][0], d.WARPS)),
    ("attend, 256 wide", d._attend_kernel, {**rows, **heads, **wide}, (d.READS[512][0], d.WARPS)),
    ("join", d._join_kernel, joined, (None, 4)),
):
    constants = {**constants, **({} if block is None else {"BLOCK": block})}
    # What `tokens` is: the ids that are drawn, or the number of tokens of a loss.
    types["tokens"] = "*i64" if kernel is s._merge_kernel else "i32"
    signature = {x: "constexpr" if x in constants else types.get(x, "*fp32") for x in kernel.arg_names}
    options, hints = {"num_warps": warps}, {}
    if kernel is d._attend_kernel:  # as at run time: the strides of a cache are multiples of 16, so reads are pipelined
        options["num_stages"] = 3
        even = [i for i, x in enumerate(kernel.arg_names) if x in strides or signature[x].startswith("*")]
        hints = {(i,): [["tt.divisibility", 16]] for i in even}
    built = triton.compile(ASTSource(kernel, signature, constants, hints), target=aim, options=options)
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


@pytest.mark.parametrize("target", [quick_if(target == 90, target) for target in (80, 90, 100, "gfx942")])
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
    assert len(found) == 14
    for name, numbers in found.items():
        assert numbers["spills"] == 0 and numbers["shared"] <= 48 * 1024, (name, numbers)
