"""The benchmark compares equal work: both sides must read the same small model and prompts of the length asked for."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from flashgrpo.bench import own_step
from flashgrpo.bench.cpu_step import OURS, PEER, make_inputs, summarize, table
from flashgrpo.bench.peer_trl import even_words


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"), prompt_len=17, num_prompts=5)


def test_both_sides_read_a_model_of_the_size_and_prompts_of_the_length_that_are_reported(inputs):
    """A prompt that grew in tokenization would change the work, a token beyond the embedding crash the peer."""
    prompts = [json.loads(line)["prompt"] for line in Path(inputs["prompts"]).read_text().splitlines()]
    tokenizer, model = (kind.from_pretrained(inputs["model"]) for kind in (AutoTokenizer, AutoModelForCausalLM))
    ids = tokenizer(prompts)["input_ids"]
    assert [len(row) for row in ids] == [17] * 5
    assert len({tuple(row) for row in ids}) == 5
    assert not {token for row in ids for token in row} & set(tokenizer.all_special_ids)
    assert 4.65e6 < sum(parameter.numel() for parameter in model.parameters()) < 4.75e6
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_the_peer_finds_no_packages_among_our_benchmarks():
    """transformers imports `kernels` where it finds one."""
    folder = Path(own_step.__file__).parent
    command = [sys.executable, *PEER[1:-1], "-c", "from importlib.util import find_spec; print(find_spec('kernels'))"]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    assert str(folder / "kernels.py") not in found


def test_reward_tells_completions_apart():
    """Equal rewards would make dead groups, which cost one side nothing."""
    assert even_words(["p", "p", "p"], ["w2 w11 w30 w4", "w1 w3", ""]) == [0.75, 0.0, 0.0]


def test_our_step_is_timed(inputs):
    """It uses the trainer's own step, so it breaks when that changes."""
    sizes = {"num_prompts": 2, "group_size": 2, "max_new_tokens": 3, "steps": 3}
    assert all(second > 0 for second in own_step.time_steps(SimpleNamespace(**inputs, **sizes))["step_s"])


def test_the_summary_is_the_median_of_all_steps_and_the_largest_peak():
    runs = []
    for name, seconds, peak in ((OURS, [1.0, 3.0], 5.0), ("TRL", [6.0], 8.0), (OURS, [2.0], 4.0)):
        runs.append({"name": name, "prompt_len": 64, "step_s": seconds, "peak_mb": peak})
    assert table({"summary": summarize(runs)})[2:] == [
        "| 64 | flashgrpo | 2.00 | 1.00 | 5 | 1.00 |",
        "| 64 | TRL | 6.00 | 3.00 | 8 | 1.60 |",
    ]
