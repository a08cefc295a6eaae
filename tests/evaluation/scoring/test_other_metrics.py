"""chrF, captions, mAP, timestamps and likelihood of labels, each against a value that something else gives."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import sacrebleu
import torch

from qwen2audio_train.data.examples import ChatExample, Clip, Message, Span, TaskExample
from qwen2audio_train.errors import MissingLibraryError
from qwen2audio_train.evaluation.decoding.generate import embed_prompts
from qwen2audio_train.evaluation.decoding.lazy_samples import LazySamples
from qwen2audio_train.evaluation.scoring import captions, labels, metrics, timestamps
from qwen2audio_train.evaluation.scoring.evaluate import evaluation_of, table
from qwen2audio_train.evaluation.scoring.items import Item, Seen, item_of
from qwen2audio_train.evaluation.scoring.options import option_rows
from qwen2audio_train.evaluation.scoring.score import check_libraries, score_texts
from tests.evaluation.tiny import SAMPLES, tiny_model, tiny_tokenizer

REFERENCES = ["a dog barks in the rain", "rain falls on a tin roof at night", "a man speaks while a dog barks"]
SAID = ["a dog barks in rain", "rain falls on the roof at night", "a woman speaks while a dog barks loudly"]


def test_chrf_is_that_of_sacrebleu():
    score = metrics.chrf(REFERENCES, SAID)
    assert score.value == pytest.approx(sacrebleu.corpus_chrf(SAID, [REFERENCES]).score)
    assert score.low < score.value < score.high
    assert metrics.chrf(["你好吗"], ["你好"]).value == pytest.approx(
        sacrebleu.corpus_chrf(["你好"], [["你好吗"]]).score
    )


def test_translations_have_both():
    item = Item("1", "s", "s2tt", "en", "de", None, "guten tag", "bleu")
    rows = score_texts([(item, "guten tag")], Seen())
    assert [(row.score.metric, row.scoring) for row in rows] == [("bleu", "sacrebleu/1"), ("chrf", "sacrebleu/1")]


@pytest.fixture
def no_java(monkeypatch):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(captions, "JAVA", "no such program")


def test_captions_against_values_of_others(no_java):
    found = {score.metric: score for score in captions.caption_scores([[text] for text in REFERENCES], SAID)}
    assert found["cider_d"].value == pytest.approx(cider_d([[text] for text in REFERENCES], SAID))
    assert found["bleu_4"].value == pytest.approx(
        sacrebleu.corpus_bleu(SAID, [REFERENCES], tokenize="none", smooth_method="none").score / 100, rel=1e-6
    )
    common = np.array([5, 6, 6])  # longest common subsequences, worked out by hand
    precision, recall = common / [5, 7, 8], common / [6, 8, 7]
    expected = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert found["rouge_l"].value == pytest.approx(expected.mean())
    assert captions.stamp() == "coco_plain/1"


def cider_d(references, hypotheses):
    """CIDEr-D by its definition (arXiv:1411.5726, section 6), one reference or more each."""
    documents = Counter(
        gram
        for texts in references
        for gram in {gram for text in texts for n in range(1, 5) for gram in grams(text, n)}
    )

    def vector(text, n):
        total = math.log(len(references))
        return {gram: c * (total - math.log(max(1, documents[gram]))) for gram, c in grams(text, n).items()}

    def norm(weights):
        return math.sqrt(sum(value**2 for value in weights.values()))

    scores = []
    for texts, said in zip(references, hypotheses, strict=True):
        parts = []
        for text in texts:
            gap = len(said.split()) - len(text.split())
            for n in range(1, 5):
                own, other = vector(said, n), vector(text, n)
                overlap = sum(min(own[gram], other[gram]) * other[gram] for gram in own if gram in other)
                length = norm(own) * norm(other)
                parts.append(math.exp(-(gap**2) / (2 * 6**2)) * (overlap / length if length else 0.0))
        scores.append(10 * sum(parts) / len(parts))
    return sum(scores) / len(scores)


def grams(text, n):
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def test_several_references_of_a_caption(no_java):
    both = [[text, "something else is heard"] for text in REFERENCES]
    cider, rouge, *_ = captions.caption_scores(both, REFERENCES)
    assert cider.value == pytest.approx(cider_d(both, REFERENCES))
    assert rouge.value == 1.0, "the nearest reference counts"


@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_captions_with_java():
    pytest.importorskip("pycocoevalcap")
    texts = ["A dog's bark, and rain!", "", "The colour is (mostly) grey; it isn't."]
    tokens = captions._tokenised([[text] for text in texts])
    assert tokens == {0: ["a dog 's bark and rain"], 1: [""], 2: ["the colour is -lrb- mostly -rrb- grey it is n't"]}
    found = {
        score.metric: score.value for score in captions.caption_scores([[text] for text in REFERENCES], REFERENCES)
    }
    assert found["meteor"] == pytest.approx(1.0, abs=0.01)
    assert captions.stamp() == "coco/1"


def test_captions_are_items_where_all_of_them_are_known(no_java):
    caption = TaskExample("1", Clip("a.wav", 1.0), "aac", None, REFERENCES[0], "mine", meta={"references": REFERENCES})
    assert item_of(caption).metric == "captions"
    assert item_of(replace(caption, meta={})).metric is None
    rows = score_texts([(item_of(caption), REFERENCES[1]), (item_of(caption), "")], Seen(), bootstrap_samples=10)
    assert [row.score.metric for row in rows] == ["cider_d", "rouge_l", "bleu_4", "spice", "spider"]
    assert rows[1].score.value == 0.5


def test_what_spice_lacks_is_said_by_name(no_java):
    examples = [
        TaskExample(str(i), Clip("a.wav", 1.0), "aac", None, text, "clotho_captions", meta={"references": [text]})
        for i, text in enumerate(REFERENCES)
    ]
    found = evaluation_of(examples, SAID, {}, settings={}, bootstrap_samples=10)
    rows = {row.score.metric: row for row in found.rows}
    assert math.isnan(rows["spice"].score.value)
    assert (rows["spice"].score.n, rows["spice"].published) == (3, {"qwen_audio": 0.136})
    assert "stanford-corenlp-3.6.0-models.jar" in "".join(found.caveats)
    lines = [line.split() for line in table(found.rows).splitlines()]
    assert [line[3] for line in lines if "SPICE" in line or "SPIDEr" in line] == ["–", "–"]


def test_spider_is_the_mean_of_both(monkeypatch, no_java):
    """The parser itself was not at hand: its scores come from a stand-in in its form."""
    scores = [0.25, 0.5, 0.75]
    spice = SimpleNamespace(compute_score=lambda wanted, said: (0.5, [{"All": {"f": f}} for f in scores]))
    own = captions._library
    monkeypatch.setattr(captions, "has_spice", lambda: True)
    monkeypatch.setattr(
        captions, "_library", lambda name: SimpleNamespace(Spice=lambda: spice) if "spice" in name else own(name)
    )
    found = {score.metric: score.value for score in captions.caption_scores([[text] for text in REFERENCES], SAID)}
    assert found["spice"] == 0.5
    assert found["spider"] == pytest.approx((found["spice"] + found["cider_d"]) / 2)


def test_an_answer_that_names_no_class_is_counted():
    classes = ["bright", "dark"]
    items = [
        item_of(
            TaskExample(str(i), Clip("a.wav", 1.0), "mnc", None, label, "nsynth_qualities", meta={"choices": classes})
        )
        for i, label in enumerate(["bright", "dark", "bright, dark"])
    ]
    (row,) = score_texts(list(zip(items, ["bright", "loud", ""], strict=True)), Seen(), bootstrap_samples=10)
    assert row.score.extra["unparsed"] == 2.0


def test_what_a_score_needs_is_asked_for_before_anything_is_decoded(monkeypatch):
    monkeypatch.setattr(captions, "import_module", lambda name: (_ for _ in ()).throw(ModuleNotFoundError(name)))
    item = Item("1", "s", "aac", None, None, None, "rain", "captions")
    with pytest.raises(MissingLibraryError, match="pycocoevalcap"):
        check_libraries([item])


@pytest.mark.slow  # importing scikit-learn is
def test_average_precision_is_that_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    truth, scores = (rng.random((60, 5)) < 0.3).astype(float), rng.random((60, 5)).round(1)
    found = labels.mean_average_precision(truth, scores, samples=50)
    assert found.value == pytest.approx(sklearn.average_precision_score(truth, scores, average="macro"))
    weights = rng.integers(0, 4, 60)
    weighted = sklearn.average_precision_score(truth[:, 0], scores[:, 0], sample_weight=weights)
    assert labels.average_precision(truth[:, 0], scores[:, 0], weights) == pytest.approx(weighted)
    assert found.low < found.value < found.high


def test_labels_separated_by_commas():
    meta = {"choices": ["bright", "dark", "reverb"]}
    items = [
        Item(str(i), "s", "mnc", None, None, None, text, "map", meta) for i, text in enumerate(["bright, dark", "dark"])
    ]
    (row,) = score_texts(list(zip(items, ["Dark, bright.", "bright"], strict=True)), Seen())
    # bright: both named, one is right; dark: one named, right, the other not found and ranked last.
    assert row.score.value == pytest.approx((1 / 2 + (1 / 2 * 1 + 1 / 2 * 1)) / 2)
    assert row.scoring == "labels/1"


def test_timestamps_by_hand():
    reference = "<|zh|><|0.00|>今<|0.50|>天<|1.00|>好<|1.50|>"
    score = timestamps.average_shift([reference, reference], ["<|0.10|>今<|0.50|>天<|1.20|>坏<|1.50|>", "no times"])
    # 今: 100 + 0 ms, 天: 0 + 200 ms; 好 was not recognised; the second text cannot be read.
    assert score.value == pytest.approx(300 / 2)
    assert (score.n, score.extra["unparsed"]) == (2, 1.0)
    item = Item("1", "srwt_industrial_zh", "srwt", "zh", "zh", None, reference, "timestamps")
    rows = score_texts([(item, "<|0.10|>今<|0.50|>天<|1.20|>坏<|1.50|>")], Seen())
    assert [(row.score.metric, row.score.value) for row in rows] == [("aas_ms", 150), ("cer", pytest.approx(1 / 3))]
    assert rows[0].published == {"qwen_audio": 51.5}


@pytest.mark.parametrize("text", ["", "word", "<|0.00|>word", "<0.00>", "a<|0.00|>b<|1.00|>", "<0.00>a<1.00>b"])
def test_times_that_cannot_be_read(text):
    assert timestamps.timed_words(text) is None


def test_words_with_times_of_their_own():
    own = "<0.00>a b<0.40> <0.50>c<0.90>"
    assert timestamps.timed_words(own) == (Span(0.0, 0.4, "a b"), Span(0.5, 0.9, "c"))
    assert timestamps.timed_words("<|0.00|>a b<|0.40|><|0.50|>c<|0.90|>") == timestamps.timed_words(own)
    shifts, counts, _ = timestamps.shifts_ms([own], ["<0.00>x<0.30> <0.30>a b<0.50> <0.50>c<0.90>"])
    assert (shifts, counts) == ([300 + 100], [2])
    assert timestamps.spoken(own) == "a b c"


def test_the_likeliest_label(clips_of_noise):
    model, tokenizer, options = tiny_model(spread=3.0), tiny_tokenizer(), ["the cat", "mat", "what is said"]
    meta = {"choices": options}
    asked = [
        TaskExample(str(i), clip, "sec", None, options[i % 3], "s", meta=meta) for i, clip in enumerate(clips_of_noise)
    ]
    turns = (Message("user", (clips_of_noise[0], "Which?")), Message("assistant", ("mat",)))
    asked.append(ChatExample("chat", turns, "s", meta={**meta, "task": "sec"}))
    expected = []
    for example in asked:
        (prompt,) = LazySamples([example], tokenizer, SAMPLES, for_generation=True)
        end = "<|endoftext|>" if isinstance(example, TaskExample) else "<|im_end|>"
        logps = [logp(model, prompt, tokenizer(option + end)["input_ids"]) for option in options]
        expected.append(options[int(np.argmax(logps))] == item_of(example).reference)
    (row,) = option_rows(model, tokenizer, [(item_of(e), e) for e in asked], SAMPLES, tokens_per_batch=200)
    assert row.score.value == pytest.approx(np.mean(expected))
    assert (row.score.n, row.score.extra["chance"], row.scoring) == (4, pytest.approx(1 / 3), "label_likelihood/1")


@pytest.fixture
def clips_of_noise(tmp_path):
    import soundfile

    rng = np.random.default_rng(1)
    for i in range(3):
        soundfile.write(tmp_path / f"{i}.wav", 0.1 * rng.standard_normal(4000 + 2000 * i), 16_000)
    return [Clip(str(tmp_path / f"{i}.wav"), (4000 + 2000 * i) / 16_000) for i in range(3)]


def logp(model, prompt, ids):
    """Log-probability of `ids` after the prompt, by the stock forward."""
    embeds, mask, _ = embed_prompts(model, [prompt])
    answer = torch.tensor(ids)
    embeds = torch.cat([embeds, model.get_input_embeddings()(answer)[None]], dim=1)
    with torch.no_grad():
        logits = model(inputs_embeds=embeds).logits[0, mask.size(1) - 1 : -1]
    return float(logits.double().log_softmax(-1).gather(1, answer[:, None]).sum())
