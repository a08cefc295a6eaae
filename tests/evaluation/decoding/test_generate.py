from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from qwen2audio_train.evaluation.decoding.generate import (
    Decoding,
    embed_prompts,
    generate_texts,
    plan_batches,
    sample_texts,
    stop_ids,
)
from tests.evaluation.tiny import chat_sample, ending_model, mixed_samples, task_sample, tiny_model, tiny_tokenizer

DECODING = Decoding(max_new_tokens=12)


@pytest.fixture(scope="module")
def model():
    return ending_model()


def alone(model, samples, decoding=DECODING):
    return [generate_texts(model, tiny_tokenizer(), [sample], decoding)[0] for sample in samples]


def test_batched_texts_are_those_of_one_by_one(model):
    samples = [*mixed_samples(), task_sample("longer than a window", 30.5)]
    texts = generate_texts(model, tiny_tokenizer(), samples, replace(DECODING, tokens_per_batch=100_000))
    assert texts == alone(model, samples)
    assert len(set(texts)) > 5
    assert len({len(text) for text in texts}) > 3, "the answers should end at different places"


def test_texts_do_not_depend_on_the_batches(model):
    samples = mixed_samples()
    small = generate_texts(model, tiny_tokenizer(), samples, replace(DECODING, tokens_per_batch=120))
    assert small == generate_texts(model, tiny_tokenizer(), samples, DECODING)


def test_a_sampled_text_depends_on_the_seed_and_not_on_the_batch(model):
    samples = mixed_samples()
    drawn = replace(DECODING, temperature=1.5, seed=1)
    texts = generate_texts(model, tiny_tokenizer(), samples, drawn)
    assert texts == alone(model, samples, drawn)
    assert texts != generate_texts(model, tiny_tokenizer(), samples, replace(drawn, seed=2))
    assert texts != generate_texts(model, tiny_tokenizer(), samples, DECODING)


def test_texts_are_those_of_the_stock_loop(model):
    samples, tokenizer = mixed_samples(), tiny_tokenizer()
    embeds, mask, _ = embed_prompts(model, samples)
    stops = stop_ids(tokenizer)
    stock = model.generate(
        inputs_embeds=embeds,
        attention_mask=mask.long(),
        max_new_tokens=DECODING.max_new_tokens,
        min_new_tokens=1,
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=stops[1],
    )
    expected = tokenizer.batch_decode(stock, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert generate_texts(model, tokenizer, samples, replace(DECODING, tokens_per_batch=100_000)) == expected


def test_an_answer_has_at_least_the_tokens_asked_for(model):
    sample = task_sample("a", 0.5)
    with torch.no_grad():
        eager = tiny_model()
        eager.lm_head.weight[stop_ids(tiny_tokenizer())] *= 100
    empty = generate_texts(eager, tiny_tokenizer(), [sample], Decoding(max_new_tokens=4, min_new_tokens=0))
    forced = generate_texts(eager, tiny_tokenizer(), [sample], Decoding(max_new_tokens=4, min_new_tokens=3))
    assert empty == [""]
    assert len(tiny_tokenizer()(forced[0])["input_ids"]) >= 1
    assert forced != empty


def test_text_prompts_alone_need_no_audio(model):
    samples = [chat_sample("a", (), "What is this?"), chat_sample("b", (), "Who sat on the mat?")]
    assert generate_texts(model, tiny_tokenizer(), samples, DECODING) == alone(model, samples)


def test_nothing_in_nothing_out(model):
    assert generate_texts(model, tiny_tokenizer(), [], DECODING) == []


def test_what_cannot_be_loaded_answers_none(model):
    sample = task_sample("a", 0.5)
    texts = generate_texts(model, tiny_tokenizer(), [None, sample, None], DECODING, lengths=[1000, 20, 3])
    assert texts == [None, *alone(model, [sample]), None]


def test_the_mode_of_the_model_is_kept():
    model = tiny_model().train()
    generate_texts(model, tiny_tokenizer(), [task_sample("a", 0.3)], DECODING)
    assert model.training


def test_sampling_depends_on_seed_and_id_only(model):
    samples = mixed_samples()[4:]
    decoding = replace(DECODING, temperature=1.0, num_return_sequences=3, seed=7, tokens_per_batch=100_000)
    together = sample_texts(model, tiny_tokenizer(), samples, decoding)
    apart = [sample_texts(model, tiny_tokenizer(), [sample], decoding)[0] for sample in samples]
    assert together == apart
    assert together != sample_texts(model, tiny_tokenizer(), samples, replace(decoding, seed=8))
    assert any(len(set(texts)) > 1 for texts in together)


def test_a_narrow_nucleus_is_greedy(model):
    samples = mixed_samples()[:4]
    narrow = replace(DECODING, temperature=1.0, top_p=1e-6)
    assert [texts[0] for texts in sample_texts(model, tiny_tokenizer(), samples, narrow)] == alone(model, samples)


def test_sampled_tokens_follow_the_distribution():
    model, tokenizer, sample = tiny_model(spread=2.0), tiny_tokenizer(), task_sample("a", 0.3)
    decoding = Decoding(max_new_tokens=1, temperature=1.3, num_return_sequences=4000, tokens_per_batch=10**6)
    drawn = Counter(sample_texts(model, tokenizer, [sample], decoding)[0])
    embeds, mask, _ = embed_prompts(model, [sample])
    with torch.no_grad():
        logits = model(inputs_embeds=embeds, attention_mask=mask.long()).logits[0, -1]
    logits[stop_ids(tokenizer)] = float("-inf")
    probs = (logits / 1.3).softmax(-1)
    top = probs.argmax()
    share = drawn[tokenizer.decode([int(top)], skip_special_tokens=True)] / 4000
    assert share == pytest.approx(float(probs[top]), abs=4 * float((probs[top] * (1 - probs[top]) / 4000).sqrt()))


def test_sampling_needs_a_temperature(model):
    with pytest.raises(ValueError, match=r"temperature 0\.0"):
        sample_texts(model, tiny_tokenizer(), [], DECODING)


def test_batches_hold_to_the_budget_and_ranks_share_evenly():
    lengths = [100, 30, 500, 80, 80, 79, 20]
    decoding = Decoding(max_new_tokens=20, tokens_per_batch=250)
    assert plan_batches(lengths, decoding) == [[[2], [0, 3], [4, 5], [1, 6]]]
    ranks = plan_batches(lengths, decoding, world=2)
    assert sorted(i for batches in ranks for batch in batches for i in batch) == list(range(7))
    assert [sum(map(len, batches)) for batches in ranks] == [4, 3]
    assert plan_batches(lengths, replace(decoding, num_return_sequences=2))[0] == [[2], [0], [3], [4], [5], [1, 6]]
