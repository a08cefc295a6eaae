from __future__ import annotations

import json

from qwen2audio_train.evaluation.reporting.stage_record import choose_showcase, read_stage, save_stage, stage_table
from qwen2audio_train.evaluation.reporting.summary import RunSummary
from qwen2audio_train.evaluation.scoring.bootstrap import Score
from qwen2audio_train.evaluation.scoring.evaluate import Evaluation
from qwen2audio_train.evaluation.scoring.likelihood import PairScores
from qwen2audio_train.evaluation.scoring.score import Row


def lines(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_stage_is_read_as_it_was_saved(tmp_path):
    rows = (Row("asr_en", "asr", "en", "", Score("wer", 0.25, 0.2, 0.3, 8)),)
    result = Evaluation(rows, {"asr_en": {"loss": 1.0}}, (), {}, ("a caveat",), {}, 4.0)
    pairs = {
        name: PairScores(Score("pair_accuracy", x, 0, 1, 9), Score("margin", 1, 0, 2, 9))
        for name, x in (("own", 0.9), ("swapped", 0.5))
    }
    save_stage(result, pairs, tmp_path)
    stage, caveats = read_stage(tmp_path, "dpo", wall_s=60.0, steps=5)
    assert (stage.wall_s, stage.steps, stage.evaluate_s, caveats) == (60.0, 5, 4.0, ["a caveat"])
    found = {(m.source, m.kind, m.metric): m.value for m in stage.metrics}
    assert found["asr_en", "", "wer"] == 0.25
    assert found["pairs", "", "pair_accuracy"] == 0.9
    assert found["pairs", "swapped", "pair_accuracy"] == 0.5
    table = stage_table(RunSummary("run", 1.0, (stage,)))
    assert "25.0 % [20.0, 30.0]" in table


def test_every_task_is_shown_before_one_is_shown_twice(tmp_path):
    tasks = ["asr_en asr", "asr_de asr", "asr_zh asr", "sec sec", "chat analysis"]
    examples, decoded = [], []
    for name in ("1", "2"):
        for source, task in (pair.split() for pair in tasks):
            example = {"id": f"{source}{name}", "source": source}
            if source == "chat":
                content = [{"type": "audio", "audio": "a.wav"}, {"type": "text", "text": "Who?"}]
                answer = {"role": "assistant", "content": "a man."}
                example |= {"messages": [{"role": "user", "content": content}, answer], "mode": "analysis"}
            else:
                example |= {"audio": "a.wav", "task": task, "language": "en", "target": "a man."}
            examples.append(example)
            decoded.append({"id": example["id"], "task": task, "reference": "a man.", "text": f"heard {name}"})
    manifest = lines(tmp_path / "dev.jsonl", examples)
    folders = {stage: lines(tmp_path / stage / "texts.jsonl", decoded).parent for stage in ("pretrain", "sft")}
    chosen = choose_showcase(folders, [manifest], most=4)
    assert [entry.id for entry in chosen] == ["asr_en1", "asr_de1", "sec1", "chat1"]
    assert chosen[0].texts == {"pretrain": "heard 1", "sft": "heard 1"}
    assert chosen[0].reference == "a man."
    assert chosen[-1].question == "Who?"
