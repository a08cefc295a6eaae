"""Text for the synthesiser, sampled from a language model.

    python launch/texts.py sentences language_model=FOLDER output=sentences.txt    open vocabulary, one a line
    python launch/texts.py questions language_model=FOLDER output=questions.jsonl  with the model's own greedy answers

qwen2audio_train/selfmade/texts holds what it made from SmolLM2-135M-Instruct; another machine rounds otherwise, and its
texts are others. The keys are the fields of TextOptions.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen2audio_train.cli.commands import Commands, run_command
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.selfmade.texts import STYLES, SYSTEM, TOPICS, answer_of, sentences_of

BATCH = 64

MOST_ALIKE = 2
"""What is answered to more questions than this says nothing of what was asked."""


@dataclass
class TextOptions:
    """Where the language model is, where its text goes, and how much is sampled.

    Attributes:
        language_model: folder or hub id of the model that writes.
        output: file to write.
        seed: of sampling.
        requests: so many requests (a style, a topic) are put to the model; each is answered by one text.
        max_new_tokens: longest text in tokens.
        max_answer_tokens: longest answer to a question.
        temperature: of sampling.
        top_p: nucleus that is sampled from.
        num_threads: CPU threads; 0 leaves torch's choice.
    """

    language_model: str = "parts/smollm2_135m_instruct"
    output: str = ""
    seed: int = 0
    requests: int = 400
    max_new_tokens: int = 220
    max_answer_tokens: int = 32
    temperature: float = 0.85
    top_p: float = 0.95
    num_threads: int = 0


def run_sentences(options: TextOptions) -> int:
    return write(options, sampled(Writer(options), "sentences"))


def run_questions(options: TextOptions) -> int:
    writer = Writer(options)
    return write(options, writer.answered([text for text in sampled(writer, "questions") if text.endswith("?")]))


def sampled(writer: Writer, kind: str) -> list[str]:
    """The different sentences of all texts of a kind."""
    return list(dict.fromkeys(part for text in writer.texts(kind) for part in sentences_of(text)))


def write(options: TextOptions, lines: Sequence[str]) -> int:
    Path(options.output).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{options.output}: {len(lines)} lines")
    return 0


class Writer:
    """A language model that writes what it is asked for."""

    def __init__(self, options: TextOptions) -> None:
        if not options.output:
            raise ConfigError("output: no value was given; set output=...")
        if options.num_threads:
            torch.set_num_threads(options.num_threads)
        self.options = options
        self.tokenizer = AutoTokenizer.from_pretrained(options.language_model, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(options.language_model, dtype=torch.bfloat16).eval()

    def texts(self, kind: str) -> list[str]:
        """A sampled text for each of the requests."""
        options = self.options
        requests = [style.format(topic) for topic in TOPICS for style in STYLES[kind]]
        random.Random(options.seed).shuffle(requests)
        torch.manual_seed(options.seed)
        drawn = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
        prompts = [turn("user", request) for request in requests[: options.requests]]
        return self._write(prompts, max_new_tokens=options.max_new_tokens, **drawn)

    def answered(self, questions: Sequence[str]) -> list[str]:
        """Lines of JSON: the questions that the model answers in a short sentence of their own, and that answer."""
        prompts = [turn("system", SYSTEM) + turn("user", question) for question in questions]
        texts = self._write(prompts, max_new_tokens=self.options.max_answer_tokens, do_sample=False)
        answers = [answer_of(text) for text in texts]
        times = Counter(answers)
        return [
            json.dumps({"question": question, "answer": answer}, ensure_ascii=False)
            for question, answer in zip(questions, answers, strict=True)
            if answer and times[answer] <= MOST_ALIKE
        ]

    def _write(self, prompts: Sequence[str], **drawn: Any) -> list[str]:
        texts: list[str] = []
        for start in tqdm(range(0, len(prompts), BATCH), disable=None):
            ready = [prompt + "<|im_start|>assistant\n" for prompt in prompts[start : start + BATCH]]
            batch = self.tokenizer(ready, return_tensors="pt", padding=True)
            with torch.inference_mode():
                ids = self.model.generate(**batch, pad_token_id=self.tokenizer.pad_token_id, **drawn)
            texts += self.tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
        return texts


def turn(role: str, text: str) -> str:
    """A turn of ChatML, without the default system prompt that the chat template would add."""
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


COMMANDS: Commands = {"sentences": (TextOptions, run_sentences), "questions": (TextOptions, run_questions)}


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0, or 2 where the command line is wrong."""
    return run_command(COMMANDS, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
