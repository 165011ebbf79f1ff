"""The benchmarks of generators and syncs: what they sample, what they write, what is missing."""

import json

import pytest

from flashgrpo.bench import generate, sync

SMALL = ["--prompts=2", "--group-size=3", "--prompt-tokens=5", "--max-new-tokens=4", "--rounds=4"]


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))

    def read(name: str) -> dict:
        (file,) = tmp_path.glob(f"{name}_*.json")
        return json.loads(file.read_text())

    return read


def test_generators_take_turns_on_completions_of_full_length(results, monkeypatch):
    sampled = []
    timed = generate.time_turns

    def watched(sides, *arguments, **options):
        sampled.extend(sides["native"]())
        return timed(sides, *arguments, **options)

    monkeypatch.setattr(generate, "time_turns", watched)
    assert generate.main([*SMALL, "--generators", "native", "transformers"]) == 0
    assert [[len(rollout.completion_ids) for rollout in group] for group in sampled] == [[4] * 3] * 2
    found = results("generate")
    assert [*found["tokens_per_s"]] == ["transformers", "native"]
    assert all(rate > 0 for rate in found["tokens_per_s"].values())
    assert (found["prompts"], found["max_new_tokens"]) == (2, 4)
    assert len(generate.table(found)) == 4


def test_a_sync_is_timed(results):
    assert sync.main(["--model=small", "--generators", "native", "--rounds=4"]) == 0
    found = results("sync")
    assert found["gb"] == pytest.approx((4_558_848 + 512 * 256) * 4 / 1e9)  # the tied head is sent, too
    assert found["seconds"]["native"] > 0
    assert len(sync.table(found)) == 3


def test_without_vllm_it_says_what_runs(results, monkeypatch):
    monkeypatch.setattr(generate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"vLLM is not installed.* --generators native"):
        generate.main(["--generators", "native", "vllm"])


def test_scores_of_runs(results, tmp_path):
    (tmp_path / "run").mkdir()
    rows = [{"step": 0, "eval/pass@1": 0.25}, {"step": 1, "mismatch/max": 2e-5}, {"step": 2, "eval/pass@1": 0.75}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert generate.main(["--runs", f"native={tmp_path / 'run'}"]) == 0
    found = json.loads((tmp_path / "demo_runs.json").read_text())
    assert found == {"native": {"first": 0.25, "last": 0.75, "mismatch": 2e-5, "staleness": 0.0}}
