"""Write a checkpoint for plain transformers, peft or a server:  python launch/export.py checkpoint=... output_dir=."""

from __future__ import annotations

from dataclasses import asdict
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from qwen2audio_train.card import write_card
from qwen2audio_train.cli.compose import launch
from qwen2audio_train.cli.door import check_file
from qwen2audio_train.config.schema import Dtype
from qwen2audio_train.config.tools import ExportConfig
from qwen2audio_train.data.examples import clips_of
from qwen2audio_train.data.manifests.manifest import read_manifest
from qwen2audio_train.errors import UserError
from qwen2audio_train.export import check_export, export, export_adapter, repeated
from qwen2audio_train.families.known import family_of
from qwen2audio_train.model.adapters import adapter_has_learnt
from qwen2audio_train.training.checkpoints.folder import weights_folder
from qwen2audio_train.training.stages.policy import load_for_inference

LONG_S = 31.0
"""Length of a clip beyond the stock processor's window of 30 s."""


def main(config: ExportConfig) -> None:
    if config.check_manifest is not None:
        check_file("check_manifest", config.check_manifest)
    found = weights_folder(config.checkpoint)
    if (Path(found) / "adapter_model.safetensors").is_file() and not adapter_has_learnt(found):
        raise UserError(f"checkpoint={found}: every B of the adapter is zero, so it changes nothing; was it trained?")
    # Merged in float32 whatever is written: bfloat16 would round the sum of weights and adapter twice.
    model, tokenizer, samples, caveats, base = load_for_inference(
        config.checkpoint, num_threads=config.num_threads, dtype=Dtype.float32, merge=config.merge
    )
    model = model.to(getattr(torch, config.dtype))
    if base is None:
        folder = export(model, tokenizer, samples, config.output_dir)
    else:
        folder, base = Path(config.output_dir), export_adapter(model, tokenizer, samples, config.output_dir, base)
        model = load_for_inference(str(folder), num_threads=config.num_threads, dtype=config.dtype, merge=False).model
    given = [f"{key}={value}" for key, value in asdict(config).items() if value is not None]
    command = ["python", "launch/export.py", *given]
    write_card(folder, found, family_of(samples.family), command, evaluation=config.evaluation)
    print(f"exported to {folder}" + (f", an adapter on {base}" if base else ""))
    print("".join(f"note: {caveat}\n" for caveat in caveats), end="")
    if config.check_manifest is None:
        return
    examples = list(islice(read_manifest(config.check_manifest), config.check_examples))
    if not examples:
        raise UserError(f"check_manifest={config.check_manifest}: holds no example to check the export with")
    with TemporaryDirectory() as made:
        # Servers and processors have stumbled over clips beyond their window: one is always among those compared.
        heard = next((example for example in examples if clips_of(example)), None)
        examples += [repeated(heard, samples, LONG_S, Path(made))] if heard is not None else []
        different = check_export(folder, model, tokenizer, samples, examples, base=base)
    for name, ours, stock in different:
        print(f"{name}: {ours!r} by our path, {stock!r} by the stock classes")
    if different and config.dtype == "float32":
        raise UserError(f"{len(different)} of {len(examples)} texts differ in float32, where they have to be the same")
    print(f"{len(examples) - len(different)} of {len(examples)} texts are the same by the stock classes")


if __name__ == "__main__":
    launch(main, "export", ExportConfig)
