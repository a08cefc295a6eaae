"""Pairs from sampled answers: sampling that goes on where it stopped, scores, selection, the manifest."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.examples import ChatExample, Clip, Message, PreferenceExample
from qwen2audio_train.data.manifests.manifest import read_manifest
from qwen2audio_train.evaluation.judging.client import Reply, client_of
from qwen2audio_train.pairs import make
from qwen2audio_train.pairs.candidates import CandidateFile, Candidates, CandidatesError
from qwen2audio_train.pairs.make import SamplingOptions, answer, pairs_of_answers
from qwen2audio_train.pairs.questions import Question, questions_of
from qwen2audio_train.pairs.score import ScoreError, judge_provenance, judge_scorer, scorer
from qwen2audio_train.pairs.select import Chosen, Selection, select
from tests.evaluation.tiny import SAMPLES, noise, tiny_model, tiny_tokenizer


def question(reference: str | None = "the cat sat", task: str | None = "asr", name: str = "q") -> Question:
    prompt = (Message("user", (Clip("/a.wav", 1.0), "What is said?")),)
    return Question(name, prompt, reference, task, "en", "s")


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    examples = []
    for number in range(5):
        path = tmp_path / f"{number}.wav"
        soundfile.write(path, noise(np.random.default_rng(number), 0.4), 16_000)
        messages = (Message("user", (Clip(str(path), 0.4), "What is said?")), Message("assistant", ("the cat sat",)))
        examples.append(ChatExample(f"q{number}", messages, "s", meta={"task": "asr", "language": "en"}))
    return questions_of(examples)


def options(folder: Path, **changes: Any) -> SamplingOptions:
    values: dict[str, Any] = {
        "checkpoint": "tiny",
        "output": str(folder / "pairs.jsonl"),
        "num_answers": 3,
        "max_new_tokens": 6,
        "min_margin": 0.0,
        "max_length_ratio": 1e9,
    }
    return SamplingOptions(**(values | changes))


# Sampling -------------------------------------------------------------------------------------------------------------


def test_interrupted_sampling_goes_on_and_gives_the_same_answers(
    questions: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny_model(spread=2.0), tiny_tokenizer()
    whole, failed = answer(model, tokenizer, SAMPLES, questions, options(tmp_path))
    assert failed == {}
    assert len({found.answers for found in whole.done.values()}) > 1
    text = whole.path.read_text()
    lines = text.splitlines(keepends=True)
    whole.path.write_text("".join(lines[:3]) + lines[3][:10])  # cut off in the middle of a line
    asked: list[str] = []
    original = make.sample_candidates

    def counting(model: Any, tokenizer: Any, questions: Any, options: Any, decoding: Any, file: Any, **kw: Any) -> Any:
        asked.extend(question.id for question in questions if question.id not in file.done)
        return original(model, tokenizer, questions, options, decoding, file, **kw)

    monkeypatch.setattr(make, "sample_candidates", counting)
    again, _ = answer(model, tokenizer, SAMPLES, questions, options(tmp_path, tokens_per_batch=200))
    assert asked == ["q2", "q3", "q4"]
    assert again.done == whole.done
    assert again.path.read_text() == text


def test_answers_of_other_settings_are_not_mixed(questions: list[Question], tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    answer(model, tokenizer, SAMPLES, questions[:1], options(tmp_path))
    with pytest.raises(CandidatesError, match=r"other settings \(seed\)"):
        answer(model, tokenizer, SAMPLES, questions[:1], options(tmp_path, seed=1))
    with pytest.raises(CandidatesError, match=r"other settings \(questions\)"):
        answer(model, tokenizer, SAMPLES, questions[:2], options(tmp_path))


def test_a_clip_that_cannot_be_read_costs_its_question(questions: list[Question], tmp_path: Path) -> None:
    Path(questions[1].clips[0].path).write_bytes(b"no audio")
    file, failed = answer(tiny_model(), tiny_tokenizer(), SAMPLES, questions[:3], options(tmp_path))
    assert file.done.keys() == {"q0", "q2"}
    assert failed.keys() == {"q1"}


# Scores ---------------------------------------------------------------------------------------------------------------


def test_scores_against_the_right_answer() -> None:
    answers = ["the cat sat", "The cat, sat!", "the dog sat", "x y z u v w"]
    assert scorer("error_rate")([(question(), answers)]) == [[1.0, 1.0, pytest.approx(2 / 3), 0.0]]
    assert scorer("exact")([(question(), answers)]) == [[1.0, 1.0, 0.0, 0.0]]
    (bleu,) = scorer("bleu")([(question("the cat sat on the mat", "s2tt"), ["the cat sat on the mat", "a dog"])])
    assert bleu[0] == pytest.approx(1.0)
    assert bleu[1] is not None
    assert bleu[1] < 0.3
    assert scorer("auto")([(question(), answers), (question("sad", "ser"), ["sad"])])[1] == [1.0]
    for unscorable in (question(task=None), question(task="aac")):
        with pytest.raises(ScoreError, match="needs a task with one right answer"):
            scorer("auto")([(unscorable, ["a"])])
    with pytest.raises(ScoreError, match="no right answer to compare with"):
        scorer("exact")([(question(None), ["a"])])


def test_a_function_of_the_user(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def shortness(question, answer):\n    return -len(answer) - len(question.text)\n")
    assert scorer(f"{file}:shortness")([(question(), ["ab", "abcd"])]) == [[-15.0, -17.0]]
    for wrong, reason in ((f"{file}:other", "no function other"), ("none.py:f", "no file none"), ("best", "expected")):
        with pytest.raises(ScoreError, match=reason):
            scorer(wrong)


class ScriptedJudge:
    """A client that likes long answers, and refuses to talk about dogs."""

    endpoint = SimpleNamespace(model="scripted-1", base_url="http://localhost/v1")
    spent = 0.0

    def complete(self, messages: Any) -> Reply:
        prompt = messages[0]["content"]
        if "dog" in prompt:
            return Reply("I cannot say.", True, 1, 1)
        first = prompt.split("[Answer 1]\n")[1].split("\n[")[0]
        second = prompt.split("[Answer 2]\n")[1].split("\n[")[0]
        return Reply(" ".join(str(min(10, 1 + len(text) // 2)) for text in (first, second)), False, 1, 1)


def test_a_judge_scores_and_what_it_refuses_is_counted() -> None:
    outcomes: Counter[str] = Counter()
    client: Any = ScriptedJudge()
    score = judge_scorer(client, outcomes)
    found = score([(question(), ["a cat", "a dog", "a cat that sat there long"]), (question(name="r"), ["ab"])])
    assert found == [[pytest.approx(2 / 9), None, 1.0], [pytest.approx(1 / 9)]]
    assert outcomes == {"scored": 3, "refused": 1}
    assert judge_provenance(client)["model"] == "scripted-1"


def test_settings_of_the_judge_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"judge\.modle: unknown key; did you mean judge\.model"):
        client_of({"base_url": "x", "modle": "y"}, "replies")
    with pytest.raises(ConfigError, match=r"judge\.model: no value"):
        client_of({"base_url": "x"}, "replies")
    client = client_of({"base_url": "http://localhost", "model": "m"}, "replies")
    assert client.endpoint.cache_dir == "replies"


# Selection ------------------------------------------------------------------------------------------------------------

ANSWERS = ["the cat sat", "The cat sat.", "the dog sat", "a dog ran", "no", ""]
SCORES = [1.0, 1.0, 0.7, 0.3, 0.0, 0.0]


def chosen_and_rejected(**rules: Any) -> tuple[str, tuple[str, ...]]:
    found = select(question(), ANSWERS, SCORES, Selection(**rules), {}, Counter())
    assert found is not None
    return found.chosen, found.rejected


def test_best_against_worst_of_like_length() -> None:
    assert chosen_and_rejected() == ("the cat sat", ("a dog ran",))
    assert chosen_and_rejected(max_length_ratio=6.0) == ("the cat sat", ("no",))
    assert chosen_and_rejected(max_rejected=2) == ("the cat sat", ("a dog ran", "the dog sat"))
    assert chosen_and_rejected(max_rejected=5, max_length_ratio=99.0)[1] == ("no", "a dog ran", "the dog sat")
    assert chosen_and_rejected(min_margin=0.5, max_rejected=2)[1] == ("a dog ran",)


def test_every_question_left_out_has_its_reason() -> None:
    left: Counter[str] = Counter()
    cases: list[tuple[list[str], list[float | None], Selection, str | None]] = [
        (["a", "b"], [1.0, 0.95], Selection(), "r"),
        (["a", "bbbbbbb"], [1.0, 0.0], Selection(), "r"),
        (["a", "b"], [0.2, 0.0], Selection(min_chosen=0.5), "r"),
        (["a", "b"], [None, None], Selection(), "r"),
        (["a", "b"], [1.0, 0.0], Selection(chosen=Chosen.reference), None),
        (["r", "R."], [1.0, 0.0], Selection(chosen=Chosen.reference), "r"),
    ]
    for answers, scores, rules, reference in cases:
        assert select(question(reference), answers, scores, rules, {}, left) is None
    assert left == {"no_margin": 2, "length": 1, "chosen_too_bad": 1, "nothing_scored": 1, "no_reference": 1}


def test_the_reference_as_the_chosen_answer() -> None:
    assert chosen_and_rejected(chosen=Chosen.reference) == ("the cat sat", ("a dog ran",))


def test_manifest_says_where_a_pair_comes_from(questions: list[Question], tmp_path: Path) -> None:
    file = CandidateFile(tmp_path / "a.answers", {"checkpoint": "tiny", "seed": 0})
    file.add([Candidates(q.id, ("the cat sat", "a dog ran")) for q in questions[:-1]])
    made = pairs_of_answers(questions, file, {"q4": "no file"}, scorer("auto"), options(tmp_path), {"model": "j"})
    assert made.num_examples == 4
    assert "could not be asked 1" in made.summary()
    examples = read_manifest(tmp_path / "pairs.jsonl")
    for example, asked in zip(examples, questions, strict=False):
        assert isinstance(example, PreferenceExample)
        assert (example.chosen, example.rejected) == ("the cat sat", ("a dog ran",))
        assert example.prompt == asked.prompt
        origin = example.meta["pair"]
        assert origin["question"] == asked.id
        assert (origin["checkpoint"], origin["score"], origin["judge"]) == ("tiny", "auto", {"model": "j"})
        assert (origin["chosen_score"], origin["rejected_scores"]) == (1.0, [0.0])
    assert not (tmp_path / "pairs.jsonl.partial").exists()


def test_sampled_pairs_from_end_to_end(questions: list[Question], tmp_path: Path) -> None:
    chosen = options(tmp_path, score="error_rate", chosen=Chosen.reference, min_margin=0.5)
    file, failed = answer(tiny_model(spread=2.0), tiny_tokenizer(), SAMPLES, questions, chosen)
    made = pairs_of_answers(questions, file, failed, scorer(chosen.score), chosen)
    assert made.num_examples + sum(made.left_out.values()) == len(questions)
    assert made.num_examples > 0


def test_another_prompt_under_the_same_id_is_another_question() -> None:
    other = replace(question(), prompt=(Message("user", (Clip("/a.wav", 1.0), "What is sung?")),))
    assert make.questions_digest([question()]) != make.questions_digest([other])


def test_a_foreign_file_is_not_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "x").write_text(json.dumps({"a": 1}) + "\n")
    with pytest.raises(CandidatesError, match="not a file of sampled answers"):
        CandidateFile(tmp_path / "x", {})
