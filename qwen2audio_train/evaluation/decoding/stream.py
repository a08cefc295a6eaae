"""An answer as it grows, token by token: what a page shows while the model still writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from qwen2audio_train.data.prompts.timestamps import decode
from qwen2audio_train.data.samples.sample import Sample
from qwen2audio_train.evaluation.decoding.generate import GREEDY, Decoding, embed_prompts, stop_ids
from qwen2audio_train.model.packed import unwrap


@torch.no_grad()
def stream_text(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, sample: Sample, decoding: Decoding = GREEDY
) -> Iterator[str]:
    """The greedy answer to one prompt, whole so far, after every token; the last is that of `generate_texts`."""
    inner = unwrap(model)
    inner.eval()
    text_config: Any = inner.config.text_config
    cache = DynamicCache(config=text_config)
    embeds, _, positions = embed_prompts(inner, [sample])
    stops = stop_ids(tokenizer, inner.family)
    ids: list[int] = []
    for step in range(decoding.max_new_tokens):
        hidden = inner.model.language_model(
            inputs_embeds=embeds,
            position_ids=inner.model.rotary_positions(positions),
            past_key_values=cache,
            use_cache=True,
        )
        logits = inner.lm_head(hidden.last_hidden_state[:, -1]).float()
        if step < decoding.min_new_tokens:
            logits[:, stops] = float("-inf")
        token = logits.argmax(-1)
        if int(token) in stops:
            return
        ids.append(int(token))
        yield decode(tokenizer, [ids])[0]
        embeds, positions = inner.get_input_embeddings()(token[:, None]), positions[:, -1:] + 1
