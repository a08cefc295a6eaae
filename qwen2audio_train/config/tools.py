"""The roots of `evaluate.yaml` and `export.yaml`: what is done with a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from qwen2audio_train.config.bounds import at_least
from qwen2audio_train.config.data import MAX_SEED
from qwen2audio_train.config.schema import Dtype


@dataclass
class EvaluateConfig:
    """Root of `evaluate.yaml`: a checkpoint, the manifests that it is scored on, and how it decodes.

    Attributes:
        checkpoint: hub id, released checkpoint, run folder, checkpoint or adapter.
        manifests: held-out manifest per name.
        pairs: preference manifest on which pair accuracy is measured.
        train_manifests: training manifests whose words count as seen, and whose labels give the majority class.
        output_dir: where `metrics.json`, `table.txt` and the decoded texts go.
        seed: of the confidence intervals, and of sampling.
        max_examples: only so many examples of each source, evenly from all of it; 0 takes all.
        max_new_tokens: longest answer in tokens.
        tokens_per_batch: prompt and answer tokens of a batch while decoding.
        temperature: of sampling an answer, which depends on `seed` and on the example, not on its batch; 0 is greedy.
        top_p: nucleus that is sampled from.
        num_threads: CPU threads of each rank; 0 leaves torch's choice.
        bootstrap_samples: resamples behind each confidence interval.
        label_likelihood: score closed sets also by which of their answers is the likeliest.
        listening: ask everything again under silence and under another example's clip, as further rows of the table.
        sample, dtype: fields of the checkpoint's `SampleRecipe`, and the type of its weights, where they are to differ.
    """

    checkpoint: str = MISSING
    manifests: dict[str, str] = field(default_factory=dict)
    pairs: str | None = None
    train_manifests: list[str] = field(default_factory=list)
    output_dir: str = MISSING
    seed: int = at_least(0, 0, MAX_SEED)
    max_examples: int = at_least(0, 0)
    max_new_tokens: int = at_least(1, 256)
    tokens_per_batch: int = at_least(1, 8192)
    temperature: float = at_least(0, 0.0)
    top_p: float = at_least(0.01, 1.0, 1)
    num_threads: int = at_least(0, 0)
    bootstrap_samples: int = at_least(1, 1000)
    label_likelihood: bool = False
    listening: bool = False
    sample: dict[str, Any] = field(default_factory=dict)
    dtype: Dtype | None = None


@dataclass
class ExportConfig:
    """Root of `export.yaml`: what to export, where to, and recordings on which the export is compared with our path.

    Attributes:
        checkpoint: run folder, checkpoint or adapter.
        output_dir: folder that plain transformers (or peft) reads afterwards.
        merge: add an adapter's weights to its base; a server that cannot adapt the audio tower needs it.
        dtype: type of the weights that are written.
        check_manifest: manifest whose first `check_examples` are decoded by both paths and have to agree, and one more,
            repeated to 31 s; of clips over 30 s both hear the first 30 s, as the stock processor does.
        check_examples: how many examples of `check_manifest` are compared.
        evaluation: folder of `launch/evaluate.py` whose scores stand in the model card; unset, that of the checkpoint
            or of its run, if there is one.
        num_threads: CPU threads; 0 leaves torch's choice.
    """

    checkpoint: str = MISSING
    output_dir: str = MISSING
    merge: bool = True
    dtype: Dtype = Dtype.float32
    check_manifest: str | None = None
    check_examples: int = at_least(1, 8)
    evaluation: str | None = None
    num_threads: int = at_least(0, 0)
