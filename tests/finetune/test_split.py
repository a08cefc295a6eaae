"""Nothing that is held out is trained on: no file, no speaker, no copy; and every label stays on both sides."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qwen2audio_train.data.examples import Clip, TaskExample, clips_of
from qwen2audio_train.finetune.plan import steps_of
from qwen2audio_train.finetune.split import closed_set, given_split, split

ROWS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5), st.sampled_from("ab")), min_size=2, max_size=60)


def example(number: int, file: int, speaker: int | None, label: str, **meta: str) -> TaskExample:
    meta |= {} if speaker is None else {"speaker": f"s{speaker}"}
    return TaskExample(str(number), Clip(f"{file}.wav", 1.0), "sec", None, label, "t", meta=meta)


@given(rows=ROWS, seed=st.integers(0, 9), has_speakers=st.booleans())
def test_no_file_copy_or_speaker_is_on_both_sides(
    rows: list[tuple[int, int, str]], seed: int, has_speakers: bool
) -> None:
    examples = [example(i, file, who if has_speakers else None, label) for i, (file, who, label) in enumerate(rows)]
    contents = {e.id: [str(int(clips_of(e)[0].path[:-4]) // 2)] for e in examples}  # two files hold the same samples
    train, held_out, how = split(examples, contents, 0.2, seed)
    assert sorted(e.id for e in (*train, *held_out)) == sorted(e.id for e in examples)
    assert not {contents[e.id][0] for e in train} & {contents[e.id][0] for e in held_out}
    if how.startswith("by speaker"):
        assert not {e.meta["speaker"] for e in train} & {e.meta["speaker"] for e in held_out}
    assert train
    assert (train, held_out, how) == split(examples, contents, 0.2, seed)


@given(counts=st.lists(st.integers(2, 40), min_size=2, max_size=6), seed=st.integers(0, 9))
def test_every_label_is_held_out_by_its_share(counts: list[int], seed: int) -> None:
    labels = [str(label) for label, count in enumerate(counts) for _ in range(count)]
    examples = [example(i, i, None, label) for i, label in enumerate(labels)]
    train, held_out, _ = split(examples, {}, 0.2, seed)
    for label, count in enumerate(counts):
        assert sum(e.target == str(label) for e in held_out) == max(1, round(0.2 * count))
        assert any(e.target == str(label) for e in train)


def test_a_split_that_the_corpus_has_is_kept() -> None:
    examples = [example(i, i, 0, "ab"[i % 2], split="test" if i > 7 else "train") for i in range(10)]
    train, held_out, how = split(examples, {}, 0.5, 0)
    assert ([e.id for e in held_out], how) == (["8", "9"], "as the corpus has it")
    assert len(train) == 8
    assert given_split(TaskExample("dev/cat/1.wav", Clip("a", 1.0), "sec", None, "cat", "t")) == "validation"


def test_one_speaker_is_told_apart_by_file() -> None:
    train, held_out, how = split([example(i, i, 0, "ab"[i % 2]) for i in range(10)], {}, 0.2, 0)
    assert (len(train), len(held_out), how[:7]) == (8, 2, "by file")


def test_transcripts_are_no_closed_set() -> None:
    spoken = [TaskExample(str(i), Clip("a", 1.0), "asr", None, "yes", "t") for i in range(10)]
    assert closed_set(spoken) == []
    assert closed_set([example(i, i, None, "ab"[i % 2]) for i in range(10)]) == ["a", "b"]


def test_steps_are_passes_over_the_corpus_within_bounds() -> None:
    assert steps_of(tokens=10_000, step_tokens=1_000, epochs=4, most=150) == 40
    assert steps_of(tokens=100, step_tokens=1_000, epochs=4, most=150) == 10
    assert steps_of(tokens=10**6, step_tokens=1_000, epochs=4, most=150) == 150
