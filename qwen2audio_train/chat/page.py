"""The page: Gradio's components around `conversation`. The one file that knows Gradio."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before it is imported; the page calls nobody

import gradio as gr

from qwen2audio_train.chat.conversation import Conversation, Mode, Talker, answers, spectrogram, user_turn
from qwen2audio_train.data.examples import Clip, Message
from qwen2audio_train.errors import UserError
from qwen2audio_train.evaluation.decoding.generate import Decoding

Said = dict[str, Conversation]
"""What every talker has heard and answered."""

PICTURE = '<img alt="spectrogram of the recording" src="{}" style="width: 100%; height: 110px; border-radius: 6px">'
FONT = ["system-ui", "sans-serif"]


def build_page(talkers: Mapping[str, Talker], decoding: Decoding) -> gr.Blocks:
    """The page for these talkers, each in a column of its own; nothing on it comes from elsewhere."""
    with gr.Blocks(title="qwen2audio_train") as page:
        said, clips = gr.State(dict.fromkeys(talkers, ())), gr.State([])
        with gr.Row():
            boxes = [
                gr.Chatbot(label=name, height=380, buttons=["copy"], elem_id=f"talker-{number}")
                for number, name in enumerate(talkers)
            ]
        mode = gr.Radio([mode.value for mode in Mode], value=Mode.voice_chat.value, label="mode")
        with gr.Row():
            with gr.Column():
                audio = gr.Audio(
                    sources=["microphone", "upload"], type="filepath", label="recording", elem_id="recording"
                )
                picture = gr.HTML(elem_id="spectrogram")
            with gr.Column():
                text = gr.Textbox(label="question (audio analysis)", lines=2, elem_id="question")
                held = gr.Markdown(elem_id="held")
                with gr.Row():
                    send, more, clear = (gr.Button(name) for name in ("Send", "Add another clip", "New conversation"))

        def shown(path: str | None) -> str:
            return PICTURE.format(spectrogram(path)) if path else ""

        def hold(path: str | None, earlier: list[str]) -> tuple[None, list[str], str]:
            kept = [*earlier, path] if path else earlier
            return None, kept, f"{len(kept)} clip(s) held for the next question"

        def talk(mode: str, path: str | None, earlier: list[str], text: str, said: Said) -> Iterator[Any]:
            for now in told(talkers, said, Mode(mode), [*earlier, *([path] if path else [])], text, decoding):
                yield now, [], "", None, "", *(messages(now[name]) for name in talkers)

        outputs = [said, clips, held, audio, text, *boxes]
        audio.change(shown, audio, picture)
        more.click(hold, [audio, clips], [audio, clips, held])
        inputs: Any = [mode, audio, clips, text, said]
        gr.on([send.click, text.submit], talk, inputs, outputs)
        clear.click(lambda: (dict.fromkeys(talkers, ()), [], "", None, "", *([] for _ in boxes)), None, outputs)
    return page


def told(
    talkers: Mapping[str, Talker], said: Said, mode: Mode, clips: list[str], text: str, decoding: Decoding
) -> Iterator[Said]:
    """The conversation of every talker with the user's turn and the answer so far.

    What the user can mend is shown on the page, and the conversation stays as it was.
    """
    try:
        turn = user_turn(mode, clips, text)
        asked = {name: (*said[name], turn) for name in talkers}
        yield asked
        for texts in answers(talkers, asked, decoding):
            yield {name: (*asked[name], Message("assistant", (texts[name],))) for name in talkers}
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from error


def messages(said: Conversation) -> list[dict[str, Any]]:
    """A conversation as the chat box takes it: recordings to be played, texts as they are."""
    return [
        {"role": message.role, "content": {"path": part.path} if isinstance(part, Clip) else part}
        for message in said
        for part in message.content
    ]


def serve(talkers: Mapping[str, Talker], decoding: Decoding, host: str, port: int, *, block: bool = True) -> str:
    """Serve the page; returns its address where it does not block."""
    page = build_page(talkers, decoding)
    theme = gr.themes.Default(font=FONT, font_mono=["ui-monospace", "monospace"])
    _, address, _ = page.queue().launch(
        server_name=host, server_port=port or None, prevent_thread_lock=not block, theme=theme, quiet=not block
    )
    return str(address)
