from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import soundfile

from qwen2audio_train.data.examples import ChatExample, Clip, Message, PreferenceExample, TaskExample
from qwen2audio_train.evaluation.decoding.generate import Decoding, generate_texts
from qwen2audio_train.evaluation.decoding.lazy_samples import LazySamples
from qwen2audio_train.evaluation.scoring.benchmarks import benchmarks
from qwen2audio_train.evaluation.scoring.evaluate import evaluate, save, table
from qwen2audio_train.evaluation.scoring.items import Item, Seen, item_of
from qwen2audio_train.evaluation.scoring.score import score_texts
from tests.evaluation.tiny import SAMPLES, noise, tiny_model, tiny_tokenizer

CLIP = Clip("a.wav", 1.0)


def asr(name, target, language="en", **meta):
    return TaskExample(name, CLIP, "asr", language, target, f"asr_{language}", meta=meta)


def chat(name, question, reference, mode=None, source="analysis", **meta):
    content = (CLIP, question) if question else (CLIP,)
    return ChatExample(name, (Message("user", content), Message("assistant", (reference,))), source, mode, meta)


def scored(pairs, train=()):
    rows = score_texts([(item_of(example), text) for example, text in pairs], Seen.of(train))
    return {(row.source, row.kind, row.score.metric): row.score for row in rows}


def test_rows_are_per_source_and_language_with_the_metric_of_the_task():
    translation = TaskExample("s", CLIP, "s2tt", "en", "guten tag", "s2tt_en_de", "de")
    event = TaskExample("e", CLIP, "sec", None, "dog", "sec")
    rows = scored(
        [
            (asr("a", "hello world"), "hello there"),
            (asr("b", "你好", "zh"), "你号"),
            (translation, "guten tag"),
            (event, "dog"),
        ]
    )
    assert rows["asr_en", "", "wer"].value == 0.5
    assert rows["asr_zh", "", "cer"].value == 0.5
    assert rows["s2tt_en_de", "", "bleu"].n == 1
    assert rows["sec", "", "accuracy"].value == 1.0


def test_unseen_words_from_the_manifest_or_from_the_training_examples():
    example = asr("a", "the zebra sleeps", unseen_words=["zebra"])
    rows = scored([(example, "the zebra sat"), (asr("b", "the cow", unseen_words=[]), "")])
    assert rows["asr_en", "", "unseen_word_error_rate"].value == 0.0
    assert rows["asr_en", "", "unseen_word_error_rate"].n == 1, "utterances that hold an unseen word"
    rows = scored([(asr("a", "the zebra sleeps"), "the cow sat")], train=[asr("t", "the cow sleeps")])
    assert rows["asr_en", "", "unseen_word_error_rate"].value == 1.0
    assert ("asr_en", "", "unseen_word_error_rate") not in scored([(asr("a", "the"), "the")])


def test_majority_is_the_answer_that_training_gives_to_the_question():
    train = [chat(str(i), "Who?", "a man.") for i in range(3)] + [chat("x", "Who?", "a woman.")]
    train += [chat(str(i), "How many?", "two.") for i in range(9)]
    held_out = [
        (chat("1", "Who?", "a man."), "a man"),
        (chat("2", "Who?", "a woman."), "A woman."),
        (chat("3", "How many?", "one."), "two"),
        (chat("4", "Never asked?", "two."), "two"),
    ]
    score = scored(held_out, train)["analysis", "", "accuracy"]
    assert score.value == 0.75
    assert score.extra["majority"] == 0.5, "a man to Who?, two to the others"


def test_majority_is_that_of_the_source_where_training_had_it():
    train = [chat(str(i), "Which word?", "bed", source="words") for i in range(2)]
    train += [chat(str(i), "Which word?", "stop", source="commands") for i in range(5)]
    held_out = [(chat("1", "Which word?", "bed", source=source), "cat") for source in ("words", "commands", "other")]
    rows = scored(held_out, train)
    assert [rows[name, "", "accuracy"].extra["majority"] for name in ("words", "commands", "other")] == [1, 0, 0]


def test_chance_counts_the_answers_of_the_same_kind():
    held_out = [
        (chat("1", "Who?", "a man.", kind="gender"), "a man"),
        (chat("2", "Who?", "a woman.", kind="gender"), "a man"),
        (chat("3", "Which?", "piano", kind="instrument"), "piano"),
        (chat("4", "Which?", "organ", kind="instrument"), "x"),
        (chat("5", "Which?", "flute", kind="instrument"), "x"),
        (chat("6", "Which?", "flute", kind="instrument"), "x"),
    ]
    rows = scored(held_out)
    assert rows["analysis", "", "accuracy"].extra["chance"] == pytest.approx((2 / 2 + 4 / 3) / 6)
    assert rows["analysis", "gender", "accuracy"].value == 0.5
    assert rows["analysis", "instrument", "accuracy"].n == 4


def test_voice_chat_that_is_transcribed_instead():
    def ask(name, said, answer):
        return chat(name, "", answer, "voice_chat", "voice_chat", said=["earlier", said])

    rows = scored(
        [
            (ask("1", "what is the opposite of big", "small."), "what is the opposite of big"),
            (ask("2", "what is the opposite of old", "young."), "young"),
            (ask("3", "what is the opposite of hot", "cold."), "warm"),
            (ask("4", "say the word water", "water."), "water"),
        ]
    )
    assert rows["voice_chat", "", "transcribed_instead"].value == 0.25
    assert rows["voice_chat", "", "accuracy"].value == 0.5


def test_transcription_that_is_answered_instead():
    example = chat("1", "Write down what is said.", "what is not big.", kind="transcript", answer="small")
    rows = scored([(example, "small"), (replace(example, id="2"), "what is not big")])
    assert rows["analysis", "", "answered_instead"].value == 0.5
    assert rows["analysis", "", "wer"].n == 2


def test_words_where_nobody_speaks_are_counted_apart_from_the_error_rate():
    nothing = [chat(str(i), "Write it down.", "No speech.", task="asr", no_speech=True) for i in range(4)]
    speech = chat("s", "Write it down.", "the cat sat", task="asr")
    rows = scored([(speech, "the cat sat"), *zip(nothing, ["no speech", "", "the cat sat", "no"], strict=True)])
    assert (rows["analysis", "", "wer"].value, rows["analysis", "", "wer"].n) == (0.0, 1)
    assert (rows["analysis", "", "hallucination"].value, rows["analysis", "", "hallucination"].n) == (0.5, 4)


def test_a_benchmark_is_scored_by_its_own_rules_beside_published_figures():
    emotion = TaskExample("1", CLIP, "ser", "en", "joy", "meld")
    (row,) = score_texts([(item_of(emotion), " joy"), (item_of(emotion), "Joy")], Seen())
    assert row.score.value == 0.5, "exact match after lstrip"
    assert row.published == dict(benchmarks()["meld"].published)
    assert (row.published["paper"], row.published["converted"]) == (0.553, 0.535)
    assert "paper 55.3 %" in table([row])


def test_letters_and_choices():
    four = ["rain", "a dog", "wind", "a car"]
    letter = chat("1", "?", "B", source="airbench_foundation", choices=four)
    rows = scored([(letter, text) for text in ("B", "(B) a dog", "The answer is B.", "C. wind", "a dog", "")])
    score = rows["airbench_foundation", "", "accuracy"]
    assert score.value == 0.5
    assert score.extra == {"chance": 0.25, "unparsed": 2.0}
    choice = chat("1", "?", "a dog", source="mmau_test_mini", choices=four)
    rows = scored([(choice, "It is a dog."), (choice, "a dog in the rain")])
    assert rows["mmau_test_mini", "", "accuracy"].value == 0.5


def test_captions_and_unanswered_chats_have_no_score():
    caption = TaskExample("1", CLIP, "aac", None, "a dog barks in the rain", "captions")
    open_chat = ChatExample("2", (Message("user", (CLIP,)),), "open")
    assert scored([(caption, "a dog"), (open_chat, "hello")]) == {}


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    found = []
    for i in range(5):
        soundfile.write(folder / f"{i}.wav", noise(rng, 0.4 + 0.1 * i), 16_000)
        found.append(replace(asr(f"a{i}", "the cat sat"), clip=Clip(str(folder / f"{i}.wav"), None)))
    clip = found[0].clip
    turns = (Message("user", (clip, "Who?")), Message("assistant", ("a cat",)))
    found.append(ChatExample("two", (*turns, Message("user", ("Where?",)), Message("assistant", ("mat",))), "analysis"))
    return found


def test_evaluation_end_to_end(examples, tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    broken = replace(examples[0], id="broken", clip=Clip(str(tmp_path / "absent.wav"), 1.0))
    decoding = Decoding(max_new_tokens=5)
    result = evaluate(model, tokenizer, [*examples[:3], broken, *examples[3:]], SAMPLES, decoding=decoding)

    texts = {record["id"]: record["text"] for record in result.texts}
    prompts = LazySamples(examples, tokenizer, SAMPLES, for_generation=True)
    assert texts == dict(
        zip([e.id for e in examples], generate_texts(model, tokenizer, prompts, decoding, prompts.lengths), strict=True)
    )
    assert [(row.source, row.score.metric, row.score.n) for row in result.rows] == [
        ("asr_en", "wer", 5),
        ("analysis", "accuracy", 1),
    ]
    assert "absent.wav: no such file" in result.failed["broken"]
    assert result.loss.keys() == {"asr_en", "analysis"}

    save(result, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["rows"][0]["score"]["n"] == 5
    assert report["settings"]["max_new_tokens"] == 5
    written = (tmp_path / "out" / "table.txt").read_text()
    assert "WER" in written
    assert "left out: broken" in written
    lines = (tmp_path / "out" / "texts.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [e.id for e in examples]


def test_without_its_audio_the_model_says_something_else(examples):
    model, decoding = tiny_model(), Decoding(max_new_tokens=5)
    heard, silent, swapped = (
        evaluate(model, tiny_tokenizer(), examples[:5], SAMPLES, decoding=decoding, audio=audio)
        for audio in ("own", "silence", "swapped")
    )
    assert len({tuple(r["text"] for r in result.texts) for result in (heard, silent, swapped)}) == 3


def test_preferences_are_refused():
    pair = PreferenceExample("p", (Message("user", (CLIP,)),), "a", ("b",), "dpo")
    with pytest.raises(ValueError, match="score_pairs"):
        evaluate(tiny_model(), tiny_tokenizer(), [pair], SAMPLES)


def test_columns_line_up_over_chinese_text():
    rows = score_texts([(item_of(asr("a", "你好", "zh")), "你好"), (item_of(asr("b", "hello")), "hello")], Seen())
    rows = [replace(row, source="中文" if row.language == "zh" else row.source) for row in rows]
    lines = table(rows).splitlines()
    assert lines[2].index("asr ") == lines[3].index("asr ") - 2


def _decoded(metric, references, texts, **meta):
    items = [
        Item(str(i), "s", "asr" if metric == "error_rate" else "aqa", "en", None, None, reference, metric, meta)
        for i, reference in enumerate(references)
    ]
    return list(zip(items, texts, strict=True))


def test_every_error_rate_says_how_it_was_made():
    (row,) = score_texts(_decoded("error_rate", ["It's a white paper."], ["it is a whitepaper"]), Seen())
    assert (row.score.value, row.scoring) == (2 / 5, "reference/2")
    assert row.score.extra["strict/1"] == 1.0
    assert "strict/1 100.0 %" in table([row])
    if find_spec("kaldialign"):  # compounds are one word
        assert row.score.extra["open_asr/1"] == 0.0


def test_an_answer_that_names_no_option_is_wrong_and_counted():
    choices = ["a dog", "rain"]
    (row, *_) = score_texts(
        _decoded("choice", ["rain", "rain", "a dog"], ["rain", "no idea", "a dog or rain"], choices=choices), Seen()
    )
    assert (row.score.value, row.score.extra["unparsed"]) == (pytest.approx(1 / 3), 2.0)
    (row, *_) = score_texts(_decoded("letter", ["A", "B"], ["(A) a dog", "hm"], choices=choices), Seen())
    assert (row.score.value, row.score.extra["unparsed"]) == (0.5, 1.0)
    (row, *_) = score_texts(_decoded("accuracy", ["rain", "a dog"], ["Rain!", "cat"], choices=choices), Seen())
    assert (row.score.value, row.score.extra["unparsed"]) == (0.5, 1.0)
    assert "1 of 2 name no option" in table([row])
