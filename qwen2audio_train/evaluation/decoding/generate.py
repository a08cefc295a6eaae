"""Decoding in batches: packed encoder at real lengths, left-padded rows, the stock decoder with its KV cache.

The loop is our own for what the stock one cannot be asked for: logits of the last position alone (the stock forward
takes those of the whole prompt), rows that leave the batch when they end, one prompt computed for several sampled
answers, and draws that do not depend on the batch. Its texts are those of `GenerationMixin.generate`; on a small model
it is hardly faster (benchmarks/generation.py).

Shape legend: B rows, T prompt tokens (the longest), t tokens so far, V vocabulary, d width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from qwen2audio_train.data.prompts.timestamps import decode
from qwen2audio_train.data.samples.sample import Sample
from qwen2audio_train.errors import UserError
from qwen2audio_train.evaluation.decoding.kept import KeptAnswers
from qwen2audio_train.evaluation.decoding.lazy_samples import load_ahead
from qwen2audio_train.evaluation.decoding.ranks import gather, is_sharded, rank_and_world
from qwen2audio_train.families.family import Family
from qwen2audio_train.families.known import DEFAULT
from qwen2audio_train.model.packed import PackedAudioLM, unwrap

_FILLER = Sample("", "", "", np.zeros(1, np.int64), np.zeros(1, bool), np.zeros(0, np.int64))
"""A prompt of one token: what a rank without work decodes."""


@dataclass(frozen=True)
class Decoding:
    """How to decode; greedy unless `temperature` is above 0. The defaults are those of the published figures.

    Attributes:
        tokens_per_batch: bound of rows x (longest prompt + max_new_tokens), which is what the KV cache holds.
        temperature, top_p, num_return_sequences, seed: of sampling. What is drawn depends on the seed and on the
            sample's id, and not on the batch that the sample is in.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 1
    tokens_per_batch: int = 8192
    temperature: float = 0.0
    top_p: float = 1.0
    num_return_sequences: int = 1
    seed: int = 0


GREEDY = Decoding()


def generate_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample | None],
    decoding: Decoding = GREEDY,
    lengths: Sequence[int] | None = None,
    kept: KeptAnswers | None = None,
) -> list[str | None]:
    """An answer to every prompt, in the order of `samples`; on several ranks each decodes its share.

    Args:
        samples: prompts (`materialise(..., for_generation=True)`). A sequence that loads its items when they are asked
            for keeps only two batches in memory, and should come with `lengths`. What loads as None answers None.
        lengths: prompt length of every sample in tokens, roughly.
        kept: answers of a run that was broken off, and where new ones are written down as they come.
    """
    answers = _generate(model, tokenizer, samples, replace(decoding, num_return_sequences=1), lengths, kept)
    return [None if texts is None else texts[0] for texts in answers]


def sample_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample | None],
    decoding: Decoding,
    lengths: Sequence[int] | None = None,
) -> list[list[str] | None]:
    """`decoding.num_return_sequences` sampled answers to every prompt; see `generate_texts`.

    Raises:
        ValueError: the temperature is not above 0.
    """
    if decoding.temperature <= 0:
        raise UserError(f"temperature {decoding.temperature} cannot be sampled with; give one above 0, such as 1.0")
    return _generate(model, tokenizer, samples, decoding, lengths)


def plan_batches(lengths: Sequence[int], decoding: Decoding, world: int = 1) -> list[list[list[int]]]:
    """Indices of every batch of every rank: equal shares, and the largest prompts first, where memory may not do."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [_fill_batches(order[rank::world], lengths, decoding) for rank in range(world)]


def _fill_batches(order: Sequence[int], lengths: Sequence[int], decoding: Decoding) -> list[list[int]]:
    batches: list[list[int]] = []
    for index in order:
        if batches:
            rows = (len(batches[-1]) + 1) * decoding.num_return_sequences
            if rows * (lengths[batches[-1][0]] + decoding.max_new_tokens) <= decoding.tokens_per_batch:
                batches[-1].append(index)
                continue
        batches.append([index])
    return batches


def stop_ids(tokenizer: PreTrainedTokenizerBase, family: Family = DEFAULT) -> list[int]:
    """Ids that end an answer: in a chat, and in the task form."""
    return cast(list[int], tokenizer.convert_tokens_to_ids([family.turn_end, family.text_end]))


def _generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample | None],
    decoding: Decoding,
    lengths: Sequence[int] | None,
    kept: KeptAnswers | None = None,
) -> list[list[str] | None]:
    if lengths is None:
        lengths = [0 if sample is None else len(sample.input_ids) for sample in samples]
    rank, world = rank_and_world()
    plans = plan_batches(lengths, decoding, world)
    answers: dict[int, list[str] | None] = dict(kept.known) if kept else {}
    # Batches stay as they were planned: so what is decoded after a restart is rounded as it would have been.
    plans = [[batch for batch in batches if not answers.keys() >= set(batch)] for batches in plans]
    mine = plans[rank]
    # Under ZeRO-3 a forward is a collective: a rank with fewer batches decodes fillers.
    synced = is_sharded(model)
    fillers: list[list[int]] = [[]] * (max(map(len, plans)) - len(mine)) if synced else []
    inner = unwrap(model)
    training = inner.training
    inner.eval()
    for batch, loaded in load_ahead(samples, mine + fillers):
        known = [sample for sample in loaded if sample is not None]
        if synced and not known:
            _decode_batch(inner, tokenizer, [_FILLER], decoding, synced)
        texts = iter(_decode_batch(inner, tokenizer, known, decoding, synced) if known else [])
        new = {i: None if sample is None else next(texts) for i, sample in zip(batch, loaded, strict=True)}
        if kept:
            kept.add(new)
        answers |= new
    inner.train(training)
    answers = gather(answers)
    return [answers[index] for index in range(len(samples))]


@torch.no_grad()
def sample_tokens(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample], decoding: Decoding
) -> list[list[list[int]]]:
    """Token ids of `num_return_sequences` sampled answers to every prompt of this rank, with the stop token that ended.

    An answer without one is `max_new_tokens` long. Ranks answer prompts of their own; under ZeRO-3 all of them call
    this together, equally often, with any number of prompts.
    """
    inner, synced = unwrap(model), is_sharded(model)
    training = inner.training
    inner.eval()
    batches = _fill_batches(range(len(samples)), [len(s.input_ids) for s in samples], decoding)
    rows: list[list[list[int]]] = []
    copies = decoding.num_return_sequences
    for batch in [*batches, *([[]] * (_most(len(batches)) - len(batches) if synced else 0))]:
        asked = [samples[index] for index in batch] or [_FILLER]
        uniforms = _uniforms(asked, decoding) if decoding.temperature > 0 else None
        found = _decode_rows(
            inner, embed_prompts(inner, asked), stop_ids(tokenizer, inner.family), decoding, uniforms, synced, True
        )
        rows += [found[start : start + copies] for start in range(0, len(found), copies)] if batch else []
    inner.train(training)
    return rows


def _most(count: int) -> int:
    """The largest `count` of all ranks."""
    found = torch.tensor(count)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


@torch.no_grad()
def _decode_batch(
    model: PackedAudioLM,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    decoding: Decoding,
    synced: bool,
) -> list[list[str]]:
    copies = decoding.num_return_sequences
    uniforms = _uniforms(samples, decoding) if decoding.temperature > 0 else None
    stop = stop_ids(tokenizer, model.family)
    rows = _decode_rows(model, embed_prompts(model, samples), stop, decoding, uniforms, synced)
    texts = decode(tokenizer, rows)
    return [texts[start : start + copies] for start in range(0, len(texts), copies)]


class Prompts(NamedTuple):
    """Prompts with their audio, padded on the left."""

    embeds: Tensor  # (B, T, d)
    mask: Tensor  # (B, T) bool: which of them count
    positions: Tensor  # (B, T)


def embed_prompts(model: PackedAudioLM, samples: Sequence[Sample]) -> Prompts:
    """The prompts of some samples as the language model takes them."""
    width = max(len(sample.input_ids) for sample in samples)
    ids = torch.zeros(len(samples), width, dtype=torch.long)
    mask, positions = torch.zeros(len(samples), width, dtype=torch.bool), torch.zeros_like(ids)
    slots = []
    for row, sample in enumerate(samples):
        pad = width - len(sample.input_ids)
        ids[row, pad:], mask[row, pad:] = torch.from_numpy(sample.input_ids), True
        positions[row, pad:] = torch.from_numpy(sample.positions)
        slots.append(sample.audio_slot + row * width + pad)
    mels = [mel for sample in samples for mel in sample.mels]
    audio_config: Any = model.config.audio_config
    mel = np.concatenate(mels, axis=1) if mels else np.zeros((audio_config.num_mel_bins, 0), np.float32)
    frames = [frames for sample in samples for frames in sample.clip_frames]
    audio = (torch.from_numpy(mel), torch.tensor(frames, dtype=torch.long), torch.from_numpy(np.concatenate(slots)))
    on_device = (x.to(model.device) for x in (ids, *audio))
    return Prompts(model.model.embed(*on_device), mask.to(model.device), positions.to(model.device))


def _decode_rows(
    model: PackedAudioLM,
    prompts: Prompts,
    stop: list[int],
    decoding: Decoding,
    uniforms: Tensor | None,
    synced: bool,
    keep_stop: bool = False,
) -> list[list[int]]:
    """Token ids, `num_return_sequences` rows per prompt; a finished row leaves the batch.

    Args:
        keep_stop: with the stop token that ended a row.
    """
    embeds, mask, positions = prompts
    copies = decoding.num_return_sequences
    answers: list[list[int]] = [[] for _ in range(len(mask) * copies)]
    alive = list(range(len(answers)))
    text_config: Any = model.config.text_config
    cache = DynamicCache(config=text_config)
    stops = torch.tensor(stop, device=mask.device)
    for step in range(decoding.max_new_tokens):
        hidden = model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=_attended(mask, embeds.size(1)),
            position_ids=model.model.rotary_positions(positions),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        if step == 0 and copies > 1:
            cache.batch_repeat_interleave(copies)
            hidden, mask, positions = (x.repeat_interleave(copies, dim=0) for x in (hidden, mask, positions))
        logits = model.lm_head(hidden).float()
        if step < decoding.min_new_tokens:
            logits[:, stops] = float("-inf")
        if uniforms is None:
            token = logits.argmax(-1)
        else:
            token = _draw(logits, uniforms[alive, step].to(logits.device), decoding)
        going = ~torch.isin(token, stops)
        for row, value, goes_on in zip(alive, token.tolist(), going.tolist(), strict=True):
            if (goes_on or keep_stop) and row >= 0:
                answers[row].append(value)
        if not _anywhere(going, synced):
            break
        if not bool(going.all()):
            kept = going.nonzero()[:, 0]
            # A rank that is done goes on with a row that nobody reads, until the last rank is.
            alive = [alive[i] for i in kept.tolist()] or [-1]
            kept = kept if len(kept) else kept.new_zeros(1)
            cache.batch_select_indices(kept)
            token, mask, positions = token[kept], mask[kept], positions[kept]
        embeds = model.get_input_embeddings()(token[:, None])
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return answers


def _attended(mask: Tensor, queries: int) -> Tensor:
    """Which keys (t) each of the last `queries` tokens sees, (B, 1, queries, t) bool; padding sees all before it."""
    width = mask.size(1)
    causal = torch.ones(queries, width, dtype=torch.bool, device=mask.device).tril(width - queries)
    padding = ~mask[:, width - queries :, None]
    return ((mask[:, None, :] | padding) & causal)[:, None]


def _anywhere(going: Tensor, synced: bool) -> bool:
    flag = going.any()
    if synced:
        flag = flag.int()
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def _draw(logits: Tensor, uniforms: Tensor, decoding: Decoding) -> Tensor:
    """A token per row by inverting the distribution function at `uniforms` (B,), within the nucleus of `top_p`."""
    probs, tokens = (logits / decoding.temperature).softmax(-1).sort(dim=-1, descending=True)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= decoding.top_p, 0.0)
    cumulative = probs.cumsum(-1)
    place = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    return tokens.gather(1, place.clamp(max=logits.size(-1) - 1))[:, 0]


def _uniforms(samples: Sequence[Sample], decoding: Decoding) -> Tensor:
    """(B x num_return_sequences, max_new_tokens) numbers in [0, 1), a function of seed, id, sequence and place."""
    shape = (decoding.num_return_sequences, decoding.max_new_tokens)
    rows = []
    for sample in samples:
        digest = hashlib.blake2b(f"{decoding.seed}/{sample.id}".encode(), digest_size=8).digest()
        rows.append(np.random.default_rng(int.from_bytes(digest, "big")).random(shape, dtype=np.float32))
    return torch.from_numpy(np.concatenate(rows))
