"""The model card of an export: read as the hub reads it, and against what lies beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen2audio_train.card import write_card
from qwen2audio_train.config.tools import ExportConfig
from qwen2audio_train.data.examples import Clip, TaskExample
from qwen2audio_train.data.manifests.record import to_record
from qwen2audio_train.evaluation.reporting.results import read_result
from qwen2audio_train.evaluation.scoring.evaluate import evaluation_of, save
from qwen2audio_train.export import export
from qwen2audio_train.families.known import DEFAULT
from tests.evaluation.tiny import SAMPLES, tiny_model, tiny_tokenizer
from tests.launch.scripts import script


def checkpoint(run: Path, stage: str, steps: int, start: str | None, **sources: Path) -> Path:
    """What a stage leaves behind, as `RunFiles` writes it; its weights are those of a tiny model."""
    folder = run / f"checkpoint-{steps}"
    folder.mkdir(parents=True)
    config = {
        "stage": stage,
        "name": f"{stage} of mine",
        "data": {"sources": {n: {"path": [str(p)]} for n, p in sources.items()}},
    }
    lineage = {
        "stage": stage,
        "world_size": 2,
        "start": start,
        "base": {"model.safetensors": "ab" * 32},
        "command": [f"launch/{stage}.py", "name=a b", "trainer.max_steps=3"],
        "config_sha256": "cd" * 32,
        "commit": "1234567",
        "versions": {"torch": "2.13.0"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "lineage.json").write_text(json.dumps(lineage))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": steps}))
    return folder


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    metas: list[dict[str, Any]] = [{"license": "CC0-1.0"}, {"license": "CC0-1.0"}, {"licence": "CC BY 4.0"}, {}]
    examples = [
        TaskExample(f"e{i}", Clip("a.wav", 1.0), "asr", "en", "cat", "mine", meta=m) for i, m in enumerate(metas)
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(to_record(example, tmp_path)) + "\n" for example in examples))
    return path


def test_the_card_says_what_is_beside_the_weights(tmp_path: Path, manifest: Path) -> None:
    first = checkpoint(tmp_path / "one", "pretrain", 20, None, speech=manifest)
    second = checkpoint(tmp_path / "two", "sft", 3, str(first / "model"), gone=tmp_path / "no.jsonl", more=manifest)
    for folder in (first, second):
        export(tiny_model(), tiny_tokenizer(), SAMPLES, folder / "model")
    examples = [
        TaskExample(f"t{i}", Clip("a.wav", 1.0), "asr", "en", "the cat sat", "librispeech_test_clean") for i in range(4)
    ]
    found = evaluation_of(examples, ["the cat sat"] * 3 + ["the mat sat"], {}, settings={}, bootstrap_samples=50)
    save(found, tmp_path / "two" / "evaluation")
    script("export").main(ExportConfig(str(second), str(tmp_path / "out")))
    card = (tmp_path / "out" / "README.md").read_text()

    _, head, body = card.split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert (metadata["library_name"], metadata["tags"]) == ("transformers", ["qwen2_audio"])
    (result,) = metadata["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "wer", "value": round(1 / 12, 6), "name": "reference/2"}]
    score = read_result("", tmp_path / "two" / "evaluation").rows[0].score
    assert f"| WER | 8.3 % | [{100 * score.low:.1f}, {100 * score.high:.1f}] | 4 |" in body
    assert "paper 1.6 %" in body
    assert "| reference/2 | librispeech_test_clean/1 |" in body
    assert "| pretrain | speech | by size | CC0-1.0 (2), CC BY 4.0 (1), not stated (1) |" in body
    assert "| sft | gone | by size | not stated (its manifest is no longer there) |" in body
    assert body.index("- **pretrain**: 20 steps") < body.index(f"- **sft**: 3 steps; from `{first / 'model'}`")
    assert "torchrun --nproc_per_node 2 launch/sft.py 'name=a b' trainer.max_steps=3\n" in body
    assert f"python launch/export.py checkpoint={second} output_dir={tmp_path / 'out'} merge=True" in body
    assert yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])["name"] == "sft of mine"


def test_weights_that_came_alone_have_a_card_that_says_so(tmp_path: Path) -> None:
    export(tiny_model(), tiny_tokenizer(), SAMPLES, tmp_path / "alone")
    card = write_card(tmp_path / "alone", str(tmp_path / "alone"), DEFAULT, ["python", "x"]).read_text()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "other"
    assert "None was found beside the weights" in card
    assert "Nothing beside the weights says what they were trained on." in card


def test_an_evaluation_that_is_named_and_is_not_there_is_an_error(tmp_path: Path) -> None:
    export(tiny_model(), tiny_tokenizer(), SAMPLES, tmp_path / "alone")
    with pytest.raises(ValueError, match=r"no metrics\.json here"):
        write_card(tmp_path / "alone", str(tmp_path / "alone"), DEFAULT, [], evaluation=str(tmp_path))
