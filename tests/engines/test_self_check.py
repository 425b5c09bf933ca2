"""The check at the start of a run: when it lets packed rows pass, when it turns them off, when it stops the run."""

from __future__ import annotations

from pathlib import Path

import run_cases
import whole_runs
from support import VOCABULARY, RankPool, tiny_tokenizer
from transformers import MambaConfig, MambaForCausalLM


def test_a_model_that_packs_packs(tiny: Path, two_ranks: RankPool) -> None:
    """At ZeRO 3, policy, critic and reference; nothing is said."""
    assert two_ranks.run(run_cases.self_checked, tiny, "none") == ({"policy": True, "value": True}, [])


def test_packed_rows_that_leak_are_turned_off(tiny: Path, two_ranks: RankPool) -> None:
    """A mask that lets a group see the one before it: both roles go on one completion a row, with one line each."""
    shares, lines = two_ranks.run(run_cases.self_checked, tiny, "leak")
    assert shares == {"policy": False, "value": False}
    assert len(lines) == 2
    assert lines[0].startswith(
        "policy: one completion a row, which is slower: packed rows of LlamaForCausalLM differ by "
    )


def test_a_layer_that_asks_for_more_turns_them_off(tiny: Path, one_rank: RankPool) -> None:
    shares, lines = one_rank.run(run_cases.self_checked, tiny, "sinks")
    assert shares == {"policy": False, "value": False}
    assert lines[0] == "policy: one completion a row, which is slower: layers of LlamaForCausalLM ask for s_aux"


def test_a_transform_that_is_not_known_stops_the_run(tiny: Path, two_ranks: RankPool) -> None:
    """Logits that the model scales behind dsalign's back."""
    message = two_ranks.run(run_cases.self_checked, tiny, "scale")
    assert message.startswith("LlamaForCausalLM: the log-probabilities of rows.jsonl:")
    assert "dsalign does not know what this architecture does between its head and its logits: take" in message


def test_a_recurrent_model_trains_one_completion_a_row(two_ranks: RankPool, tmp_path: Path) -> None:
    """Mamba knows no mask; DPO on two ranks runs to the end, and says how."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 2, "initializer_range": 0.2}
    model = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, **sizes, pad_token_id=0, eos_token_id=2))
    model.save_pretrained(tmp_path / "mamba")
    tiny_tokenizer().save_pretrained(tmp_path / "mamba")
    words = ["--algo", "dpo", "--model", str(tmp_path / "mamba"), "--dataset", "demo:pairs#8", "--tuner", "full"]
    found = two_ranks.run(whole_runs.train, [*words, "--output_dir", str(tmp_path / "out"), "--max_steps", "1"])
    assert found["loss"] > 0 and (tmp_path / "out" / "final").is_dir()
