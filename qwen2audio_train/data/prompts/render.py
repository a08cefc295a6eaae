"""From an example to what the model reads: text pieces and clips, with the border of the labels. No tokenizer here.

The layout is the family's; with Qwen2-Audio's: task form, in the base model's style (no ChatML):

    <|audio_bos|> CLIP <|audio_eos|>Detect the language and recognize the speech: [<|en|>hello<|endoftext|>]

Chat and preference form, in ChatML as the published template writes it (what is labelled stands in brackets):

    <|im_start|>system\nYou are a helpful assistant.<|im_end|>\n
    <|im_start|>user\nAudio 1: <|audio_bos|> CLIP <|audio_eos|>\nWhat is said?<|im_end|>\n
    <|im_start|>assistant\n[Hello.<|im_end|>]\n
"""

from __future__ import annotations

from dataclasses import dataclass
from string import Formatter

from qwen2audio_train.config.data import LabelledTurns, PromptStyle, Timestamps
from qwen2audio_train.data.examples import (
    NO_MARK,
    ChatExample,
    Clip,
    Example,
    Message,
    PreferenceExample,
    TaskExample,
    UnpairedExample,
    clips_of,
    mark_in,
    task_of,
)
from qwen2audio_train.data.prompts.pools import PromptTemplate, choose_prompt, prompt_fields
from qwen2audio_train.data.prompts.timestamps import LAST_TOKEN_S, timestamp_token
from qwen2audio_train.errors import ExampleError
from qwen2audio_train.families.family import Family
from qwen2audio_train.families.known import DEFAULT


@dataclass(frozen=True)
class Text:
    """Text of a sample. In `is_markup` text special tokens count as such; in any other they are plain characters."""

    text: str
    is_label: bool = False
    is_markup: bool = False


Piece = Text | Clip


@dataclass(frozen=True)
class Rendered:
    """A sample as pieces. `branches` are the answers of a preference example, chosen first or alone, all label;
    `transcript` is what is said in its only clip, where that is the task; `family` is whose layout it has."""

    id: str
    source: str
    task: str
    trunk: tuple[Piece, ...]
    branches: tuple[tuple[Text, ...], ...] = ()
    transcript: str = ""
    family: Family = DEFAULT

    @property
    def clips(self) -> tuple[Clip, ...]:
        return tuple(piece for piece in self.trunk if isinstance(piece, Clip))


def render(
    example: Example,
    *,
    prompt_style: PromptStyle = PromptStyle.natural,
    seed: int = 0,
    prompts_per_task: int | None = None,
    labelled_turns: LabelledTurns = LabelledTurns.all,
    timestamps: Timestamps = Timestamps.text,
    for_generation: bool = False,
    family: Family = DEFAULT,
    template: PromptTemplate | None = None,
) -> Rendered:
    """Lay out one example as its family's models read it.

    Args:
        template: prompt of a task example, instead of the one that style, seed and pool choose.

    With `for_generation` only the prompt: the task form with the first prompt of its pool (and the answer's known
    prefix), a chat without its last assistant message and with the generation prompt, a preference without answers.

    Raises:
        ExampleError: a chat to be learnt from has no assistant message; a time that no token has; a text holds a mark,
            such as `<audio>` or `<|im_end|>`, for what is not there or comes from here. Manifest lines are refused for
            it where they are read; this is for examples that were never a line.
    """
    if template is None and isinstance(example, TaskExample):
        template = choose_prompt(example, prompt_style, seed, 1 if for_generation else prompts_per_task)
    rendered = _laid_out(example, template, labelled_turns, timestamps, for_generation, family)
    for piece in (*rendered.trunk, *(piece for branch in rendered.branches for piece in branch)):
        if isinstance(piece, Text) and not piece.is_markup and (mark := mark_in(piece.text)):
            raise ExampleError(f'example "{example.id}": expected {NO_MARK}; found {mark!r} in {piece.text[:60]!r}')
    return rendered


def _laid_out(
    example: Example,
    template: PromptTemplate | None,
    labelled_turns: LabelledTurns,
    timestamps: Timestamps,
    for_generation: bool,
    family: Family,
) -> Rendered:
    if isinstance(example, TaskExample):
        assert template is not None
        answer = () if for_generation else (*_task_answer(example, timestamps), Text(family.text_end, True, True))
        trunk = _task_question(example, template, for_generation, family) + answer
        transcript = example.target if example.task == "asr" else ""
        return Rendered(example.id, example.source, example.task, trunk, (), transcript, family)
    if isinstance(example, PreferenceExample | UnpairedExample):
        trunk = (*_chat_pieces(example.prompt, (), family), _generation_prompt(family))
        answers = () if for_generation else _answers(example)
        branches = tuple((Text(answer, True), Text(family.turn_end, True, True)) for answer in answers)
        return Rendered(example.id, example.source, task_of(example), trunk, branches, family=family)
    trunk = _chat_example_pieces(example, labelled_turns, for_generation, family)
    return Rendered(example.id, example.source, task_of(example), trunk, family=family)


def rendered_text(rendered: Rendered, branch: int | None = None) -> str:
    """The sample as one string, one audio token per clip: what the published chat template gives."""
    pieces = rendered.trunk if branch is None else rendered.trunk + rendered.branches[branch]
    return "".join(piece.text if isinstance(piece, Text) else rendered.family.audio_token for piece in pieces)


def _answers(example: PreferenceExample | UnpairedExample) -> tuple[str, ...]:
    return (example.chosen, *example.rejected) if isinstance(example, PreferenceExample) else (example.completion,)


def _generation_prompt(family: Family) -> Text:
    return Text(family.turn_head.format(role="assistant"), is_markup=True)


def _task_question(
    example: TaskExample, template: PromptTemplate, for_generation: bool, family: Family
) -> tuple[Piece, ...]:
    fields = prompt_fields(example)
    prompt = _filled(template.prompt, fields, is_label=False)
    prefix = _filled(template.answer_prefix, fields, is_label=not for_generation)
    before, after = (Text(markup, is_markup=True) for markup in family.clip)
    clips = tuple(piece for clip in clips_of(example) for piece in (before, clip, after))
    return clips + prompt + prefix


def _task_answer(example: TaskExample, timestamps: Timestamps) -> tuple[Text, ...]:
    """The target; its times as markup where they are to be tokens."""
    if not example.spans or timestamps is Timestamps.text:
        return (Text(example.target, True),)
    if (latest := max(span.end_s for span in example.spans)) > LAST_TOKEN_S:
        raise ExampleError(
            f'example "{example.id}": a span ends at {latest:g} s, and there are tokens for times up to '
            f"{LAST_TOKEN_S:g} s; cut the clip, or set data.timestamps=text"
        )
    pieces = []
    for span in example.spans:
        start, end = timestamp_token(span.start_s), timestamp_token(span.end_s)
        pieces += [Text(start, True, True), Text(span.text, True), Text(end, True, True)]
    return tuple(pieces)


def _filled(template: str, fields: dict[str, str], is_label: bool) -> tuple[Text, ...]:
    """The template's pieces: its own words and language tags are markup, a question is the user's text."""
    pieces: list[Text] = []
    markup = ""
    for literal, name, _, _ in Formatter().parse(template):
        markup += literal
        if name == "question":
            pieces += [Text(markup, is_label, True), Text(fields[name], is_label)]
            markup = ""
        elif name:
            markup += fields[name]
    return tuple(piece for piece in (*pieces, Text(markup, is_label, True)) if piece.text)


def _chat_example_pieces(
    example: ChatExample, turns: LabelledTurns, for_generation: bool, family: Family
) -> tuple[Piece, ...]:
    messages = example.messages
    if for_generation:
        if messages[-1].role == "assistant":
            messages = messages[:-1]
        return (*_chat_pieces(messages, (), family), _generation_prompt(family))
    answers = tuple(index for index, message in enumerate(messages) if message.role == "assistant")
    if not answers:
        raise ExampleError(
            f'example "{example.id}": no assistant message to learn from; add one, or use it for evaluation'
        )
    return _chat_pieces(messages, answers if turns == LabelledTurns.all else answers[-1:], family)


def _chat_pieces(messages: tuple[Message, ...], labelled: tuple[int, ...], family: Family) -> tuple[Piece, ...]:
    """The chat of the published template; the messages whose indices are in `labelled` are what is learnt."""
    pieces: list[Piece] = []
    num_clips = 0
    if messages[0].role != "system" and family.system_prompt is not None:
        head = family.turn_head.format(role="system")
        pieces.append(Text(f"{head}{family.system_prompt}{family.turn_end}{family.turn_tail}", is_markup=True))
    for index, message in enumerate(messages):
        is_label = index in labelled
        pieces.append(Text(family.turn_head.format(role=message.role), is_markup=True))
        for part in message.content:
            if isinstance(part, Clip):
                num_clips += 1
                before, after = family.chat_clip
                pieces += [Text(before.format(number=num_clips), is_markup=True), part, Text(after, is_markup=True)]
            else:
                pieces.append(Text(part, is_label))
        pieces += [Text(family.turn_end, is_label, True), Text(family.turn_tail, is_markup=True)]
    return tuple(pieces)
