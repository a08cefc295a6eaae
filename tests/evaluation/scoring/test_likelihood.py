from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from qwen2audio_train.data.examples import ChatExample, Clip, Message, PreferenceExample, TaskExample, clips_of
from qwen2audio_train.data.samples.sample import materialise
from qwen2audio_train.evaluation.decoding.generate import embed_prompts
from qwen2audio_train.evaluation.decoding.lazy_samples import LazySamples, swap_audio
from qwen2audio_train.evaluation.scoring.likelihood import held_out_loss, score_labels, score_pairs
from tests.evaluation.tiny import SAMPLES, noise, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Six clips of unlike length and content."""
    folder, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(3)
    found = []
    for i in range(6):
        waveform = noise(rng, 0.3 + 0.2 * i)
        soundfile.write(folder / f"{i}.wav", waveform, 16_000)
        found.append(Clip(str(folder / f"{i}.wav"), len(waveform) / 16_000))
    return found


@pytest.fixture(scope="module")
def model():
    return tiny_model(spread=3.0)


@pytest.fixture
def tasks(clips):
    targets = ["the cat", "on the mat", "what is said", "the mat sat on", "a", "the cat sat on the mat"]
    return [
        TaskExample(f"t{i}", clip, "asr", "en", target, "ab"[i % 2])
        for i, (clip, target) in enumerate(zip(clips, targets, strict=True))
    ]


@pytest.fixture
def pairs(clips):
    def pair(i, clip, rejected):
        return PreferenceExample(f"p{i}", (Message("user", (clip, "What?")),), "the cat", rejected, "dpo")

    return [pair(i, clip, ("the mat",) if i % 2 else ("the mat", "on the cat")) for i, clip in enumerate(clips)]


def stock_logp(model, sample, answer):
    """Log-probability of `answer` ids after the prompt, by the stock forward."""
    embeds, mask, _ = embed_prompts(model, [sample])
    answer = torch.from_numpy(answer)
    embeds = torch.cat([embeds, model.get_input_embeddings()(answer)[None]], dim=1)
    with torch.no_grad():
        logits = model(inputs_embeds=embeds).logits[0, mask.size(1) - 1 : -1]
    return float(logits.double().log_softmax(-1).gather(1, answer[:, None]).sum())


def test_label_scores_are_those_of_the_stock_forward(model, tasks):
    samples = LazySamples(tasks, tiny_tokenizer(), SAMPLES, for_generation=False)
    scores = score_labels(model, samples, tokens_per_batch=60)
    for sample, score in zip(samples, scores, strict=True):
        labels = int(sample.label_mask.sum())
        first = len(sample.input_ids) - labels
        prompt = replace(sample, input_ids=sample.input_ids[:first], position_ids=None)
        assert score.labels == labels
        assert score.nll == pytest.approx(-stock_logp(model, prompt, sample.input_ids[first:]), rel=1e-5)


def test_branches_are_scored_after_their_prompt(model, pairs):
    samples = LazySamples(pairs, tiny_tokenizer(), SAMPLES, for_generation=False)
    scores = score_labels(model, samples)
    for sample, score in zip(samples, scores, strict=True):
        expected = [stock_logp(model, sample, branch) for branch in sample.branches]
        assert score.logps == pytest.approx(expected, rel=1e-5)


def test_loss_is_per_source_and_per_label(model, tasks):
    samples = LazySamples(tasks, tiny_tokenizer(), SAMPLES, for_generation=False)
    scores = score_labels(model, samples)
    losses = held_out_loss(tasks, scores)
    assert set(losses) == {"a", "b"}
    assert losses["a"]["labels"] == sum(scores[i].labels for i in (0, 2, 4))
    assert losses["a"]["loss"] == pytest.approx(sum(scores[i].nll for i in (0, 2, 4)) / losses["a"]["labels"])


def test_a_broken_clip_costs_its_own_sample_only(model, tasks, tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    broken = replace(tasks[0], id="broken", clip=Clip(str(tmp_path / "broken.wav"), 1.0))
    samples = LazySamples([broken, tasks[1]], tiny_tokenizer(), SAMPLES, for_generation=False)
    scores = score_labels(model, samples)
    assert scores[0] is None
    assert scores[1] is not None
    assert "broken.wav" in samples.failed[0]
    assert held_out_loss([broken, tasks[1]], scores).keys() == {"b"}


def test_pairs_are_counted_per_rejected_answer(model, pairs):
    scores = score_pairs(model, tiny_tokenizer(), pairs, SAMPLES)
    labels = score_labels(model, LazySamples(pairs, tiny_tokenizer(), SAMPLES, for_generation=False))
    gaps = [s.logps[0] - rejected for s in labels for rejected in s.logps[1:]]
    assert scores.accuracy.n == 9
    assert scores.accuracy.value == pytest.approx(np.mean(np.array(gaps) > 0))
    assert scores.margin.value == pytest.approx(np.mean(gaps))
    assert scores.reward_accuracy is None


def test_rewards_are_relative_to_the_reference(model, pairs):
    same = score_pairs(model, tiny_tokenizer(), pairs, SAMPLES, reference=tiny_model(spread=3.0))
    assert same.reward_margin.value == pytest.approx(0.0, abs=1e-9)
    other = score_pairs(model, tiny_tokenizer(), pairs, SAMPLES, reference=tiny_model(seed=1, spread=3.0), beta=0.5)
    theirs = score_pairs(tiny_model(seed=1, spread=3.0), tiny_tokenizer(), pairs, SAMPLES)
    assert other.reward_margin.value == pytest.approx(0.5 * (other.margin.value - theirs.margin.value), rel=1e-6)


def test_a_model_without_adapter_is_not_its_own_reference(model, pairs):
    with pytest.raises(TypeError, match="no adapter"):
        score_pairs(model, tiny_tokenizer(), pairs, SAMPLES, reference=model)


def test_what_is_heard_matters(model, pairs):
    margins = {
        audio: score_pairs(model, tiny_tokenizer(), pairs, SAMPLES, audio=audio).margin.value
        for audio in ("own", "swapped", "silence")
    }
    assert len(set(margins.values())) == 3


def test_silence_keeps_the_length(tasks):
    samples = LazySamples(tasks, tiny_tokenizer(), SAMPLES, for_generation=False, audio="silence")
    for silent, example in zip(samples, tasks, strict=True):
        heard = materialise(example, tiny_tokenizer(), SAMPLES)
        assert silent.clip_frames == heard.clip_frames
        assert np.ptp(silent.mels[0][:, : silent.clip_frames[0]]) == 0 < np.ptp(heard.mels[0])


def test_swapped_audio_is_always_another_clip(tasks, clips):
    two = ChatExample("two", (Message("user", (clips[0], clips[1], "?")),), "c")
    swapped = swap_audio([*tasks, two], seed=1)
    assert [e.id for e in swapped] == [e.id for e in tasks], "an example that is alone with two clips has no partner"
    for before, after in zip(tasks, swapped, strict=True):
        assert clips_of(before) != clips_of(after)
        assert replace(after, clip=before.clip) == before
    assert swap_audio([*tasks, two], seed=1) == swapped


def test_the_same_clip_is_no_other_clip(tasks):
    same = [replace(example, clip=tasks[0].clip) for example in tasks]
    assert swap_audio(same) == []
