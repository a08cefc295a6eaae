"""Write a checkpoint for plain transformers, peft or a server:  python launch/export.py checkpoint=... output_dir=."""

from __future__ import annotations

from itertools import islice

from qwen2audio_train.cli.compose import launch
from qwen2audio_train.cli.door import check_file
from qwen2audio_train.config.tools import ExportConfig
from qwen2audio_train.data.manifests.manifest import read_manifest
from qwen2audio_train.errors import UserError
from qwen2audio_train.export import check_export, export, heard_whole
from qwen2audio_train.training.stages.policy import load_for_inference


def main(config: ExportConfig) -> None:
    if config.check_manifest is not None:
        check_file("check_manifest", config.check_manifest)
    model, tokenizer, samples, caveats, base = load_for_inference(
        config.checkpoint, num_threads=config.num_threads, dtype=config.dtype, merge=config.merge
    )
    folder = export(model, tokenizer, samples, config.output_dir, base=base)
    print(f"exported to {folder}" + (f", an adapter on {base}" if base else ""))
    print("".join(f"note: {caveat}\n" for caveat in caveats), end="")
    if config.check_manifest is None:
        return
    known = read_manifest(config.check_manifest)
    examples = list(islice(heard_whole(known, samples), config.check_examples))
    if not examples:
        reason = "every example has a clip over 30 s, of which the stock processor hears the first 30 s alone"
        raise UserError(f"check_manifest={config.check_manifest}: {reason}; name one with shorter clips")
    different = check_export(folder, model, tokenizer, samples, examples, base=base)
    for name, ours, stock in different:
        print(f"{name}: {ours!r} by our path, {stock!r} by the stock classes")
    if different and config.dtype == "float32":
        raise UserError(f"{len(different)} of {len(examples)} texts differ in float32, where they have to be the same")
    print(f"{len(examples) - len(different)} of {len(examples)} texts are the same by the stock classes")


if __name__ == "__main__":
    launch(main, "export", ExportConfig)
