"""From an example to token ids.

In: an `Example`. Out: text pieces and clips in the published layout (task form, ChatML, hierarchical tags), then ids
with the exact border of the labels. The pools of natural-language prompts are YAML files under `pools/`.
"""
