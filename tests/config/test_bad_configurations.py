"""A hundred configurations that cannot be run: each is answered at once, with its place, what was expected and what to
do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsalign import cli
from dsalign.config import foreign

LONG = "x" * 5000  # more than a file system takes
SFT, DPO, PPO, KTO = (f"--algo {name} --model m --dataset rows" for name in ("sft", "dpo", "ppo", "kto"))
WORDS = [  # the words of a command, and how a line of its answer begins
    ("", "algo: expected one of"),
    ("--algo sftt", "--algo: expected one of"),
    ("--algo", "--algo: expected one of"),
    ("train dpo", "command: expected one of"),
    ("rlfh --algo dpo", "command: expected one of bench, chat, "),
    ("sft --algo dpo", "--algo: expected sft after the verb sft"),
    (f"{SFT} --learning_rat 1", "--learning_rat: expected a known option, got 'learning_rat'; did you mean learn"),
    (f"{SFT} --learning_rate fast", "--learning_rate: expected a number, got 'fast'"),
    (f"{SFT} --learning_rate -1", "--learning_rate: expected greater than 0"),
    (f"{SFT} --learning_rate inf", "--learning_rate: expected a finite number"),
    (f"{SFT} --learning_rate nan", "--learning_rate: expected a finite number"),
    (f"{SFT} --learning_rate", "--learning_rate: expected a value, got none"),
    (f"{SFT} --learning_rate 1 2", "--learning_rate: expected one value, got '1 2'"),
    (f"{SFT} --batch_size 0", "--batch_size: expected greater than or equal to 1"),
    (f"{SFT} --batch_size 1.5", "--batch_size: expected a whole number"),
    (f"{SFT} --batch_size two", "--batch_size: expected a whole number"),
    (f"{SFT} --warmup_ratio 1", "--warmup_ratio: expected less than 1"),
    (f"{SFT} --warmup_ratio 2%", "--warmup_ratio: expected a number"),
    (f"{SFT} --max_steps 0", "--max_steps: expected greater than or equal to 1"),
    (f"{SFT} --num_train_epochs 0.5", "--num_train_epochs: expected a whole number"),
    (f"{SFT} --max_length 1", "--max_length: expected greater than or equal to 2"),
    (f"{SFT} --seed -1", "--seed: expected greater than or equal to 0"),
    (f"{SFT} --tuner loar", "--tuner: expected 'lora' or 'full', got 'loar'; did you mean lora?"),
    (f"{SFT} --optimizer lion", "--optimizer: expected 'adamw' or 'sgd', got 'lion'"),
    (f"{SFT} --dtype int8", "--dtype: expected"),
    (f"{SFT} --attn_impl xformers", "--attn_impl: expected"),
    (f"{SFT} --lr_scheduler_type step", "--lr_scheduler_type: expected"),
    (f"{SFT} --truncation_strategy cut", "--truncation_strategy: expected"),
    (f"{SFT} --gradient_checkpointing maybe", "--gradient_checkpointing: expected true or false"),
    (f"{SFT} --report_to mlflow", "--report_to: expected"),
    (f"{SFT} --lora_rank 0", "--lora_rank: expected greater than or equal to 1"),
    (f"{SFT} --lora_dropout 1", "--lora_dropout: expected less than 1"),
    (f"{SFT} --tuner full --lora_rank 4", "--lora_rank: expected tuner lora, got full"),
    (f"{SFT} --columns a", "--columns: expected theirs=ours, got 'a'"),
    (f"{SFT} --columns =a", "--columns: expected theirs=ours, got"),
    (f"{SFT} --columns a=b=c", "--columns: expected theirs=ours, got 'a=b=c'"),
    (f"{SFT} --columns a=b a=c", "--columns: expected each column once, got 'a' again"),
    (f"{SFT} --columns a=c b=c", "--columns: expected one column for 'c', got a, b"),
    (f"{SFT} --beta 1", "--beta: expected an option of sft, got one of"),
    (f"{SFT} --seed 1 --seed 2", "--seed: expected seed once"),
    (f"{SFT} --lr 1 --learning_rate 2", "--learning_rate: expected learning_rate once, got --lr and --learning_rate"),
    (f"{SFT} --ref_model x", "--ref_model: expected an algorithm with a frozen reference"),
    (f"{SFT} --eval_steps 5", "--eval_steps: expected rows to evaluate on"),
    (f"{SFT} --val_dataset v --split_dataset_ratio 0.1", "--split_dataset_ratio: expected 0 beside val_dataset"),
    (f"{SFT} --split_dataset_ratio 1", "--split_dataset_ratio: expected less than 1"),
    (f"{SFT} --dataset_weights 1 2", "--dataset_weights: expected one for each of 1 data sets"),
    (f"{SFT} --dataset_weights 0", "--dataset_weights: expected greater than 0"),
    ("--algo sft --model m --dataset no.jsonl", "--dataset: expected a file or folder that exists, got 'no.jsonl'"),
    ("--algo sft --model m --dataset demo:nothing", "--dataset: expected one of demo:"),
    ("--algo sft --model ./no --dataset rows", "--model: expected a folder that exists, got './no'"),
    (
        "--algo sft --model https://h.co/a/b --dataset rows",
        "--model: expected a folder or a name on the hub, got 'https:",
    ),
    (
        "--algo sft --model m --dataset https://h.co/datasets/a/b",
        "--dataset: expected a file or a name on the hub, got 'h",
    ),
    ("--algo sft --model a/b/c --dataset rows", "--model: expected a folder that exists, got 'a/b/c'"),
    ("--algo sft --model empty --dataset rows", "--model: expected a model's folder, with config.json"),
    (f"{SFT} --model_path n", "--model_path: expected model once"),
    (f"{SFT} --template lama3", "--template: expected chatml, "),
    (f"{SFT} --template no.jinja", "--template: expected chatml, "),
    (
        f"{SFT} --template own.j2",
        "--template: expected chatml, gemma, llama3, mistral, plain, qwen, zephyr or a .jinja f",
    ),
    (
        f"{SFT} --tuner qlora",
        "--tuner: expected a value of dsalign, got 'qlora' of other trainers; write --tuner lora --l",
    ),
    (f"{SFT} --output_dir $HOME/x", "--output_dir: expected a path, got the variable $HOME, which nothing fills in"),
    (f"{SFT} --output_dir file", "--output_dir: expected a folder, got"),
    (f"{SFT} --output_dir file/in", "--output_dir: expected a folder, got"),
    (f"{SFT} --resume", "--resume: expected a checkpoint-N in output/sft, got none"),
    (f"{SFT} --resume checkpoint-9", "--resume: expected latest, auto or the folder of a checkpoint"),
    (f"{SFT} --resume=", "--resume: expected latest, auto or the folder of a checkpoint, got ''"),
    (f"{SFT} --template=", "--template: expected some text, got ''"),
    ("--algo sft --model= --dataset rows", "--model: expected some text, got ''"),
    (f"{DPO} --ref_model=", "--ref_model: expected some text, got ''"),
    ("--algo sft --model m --dataset no.tsv", "--dataset: expected a file or folder that exists, got 'no.tsv'"),
    ("--algo sft --model m --dataset no.xlsx", "--dataset: expected a file or folder that exists, got 'no.xlsx'"),
    ("--algo sft --model m --dataset file#0", "--dataset: expected #n with n rows, 1 or more, got 'file#0'"),
    ("--algo sft --model m --dataset file#-1", "--dataset: expected #n with a whole number, got 'file#-1'"),
    ("--algo sft --model m --dataset file#all", "--dataset: expected #n with a whole number, got 'file#all'"),
    (f"{SFT} -x", "--dataset: expected a data set, got '-x'; write options as --name value"),
    ("--algo sft --model m --dataset empty", "dataset: data folder 'empty': expected files that end in"),
    ("--algo sft --model m --dataset file", "dataset: data file 'file': expected a name that ends in"),
    ("--algo dpo --model m --dataset d.jsonl", "dataset: d.jsonl:1: expected the columns of a format for pairs"),
    ("--algo sft --model m --dataset d.jsonl --columns prompt=q", "dataset: d.jsonl:1: expected the columns of a form"),
    ("--algo sft --model m --dataset page.json", "dataset: page.json: expected rows, got an HTML page"),
    (f"{SFT} --val_dataset page.json --eval_steps 1", "val_dataset: page.json: expected rows, got an HTML page"),
    (f"--algo sft --model m --dataset {LONG}.jsonl", "--dataset: expected a name or a path, got 'xxxxxxxxxx"),
    (f"--algo sft --model {LONG} --dataset rows", "--model: expected a name or a path, got 'xxxxxxxxxx"),
    ("--algo sft --model ~nobody9/m --dataset rows", "--model: expected a name or a path, got '~nobody9/m'"),
    (f"{SFT} --output_dir {LONG}", "--output_dir: expected a name or a path, got 'xxxxxxxxxx"),
    (f"{SFT} --deepspeed {LONG}", "--deepspeed: expected a name or a path, got 'xxxxxxxxxx"),
    (f"{SFT} --template {LONG}.jinja", "--template: expected a name or a path, got 'xxxxxxxxxx"),
    (f"{SFT} --resume {LONG}", "--resume: expected a name or a path, got 'xxxxxxxxxx"),
    (f"{SFT} --system \udcff", "--system: expected text in UTF-8 without NUL, got"),
    (f"{DPO} --loss_weights 0 --rpo_alpha 0", "--loss_weights: expected one that is not 0"),
    (f"{SFT} --resume empty", "--resume: expected latest, auto or the folder of a checkpoint, got 'empty', which"),
    (f"{SFT} --max_wall 55min", "--max_wall: expected a time such as 55m, 3h or 3300s, more than 0, got '55min'"),
    (f"{SFT} --max_wall 0", "--max_wall: expected a time such as 55m, 3h or 3300s, more than 0, got '0'"),
    (f"{SFT} --max_wall -5m", "--max_wall: expected a time such as 55m"),
    (f"{SFT} --max_wall", "--max_wall: expected a value, got none"),
    (f"{SFT} --deepspeed zero4", "--deepspeed: expected zero0, "),
    (f"{SFT} --deepspeed no.json", "--deepspeed: expected zero0, "),
    (f"{SFT} --config no.yaml", "--config: expected a YAML file that can be read"),
    (f"{SFT} --config", "--config: expected a YAML file, got none"),
    (f"{SFT} --print_config x.yaml", "--print_config: expected true, false or no value"),
    (f"{SFT} --optim.beta 1", "--optim.beta: expected an option of optim, got one of"),
    (f"{DPO} --loss_type sigmoit", "--loss_type: "),
    (f"{DPO} --beta 0", "--beta: "),
    (f"{DPO} --label_smoothing 0.6", "--label_smoothing: "),
    (f"{DPO} --lora_dropout 0.1", "--lora_dropout: expected 0, as dpo"),
    (f"{DPO} --reward_model r", "--reward_model: expected an algorithm with a frozen reward"),
    (f"{DPO} --assistant_turns all", "--assistant_turns: expected last"),
    (f"{KTO} --gradient_accumulation_steps 1", "--gradient_accumulation_steps: expected a global batch of at least 2"),
    (f"{PPO} --reward_funcs no.py:f", "--reward_funcs: expected a file that exists, got 'no.py'"),
    (f"{PPO} --reward_funcs r.py", "--reward_funcs: expected path/to/file.py:function, got 'r.py'"),
    (f"{PPO} --reward_funcs r.py:scor", "--reward_funcs: r.py: expected a function 'scor', got score, later; did you"),
    (f"{PPO} --reward_funcs r.py:later", "--reward_funcs: r.py:2: expected a function, got later, which is async"),
    (f"{PPO} --reward_funcs s.py:f", "--reward_funcs: s.py:1: expected Python, got an error"),
    (f"{PPO} --reward_funcs demo:frendly", "--reward_funcs: expected one of demo:friendly"),
    (f"{PPO} --reward_funcs r.py:score --reward_weights 1 2", "--reward_weights: expected one for each of 1 rewards"),
    (f"{PPO} --temperature 0", "--temperature: "),
    (f"{PPO} --top_p 0", "--top_p: "),
    (f"{PPO} --rollout vlm", "--rollout: "),
    (f"{PPO} --ref_cache on", "--ref_cache: expected auto or off"),
]
FILES = [  # a YAML file or a DeepSpeed file, and how a line of the answer begins behind its place
    ("a.yaml", "algo: sft\nlearning_rat: 1\n", ":2: learning_rat: expected a known option"),
    ("a.yaml", "algo: sft\n\tseed: 1\n", ":2: expected YAML, got a syntax error"),
    ("a.yaml", "- algo\n", ":1: expected lines of `name: value`"),
    ("a.yaml", "algo: sft\nseed: 1\nseed: 2\n", ":3: seed: expected seed once, got seed twice"),
    ("a.yaml", "algo: sft\ndata: {learning_rate: 1}\n", ":2: data.learning_rate: expected an option of data, got one"),
    (
        "a.yaml",
        "algo: sft\ntraining: {seed: 1}\n",
        ":2: training: expected a known option, got 'training'; write its op",
    ),
    ("a.yaml", "algo: sft\noptim: {deep: {er: 1}}\n", ":2: optim.deep: expected a known option"),
    ("a.yaml", "algo: sft\ncolumns: {a: b, a: c}\n", ":2: columns: expected each key once"),
    ("a.yaml", "algo: sft\nlora: {rank: [[1]]}\n", ":2: lora: expected a value, a list"),
    ("a.yaml", "algo: sft\na: " + "[" * 3000, ":2: expected mappings and lists at most 20 deep"),
    ("a.yaml", "algo: sft\na: " + "{b: " * 3000, ":2: expected mappings and lists at most 20 deep"),
    ("a.yaml", 'algo: sft\noutput_dir: "a\\0b"\n', ":2: output_dir: expected text in UTF-8 without NUL"),
    ("a.yaml", "algo: sft\ncolumns: {a: c, b: c}\n", ":2: columns: expected one column for 'c', got a, b"),
    ("a.yaml", 'algo: sft\ntemplate: ""\n', ":2: template: expected some text, got ''"),
    ("a.yaml", "\x00", ": expected YAML, got a syntax error"),
    ("d.json", {"zero_optimizaton": {"stage": 2}}, ": zero_optimizaton: expected a DeepSpeed key"),
    ("d.json", {"zero_optimization": {"stage": 9}}, ": zero_optimization.stage: expected 0, 1, 2, 3, got 9"),
    ("d.json", {"zero_optimization": {"overlap_com": True}}, ": zero_optimization.overlap_com: expected a DeepSpeed"),
    ("d.json", {"zero_optimization": None}, ": zero_optimization: expected a section"),
    ("d.json", {"train_batch_size": 8}, ": train_batch_size: expected it from --batch_size"),
    ("d.json", {"bf16": {"enabled": True}}, ": bf16: expected it from --dtype"),
    (
        "d.json",
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}},
        ": zero_optimization.off",
    ),
    (
        "d.json",
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu", "ratio": 2}}},
        ": zero_optimization.offload_optimizer.ratio: expected a number in [0, 1], got 2",
    ),
    ("d.json", {"comet": {"enabled": True}}, ": comet: expected comet_ml to be installed, got none; run pip"),
    (
        "d.json",
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/dev/null/x"}}},
        ": zero_optimization.offload_param.nvme_path: expected a folder that can be written, got /dev/null/x",
    ),
    ("d.json", {"checkpoint": {"tag_validation": "x"}}, ": checkpoint.tag_validation: expected 'Warn', 'Ignore', 'F"),
    ("d.json", [], " must hold a JSON object"),
    ("d.json", "{'stage': 1}", ":1: expected JSON, got "),
    ("d.json", '{"aio": {}, "aio": {}}', ": expected each key once, got aio twice"),
]
ENVIRONMENTS = [
    ({"NNODES": "2"}, "NNODES: expected 1 without a launcher"),
    ({"NPROC_PER_NODE": "x"}, "NPROC_PER_NODE: expected a whole number"),
    ({"MASTER_PORT": "99999"}, "MASTER_PORT: expected a port"),
    ({"MASTER_PORT": "http"}, "MASTER_PORT: expected a whole number"),
    ({"WORLD_SIZE": "2"}, "environment: expected RANK beside WORLD_SIZE=2, got nothing"),
    ({"LOCAL_RANK": "1"}, "environment: expected RANK beside LOCAL_RANK=1, got nothing"),
    ({"DSALIGN_CACHE": "/dev/null/x"}, "DSALIGN_CACHE: expected a folder that can be written, got /dev/null/x"),
    ({"RANK": "0"}, "LOCAL_RANK: expected a whole number"),
    ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "environment: expected LOCAL_RANK <= RANK < WORLD_SIZE"),
    ({"OMPI_COMM_WORLD_RANK": "0"}, "environment: expected OMPI_COMM_WORLD_SIZE beside"),
]
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR", "NPROC_PER_NODE", "NNODES")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a file, an empty folder and two reward files; no launcher, no GPU."""
    monkeypatch.chdir(tmp_path)
    kept = {k: v for k, v in os.environ.items() if k not in NAMES and not k.startswith(("SLURM_", "OMPI_", "PMI_"))}
    monkeypatch.setattr(os, "environ", kept | {"CUDA_VISIBLE_DEVICES": ""})
    (tmp_path / "file").touch()
    (tmp_path / "own.j2").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "r.py").write_text("def score(completions): ...\nasync def later(completions): ...\n")
    (tmp_path / "s.py").write_text("def f(:\n")
    (tmp_path / "d.jsonl").write_text('{"prompt": "q", "completion": "c"}\n')
    (tmp_path / "page.json").write_text("<html></html>")


def answer(argv: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of an answer that ends with 2 and costs less than a second of this process, whatever else runs here."""
    began = time.process_time()
    assert cli.main(argv) == 2
    assert time.process_time() - began < 1.0
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err and err.startswith("dsalign: error: ")
    return [line.removeprefix("dsalign: error: ").strip() for line in err.splitlines()]


def test_there_are_a_hundred() -> None:
    assert len(WORDS) + len(FILES) + len(ENVIRONMENTS) >= 100


ALONE = """
import contextlib, io, json, os, sys, time
from dsalign import cli
words, files, environments = json.load(sys.stdin)
given = [(one.split(), {}) for one, _ in words]
for number, (name, content, _) in enumerate(files):
    place = f"{number}{os.path.splitext(name)[1]}"
    with open(place, "w") as file:
        file.write(content if isinstance(content, str) else json.dumps(content))
    model = "--config {} --model m" if name.endswith("yaml") else "--algo sft --model m --dataset rows --deepspeed {}"
    given.append((model.format(place).split(), {}))
given += [("--algo sft --model m --dataset rows".split(), env) for env, _ in environments]
codes, longest, before = [], 0.0, dict(os.environ)
for argv, env in given:
    os.environ.update(env)
    began = time.process_time()
    with contextlib.redirect_stderr(io.StringIO()):
        codes.append(cli.main(argv))
    longest = max(longest, time.process_time() - began)
    os.environ.clear()
    os.environ.update(before)
heavy = [name for name in ("torch", "torch._C", "transformers", "deepspeed", "datasets") if name in sys.modules]
print(json.dumps([codes, longest, heavy]))
"""


def test_none_of_them_imports_torch() -> None:
    """All in one process of their own, in which nothing was imported before: each ends with 2, in less than a second,
    and no large library is there when all are answered."""
    root = str(Path(cli.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        input=json.dumps([WORDS, FILES, ENVIRONMENTS]), capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    codes, longest, heavy = json.loads(done.stdout)
    assert len(codes) >= 100 and set(codes) == {2} and longest < 1.0 and heavy == []


@pytest.mark.parametrize(("words", "said"), WORDS)
def test_a_command(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert any(line.startswith(said) for line in answer(words.split(), capsys))


@pytest.mark.parametrize(("name", "content", "said"), FILES)
def test_a_file(name: str, content: object, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    words = ["--config", name, "--model", "m"] if name.endswith("yaml") else [*SFT.split(), "--deepspeed", name]
    lines = answer(words, capsys)
    assert any(line.removeprefix("--deepspeed: ").startswith(name + said) for line in lines), lines


@pytest.mark.parametrize(("env", "said"), ENVIRONMENTS)
def test_an_environment(env: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    os.environ.update(env)
    assert any(said in line for line in answer(SFT.split(), capsys))


def test_every_foreign_name_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    """All at once, a line each."""
    words = [f"--{name}=true" for name in foreign.SENTENCES]
    first, *lines = answer([*SFT.split(), *words], capsys)
    assert first == f"{len(foreign.SENTENCES)} problem(s)" and len(lines) == len(foreign.SENTENCES)
