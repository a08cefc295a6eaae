"""What the model reads: byte for byte the published chat template, and the base model's prompts."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from qwen2audio_train.data.examples import (
    ChatExample,
    Clip,
    Example,
    Message,
    PreferenceExample,
    TaskExample,
    UnpairedExample,
)
from qwen2audio_train.data.prompts.pools import PLACEHOLDERS, choose_prompt, describe_tasks, tag_tokens, task_names
from qwen2audio_train.data.prompts.pools import _pools as pools
from qwen2audio_train.data.prompts.render import Rendered, Text, render, rendered_text
from qwen2audio_train.data.prompts.tokenizer import build_processor
from qwen2audio_train.errors import ExampleError

CLIP = Clip("a.wav", 1.0)
ASR = TaskExample("a1", CLIP, "asr", "en", "hello", "s")
AUDIO = "<|audio_bos|><|AUDIO|><|audio_eos|>"


def chat(*messages: tuple[str, tuple[Clip | str, ...]]) -> ChatExample:
    return ChatExample("b1", tuple(Message(role, content) for role, content in messages), "s")


def labelled(rendered: Rendered) -> str:
    return "".join(piece.text for piece in rendered.trunk if isinstance(piece, Text) and piece.is_label)


def published(example: ChatExample, tokenizer: PreTrainedTokenizerFast, generation: bool = False) -> str:
    """The stock processor's rendering of the same conversation."""

    def part(item: Clip | str) -> dict[str, str]:
        return {"type": "text", "text": item} if isinstance(item, str) else {"type": "audio", "audio": item.path}

    messages = [{"role": m.role, "content": [part(item) for item in m.content]} for m in example.messages]
    processor = build_processor(tokenizer)
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)


CONTENT = st.lists(st.just(CLIP) | st.text(min_size=1, max_size=8), min_size=1, max_size=4).map(tuple)
TURNS = st.lists(
    st.tuples(st.just("user"), CONTENT) | st.tuples(st.just("assistant"), st.tuples(st.text(min_size=1, max_size=8))),
    min_size=1,
    max_size=5,
)


@given(turns=TURNS, system=st.none() | st.text(min_size=1, max_size=8))
def test_chat_equals_the_published_template(tokenizer: Any, turns: list[Any], system: str | None) -> None:
    head = [] if system is None else [("system", (system,))]
    example = chat(*head, *turns, ("user", (CLIP,)), ("assistant", ("ok",)))
    assert rendered_text(render(example)) == published(example, tokenizer)
    asked = chat(*head, *turns, ("user", (CLIP,)))
    assert rendered_text(render(example, for_generation=True)) == published(asked, tokenizer, generation=True)


def test_chat_labels_every_assistant_turn_or_the_last() -> None:
    example = chat(
        ("user", (CLIP, "One?")), ("assistant", ("First.",)), ("user", ("Two?",)), ("assistant", ("Second.",))
    )
    assert labelled(render(example)) == "First.<|im_end|>Second.<|im_end|>"
    assert labelled(render(example, labelled_turns="last")) == "Second.<|im_end|>"
    assert labelled(render(example, for_generation=True)) == ""


def test_chat_without_an_answer_cannot_be_learnt_from() -> None:
    with pytest.raises(ExampleError, match=r'"b1": no assistant message'):
        render(chat(("user", (CLIP,))))


def with_text(text: str) -> dict[str, Example]:
    """Examples that hold a text in every place where one can stand."""
    asked, heard = (Message("user", (CLIP, text)),), (Message("user", (CLIP, "What?")),)
    return {
        "target": TaskExample("x", CLIP, "asr", "en", text, "s"),
        "question": TaskExample("x", CLIP, "aqa", None, "two", "s", question=text),
        "turn": chat(("user", (text,)), ("assistant", ("ok",))),
        "turn beside a clip": chat(("user", (CLIP, text)), ("assistant", ("ok",))),
        "system": chat(("system", (text,)), ("user", (CLIP,)), ("assistant", ("ok",))),
        "answer": chat(("user", (CLIP,)), ("assistant", (text,))),
        "prompt of a pair": PreferenceExample("x", asked, "a", ("b",), "s"),
        "chosen": PreferenceExample("x", heard, text, ("b",), "s"),
        "rejected": PreferenceExample("x", heard, "a", ("b", text), "s"),
        "completion": UnpairedExample("x", heard, text, True, "s"),
    }


@pytest.mark.parametrize("place", with_text(""))
@pytest.mark.parametrize("mark", ["<audio>", "<|AUDIO|>", "<|audio_pad|>", "<image>", "<|im_end|>", "<|endoftext|>"])
def test_a_mark_in_a_text_is_no_clip_and_no_text(place: str, mark: str) -> None:
    """Also for what was never a line of a manifest: examples made in Python, and prompts that are to be answered."""
    with pytest.raises(ExampleError, match=rf'"(x|b1)": expected text alone.* found {re.escape(repr(mark))}'):
        render(with_text(f"What {mark} is it?")[place])
    if place in ("question", "turn", "turn beside a clip", "system", "prompt of a pair"):
        with pytest.raises(ExampleError, match="text alone"):
            render(with_text(mark)[place], for_generation=True)
    for kept in ("a < b > c", "< audio >", "<b>", "<audio controls>", "|AUDIO|", "<|en|>"):
        rendered = render(with_text(kept)[place])
        texts = [
            rendered_text(rendered),
            *(rendered_text(rendered, branch) for branch in range(len(rendered.branches))),
        ]
        assert any(kept in text for text in texts)


def test_voice_chat_is_a_turn_of_audio_alone() -> None:
    text = rendered_text(render(chat(("user", (CLIP,)), ("assistant", ("Hi.",)))))
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\nAudio 1: {AUDIO}\n<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n"
    )


def test_preference() -> None:
    prompt = (Message("user", (CLIP, "What?")),)
    rendered = render(PreferenceExample("c1", prompt, "Good.", ("Bad.", "Worse."), "s"))
    asked = rendered_text(rendered)
    assert asked.endswith("What?<|im_end|>\n<|im_start|>assistant\n")
    texts = ["".join(piece.text for piece in branch) for branch in rendered.branches]
    assert texts == ["Good.<|im_end|>", "Bad.<|im_end|>", "Worse.<|im_end|>"]
    assert all(piece.is_label for branch in rendered.branches for piece in branch)
    assert labelled(rendered) == ""
    assert rendered_text(rendered, 1) == asked + "Bad.<|im_end|>"


def test_task_form_for_training_and_for_evaluation() -> None:
    prompt = f"{AUDIO}Detect the language and recognize the speech: "
    rendered = next(r for r in (render(ASR, seed=seed) for seed in range(50)) if "Detect" in rendered_text(r))
    assert rendered_text(rendered) == prompt + "<|en|>hello<|endoftext|>"
    assert labelled(rendered) == "<|en|>hello<|endoftext|>"
    asked = render(ASR, for_generation=True)
    assert (rendered_text(asked), labelled(asked)) == (prompt + "<|en|>", "")


def test_translation_names_the_target_language() -> None:
    example = TaskExample("a2", CLIP, "s2tt", "en", "hallo", "s", text_language="de")
    assert rendered_text(render(example, for_generation=True)) == (
        f"{AUDIO}Detect the language and translate the speech into German: <|en|>"
    )


def test_without_a_language_no_prompt_names_one() -> None:
    unknown = TaskExample("a3", CLIP, "asr", None, "hello", "s")
    texts = {rendered_text(render(unknown, seed=seed)) for seed in range(30)}
    assert texts == {
        f"{AUDIO}{p}hello<|endoftext|>" for p in ("Transcribe this recording:", "Write down what is said:")
    }


def test_a_question_is_the_user_s_text() -> None:
    example = TaskExample("a4", CLIP, "aqa", "en", "two", "s", question="How many {language} <|en|>?")
    rendered = render(example)
    assert rendered_text(rendered) == f"{AUDIO}How many {{language}} <|en|>?two<|endoftext|>"
    assert [p.is_markup for p in rendered.trunk if isinstance(p, Text) and "How" in p.text] == [False]


@pytest.mark.parametrize(
    ("example", "tags"),
    [
        (ASR, "<|startoftranscript|><|en|><|transcribe|><|en|><|notimestamps|><|wo_itn|>hello"),
        (
            TaskExample("a", CLIP, "s2tt", "en", "hallo", "s", text_language="de"),
            "<|startoftranscript|><|en|><|translate|><|de|><|notimestamps|><|wo_itn|>hallo",
        ),
        (
            TaskExample("a", CLIP, "aac", None, "a dog", "s"),
            "<|startofanalysis|><|unknown|><|caption|><|en|><|notimestamps|><|caption_plain|>a dog",
        ),
        (
            TaskExample("a", CLIP, "aqa", None, "two", "s", question="How many?"),
            "<|startofanalysis|><|unknown|><|question|>How many?<|answer|><|en|><|notimestamps|><|answer|>two",
        ),
    ],
)
def test_hierarchical_tags(example: TaskExample, tags: str) -> None:
    rendered = render(example, prompt_style="hierarchical_tags")
    assert rendered_text(rendered) == f"{AUDIO}{tags}<|endoftext|>"
    assert labelled(rendered) == f"{example.target}<|endoftext|>"


def test_a_pool_can_be_cut_to_its_first_prompts() -> None:
    def prompts(most: int | None) -> set[str]:
        return {rendered_text(render(ASR, seed=seed, prompts_per_task=most)) for seed in range(60)}

    assert (len(prompts(1)), len(prompts(2))) == (1, 2)
    assert prompts(1) < prompts(2) < prompts(None)
    (alone,) = prompts(1)
    assert alone.startswith(rendered_text(render(ASR, for_generation=True)))


def test_prompts_are_a_function_of_seed_and_id() -> None:
    def chosen(seed: int) -> list[str]:
        examples = [TaskExample(f"id{i}", CLIP, "asr", "en", "x", "s") for i in range(400)]
        return [choose_prompt(example, "natural", seed).prompt for example in examples]

    first = chosen(0)
    assert first == chosen(0)
    assert first != chosen(1)
    counts = [first.count(prompt) for prompt in set(first)]
    assert len(counts) == 4
    assert min(counts) > 70  # 100 expected, standard deviation 8.7


def test_pools_are_complete() -> None:
    assert {"asr", "s2tt", "lid", "sgc", "ser", "vsc", "sec", "asc", "aac", "aqa", "mnc"} <= set(task_names())
    assert describe_tasks()["asr"] == "speech recognition"
    for task, pool in pools().items():
        assert set(pool.tags) == {"start", "task", "instruction"}, task
        assert pool.tags["start"] in ("startoftranscript", "startofanalysis")
        assert pool.tags["task"] in ("transcribe", "translate", "caption", "keyword", "question")
        assert all(template.fields <= set(PLACEHOLDERS) for template in pool.prompts), task
        always = {"text_language", "text_language_name", *pool.needs}
        assert any(template.fields <= always for template in pool.prompts), f"{task} has no prompt that always fits"


def test_tag_tokens() -> None:
    assert tag_tokens(["en", "de"], "natural") == ["<|en|>", "<|de|>"]
    tags = tag_tokens(["en"], "hierarchical_tags")
    assert len(tags) == len(set(tags))
    assert {"<|en|>", "<|unknown|>", "<|question|>", "<|answer|>", "<|transcribe|>", "<|wo_itn|>"} <= set(tags)
