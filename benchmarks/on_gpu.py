"""All that waits to be measured on a GPU, in one command of eight minutes at most:

    python benchmarks/on_gpu.py --prepare     # what needs a network or only a CPU: the model, TRL's environments
    python benchmarks/on_gpu.py               # make bench-gpu

Parts, in the order of their value: the kernels' tests on the device, rollouts at the shapes of Qwen2.5-0.5B and
Llama-3.1-8B beside transformers' two ways and the bandwidth's limit, the kernels' benchmarks, PPO and DPO through
DeepSpeed's launcher. Liger and TRL are measured beside where they are installed: Liger in this environment, TRL in its
own ones (`peer.py`), which `--prepare` makes.

Each part is a process with its own time limit, so that what is done counts where another hangs or fails. In --out, a
folder a part has its log and its own files; results.csv and results.jsonl have the rows of all, written as each part
ends. The table at the end says GPU, versions, date, commit and command. Exit status 1 where a part failed, ran out of
time or was not started for lack of it; its rows so far stand.

    python benchmarks/on_gpu.py --device cpu --small    # every part in a tiny form, kernels in Triton's interpreter
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gpu_results
import peer
import torch

sys.path.append(str(peer.ROOT / "kernels"))

import harness  # needs the line above

PACKAGES = ("torch", "triton", "deepspeed", "transformers", "dsalign", "liger-kernel", "trl", "flash-attn")
TOTAL_S = 465.0  # of eight minutes; the command itself takes a few seconds
SMALL_TOTAL_S, SMALL_LIMIT_S = 1800.0, 300.0  # a CPU with two cores
TRITON = "--impl triton"
LEAST_S = 5.0  # a part with less time left is not started
ENDING_S = 5.0
MODEL = "smollm2-135m-instruct"
TRL_FOLDERS = {  # of a part: where TRL is, and which
    "dpo": (peer.ROOT / "output" / "trl", peer.TRL),
    "ppo": (peer.ROOT / "output" / "trl_ppo", peer.TRL_OF_PPO),
}


@dataclass(frozen=True)
class Part:
    """A part: a script of this repository with its words on a GPU, and those of the small form.

    kind: which reader of `gpu_results.py` has its files. limit_s: seconds on a GPU.
    """

    name: str
    kind: str
    limit_s: float
    script: str
    words: str
    small: str
    both: str = ""  # words of either

    @property
    def here(self) -> bool:
        """Whether the script exists in this checkout."""
        return self.script == "pytest" or (peer.ROOT / self.script).exists()


def linear(hidden: int, vocabulary: int) -> tuple[Part, Part]:
    """The head alone and the head with a preference loss on it, at one width."""
    shape, tiny = f"--hidden {hidden} --vocabulary {vocabulary} --dtype bfloat16", "--hidden 16 --vocabulary 96"
    return (
        Part(
            f"linear-{hidden}", "kernel", 45, "kernels/bench_linear_logps.py",
            f"--rows 8192 {shape} --part 4096 --head_memory 128", f"--rows 16 --part 8 {tiny} --repeats 2", TRITON,
        ),
        Part(
            f"preference-{hidden}", "kernel", 50, "kernels/bench_linear_preference.py",
            f"--pairs 8 --tokens 512 {shape}", f"--pairs 4 --tokens 4 {tiny} --repeats 2", TRITON,
        ),
    )  # fmt: skip


def rollouts(name: str, model: str, limit_s: float) -> Part:
    """Sampling at the shape of a model."""
    return Part(
        name, "rollouts", limit_s, "benchmarks/compare_rollouts.py", f"--model random:{model} --dtype bfloat16",
        "--small", "--sets wide --ways local generate generate_batch --keep_going",
    )  # fmt: skip


WIDE, NARROW = linear(2048, 128256), linear(576, 49152)
PARTS = (
    Part(
        "tests", "tests", 100, "pytest",
        "tests/kernels --ignore tests/kernels/test_compile.py --ignore tests/kernels/test_plot.py",
        "tests/kernels/test_policy.py -k gae_by_hand", "-vv",
    ),
    rollouts("rollouts-0.5b", "qwen2.5-0.5b", 100),
    rollouts("rollouts-8b", "llama-3.1-8b", 120),
    Part(
        "sampling", "kernel", 25, "kernels/bench_sampling.py", "--rows 256 --vocabulary 152064 --dtype bfloat16",
        "--rows 3 --vocabulary 70 --repeats 2", TRITON,
    ),
    Part("decode", "kernel", 40, "kernels/bench_decode_attention.py", "", "--repeats 2"),
    WIDE[0],
    Part(
        "selective", "kernel", 25, "kernels/bench_selective_logps.py",
        "--rows 8192 --vocabulary 151936 --dtype bfloat16", "--rows 3 --vocabulary 70 --repeats 2", TRITON,
    ),
    WIDE[1],
    Part(
        "ppo", "ppo", 90, "benchmarks/compare_ppo.py", "--settings C --iterations 4 --dtype bfloat16",
        "--settings small --iterations 2", "--launcher deepspeed",
    ),
    Part(
        "dpo", "training", 80, "benchmarks/compare_trl.py", "--steps 12 --batch_size 16 --dtype bfloat16",
        "--steps 2 --batch_size 2", "--sets long --launcher deepspeed",
    ),
    *NARROW,
    Part("policy-losses", "kernel", 20, "kernels/bench_policy.py", "", "--completions 3 --tokens 8 --repeats 2"),
    Part("preference-losses", "kernel", 20, "kernels/bench_preference.py", "", "--pairs 3 --tokens 8 --repeats 2"),
)  # fmt: skip


def command(part: Part, args: argparse.Namespace, folder: Path) -> list[str]:
    """What runs a part, its files in `folder`."""
    words = shlex.split(f"{part.both} {part.small if args.small else part.words}")
    if part.kind == "tests":
        return [sys.executable, "-m", "pytest", *words]
    words = [sys.executable, str(peer.ROOT / part.script), *words, "--device", args.device]
    if part.kind == "kernel":
        return [*words, "--csv", str(folder / "rows.csv")]
    words += ["--out", str(folder)]
    if part.kind == "rollouts":
        return words
    sides = ["dsalign", *(["trl"] if not args.small and peer.has_peer(*TRL_FOLDERS[part.name]) else [])]
    words += ["--sides", *sides]
    return [*words, "--model", str(small_model(args)) if args.small else MODEL]


def small_model(args: argparse.Namespace) -> Path:
    """The folder of the model that small training runs take."""
    found: Path = args.out / "small_model"
    return found


def environment(part: Part, args: argparse.Namespace) -> dict[str, str]:
    """A part's variables: this checkout's modules first, no hub, output at once; small kernels in the interpreter."""
    path = [str(peer.ROOT), str(peer.ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    found = {
        "TORCH_EXTENSIONS_DIR": str(peer.ROOT / ".torch_extensions"),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if args.device == "cpu":
        found |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        found |= {"TRITON_INTERPRET": "1"} if part.kind in ("kernel", "tests") else {}
    return found


def run_part(part: Part, args: argparse.Namespace, limit_s: float) -> tuple[str, float]:
    """Run a part for so many seconds at most; (done, or what came in between, seconds). Its output is in log.txt."""
    folder = args.out / part.name
    folder.mkdir(parents=True)
    start = time.monotonic()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command(part, args, folder), stdout=log, stderr=subprocess.STDOUT, cwd=peer.ROOT,
            env=environment(part, args), start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit_s)
            state = "done" if code == 0 else f"failed, exit status {code}"
        except subprocess.TimeoutExpired:
            state = f"out of time, {limit_s:.0f} s"
        finally:
            _end(process)
    return state, time.monotonic() - start


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a part with all that it started, which is in a session of its own, and wait until it is gone, for ENDING_S at
    most: what is dying still holds memory of the GPU."""
    until = time.monotonic() + ENDING_S
    with contextlib.suppress(ProcessLookupError):  # nothing of it is left
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        while time.monotonic() < until:
            os.killpg(process.pid, 0)
            time.sleep(0.02)


class Record:
    """The files of all rows, written as they come, and what the table at the end says."""

    def __init__(self, out: Path, about: dict[str, str]) -> None:
        self.out, self.about = out, about
        self.rows: list[gpu_results.Row] = []
        self.states: list[gpu_results.Row] = []
        self.line(about)

    def line(self, record: dict[str, object] | dict[str, str]) -> None:
        """Append a line to results.jsonl."""
        with (self.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def ended(self, part: Part, state: str, seconds: float) -> None:
        """Keep a part's rows and how it ended; a part that is done and left no row has failed."""
        found = gpu_results.rows_of(part.name, part.kind, self.out / part.name)
        if state == "done" and not found:
            state = "failed, no results"
        self.rows += found
        self.states.append({"part": part.name, "state": state, "seconds": round(seconds, 1), "rows": len(found)})
        for one in (*found, self.states[-1]):
            self.line(one)
        if found:
            machine = {name: self.about[name] for name in ("date", "device", "commit")}
            harness.write_csv(self.out / "results.csv", [{**one, **machine} for one in found])
        print(f"{part.name}: {state}, {seconds:.0f} s, {len(found)} rows", flush=True)

    @property
    def whole(self) -> bool:
        """Whether every part is done."""
        return all(one["state"] == "done" for one in self.states)

    def table(self) -> str:
        """Where and what, every row, and how every part ended."""
        head = "\n".join(f"{name}: {value}" for name, value in self.about.items())
        states = gpu_results.table(self.states, ("part", "state", "seconds", "rows"))
        return f"\n{head}\n\n{gpu_results.table(self.rows)}\n\n{states}"


def about(args: argparse.Namespace) -> dict[str, str]:
    """Device, versions, date, commit and command."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    beside = [f"trl {one[1]} beside {name}" for name, one in TRL_FOLDERS.items() if peer.has_peer(*one)]
    cuda = [f"CUDA {torch.version.cuda}"] if args.device == "cuda" else []
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": harness.device_name(torch.device(args.device)),
        "versions": ", ".join([f"Python {platform.python_version()}", *found, *cuda, *beside]),
        "commit": peer.commit(),
        "command": shlex.join(["python", *sys.argv]),
    }


def prepare() -> None:
    """Make what the parts need and a network or a CPU alone gives: SmolLM2 as a folder, TRL's environments.

    TRL that cannot be installed is a line: dsalign is then measured alone.
    """
    peer.ask(sys.executable, peer.WHAT_RUNS, str(peer.ROOT), MODEL, "1", "0")
    for name, (folder, version) in TRL_FOLDERS.items():
        try:
            peer.peer_python(folder, version)
        except (subprocess.CalledProcessError, ValueError) as error:
            print(f"{name}: no TRL {version} beside: {error}")


def run(args: argparse.Namespace, parts: Sequence[Part]) -> int:
    """Run the parts, print the table; 0 where all are done."""
    end = time.monotonic() + args.total_s
    args.out.mkdir(parents=True, exist_ok=True)
    if any(args.out.iterdir()):
        raise ValueError(f"{args.out}: expected a new or empty folder, got one with files; name another one in --out")
    record = Record(args.out, about(args))
    if args.small and any(part.kind in ("training", "ppo") for part in parts):
        script = str(peer.ROOT / "benchmarks" / "random_models.py")
        peer.measured([sys.executable, script, str(small_model(args))], args.out / "small_model.log", os.environ)
    for part in parts:
        own = args.limit_s or (SMALL_LIMIT_S if args.small else part.limit_s)
        left = end - time.monotonic()
        state, seconds = run_part(part, args, min(own, left)) if left > LEAST_S else ("not started, no time left", 0.0)
        record.ended(part, state, seconds)
    print(record.table())
    (args.out / "table.txt").write_text(record.table() + "\n")
    return 0 if record.whole else 1


def main() -> int:
    """Reads the options; returns the exit status."""
    now = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    here = {part.name: part for part in PARTS if part.here}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(here), default=list(here), help="default: all")
    parser.add_argument("--out", type=Path, default=peer.ROOT / "output" / "on_gpu" / now, help="a new folder")
    parser.add_argument("--total_s", type=float, help=f"seconds of all parts; default {TOTAL_S:.0f}")
    parser.add_argument("--limit_s", type=float, help="seconds of each part, in place of its own")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes: a trial")
    parser.add_argument("--prepare", action="store_true", help="fetch and make what is needed, and stop")
    args = parser.parse_args()
    if args.device == "cpu" and not args.small:
        parser.error("--device cpu: expected --small with it, as the sizes are those of a GPU")
    if args.device == "cuda" and not (args.prepare or torch.cuda.is_available()):
        parser.error("--device cuda: expected a GPU that torch sees, got none; a trial: --device cpu --small")
    if args.prepare:
        prepare()
        return 0
    args.out = args.out.resolve()
    args.total_s = args.total_s or (SMALL_TOTAL_S if args.small else TOTAL_S)
    return run(args, [here[name] for name in here if name in args.parts])


if __name__ == "__main__":
    sys.exit(main())
