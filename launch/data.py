"""Manifests: make them, look through them, look at one example.

    python launch/data.py convert [mapping.yaml] input=table.csv output=train.jsonl columns.target=sentence ...
    python launch/data.py chat    manifests=[train.jsonl] output=chat.jsonl
    python launch/data.py quiet   output=quiet.jsonl number=500
    python launch/data.py check   manifests=[train.jsonl] against=[test.jsonl]
    python launch/data.py index   manifests=[train.jsonl] tokenizer=runs/pretrain/checkpoint-1000/model
    python launch/data.py stats   manifests=[train.jsonl] image=lengths.png
    python launch/data.py shard   manifests=[train.jsonl] output=shards shard_mib=512
    python launch/data.py visualize recipe=pretrain "overrides=['data=mine']"
    python launch/data.py show    manifest=train.jsonl example=utt-0001 image=mel.png

`launch/data.py COMMAND --help` lists the keys of a command; a YAML file may hold any of them, and keys on the command
line win. After Ctrl-C convert, check, index and shard go on where they stopped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from qwen2audio_train.cli.commands import Commands, run_command
from qwen2audio_train.cli.compose import compose
from qwen2audio_train.config.schema import ConfigError, StageConfig
from qwen2audio_train.data.tools.chat import ChatOptions, write_chats
from qwen2audio_train.data.tools.check import CheckOptions, check, summary
from qwen2audio_train.data.tools.convert import ConvertOptions, convert
from qwen2audio_train.data.tools.mixture_tree import mixture_tree, tree_text
from qwen2audio_train.data.tools.quiet import QuietOptions, write_quiet
from qwen2audio_train.data.tools.shards import ShardOptions, write_shards
from qwen2audio_train.data.tools.show import ShowOptions, show
from qwen2audio_train.data.tools.stats import (
    IndexOptions,
    VisualizeOptions,
    draw_histogram,
    histogram_table,
    index_sizes,
    index_sources,
    indexes_of,
    stats_of,
    stats_table,
)


def run_convert(options: ConvertOptions) -> int:
    result = convert(options)
    for error in result.errors[:20]:
        print(error, file=sys.stderr)
    if len(result.errors) > 20:
        print(f"and {len(result.errors) - 20} more", file=sys.stderr)
    if result.errors and not options.skip_bad:
        print(f"nothing was written: {len(result.errors)} bad rows (skip_bad=true leaves them out)", file=sys.stderr)
        return 1
    print(f"{options.output}: {result.written} examples, {len(result.errors)} rows left out")
    return 0


def run_chat(options: ChatOptions) -> int:
    require_manifests(options.manifests)
    print(f"{options.output}: {write_chats(options)} conversations")
    return 0


def run_quiet(options: QuietOptions) -> int:
    print(f"{options.output}: {write_quiet(options)} recordings of nothing")
    return 0


def run_check(options: CheckOptions) -> int:
    require_manifests([*options.manifests, *options.sources])
    checked = check(options)
    print(summary(checked, options.max_shown))
    if options.report is not None:
        findings = [asdict(finding) for one in checked for finding in one.findings]
        Path(options.report).write_text(json.dumps(findings, indent=1, ensure_ascii=False), encoding="utf-8")
    return 1 if any(one.num_errors for one in checked) else 0


def run_index(options: IndexOptions) -> int:
    if options.tokenizer is None:
        raise ConfigError("tokenizer: no value was given; token counts need the tokenizer that training uses")
    print("\n".join(index_sizes(index_sources(options))))
    return 0


def run_stats(options: IndexOptions) -> int:
    indexes = index_sources(options)
    stats = {name: stats_of(index) for name, index in indexes.items()}
    print(stats_table(stats), histogram_table(stats), sep="\n\n")
    if options.image is not None:
        draw_histogram(indexes, options.image)
    return 0


def run_visualize(options: VisualizeOptions) -> int:
    config = compose(options.recipe, options.overrides, StageConfig)
    if streams := [name for name, source in config.data.sources.items() if source.streaming]:
        raise ConfigError(f"data.sources.{streams[0]}.streaming: a stream has no index that tells its size")
    if not config.data.sources:
        raise ConfigError("data.sources is empty: choose the data of the recipe, overrides=['data=...']")
    indexes = indexes_of(config.data, options.tokenizer, config.model.family, where="data.sources")
    print(tree_text(mixture_tree(config.data, indexes)))
    return 0


def run_shard(options: ShardOptions) -> int:
    result = write_shards(options)
    for bad in result.bad[:20]:
        print(f"{bad.example}: {bad.reason}", file=sys.stderr)
    size = result.num_bytes / 2**20
    print(
        f"{options.output}: {result.num_shards} shards, {result.num_examples} examples, {size:.1f} MiB, "
        f"{len(result.bad)} examples left out"
    )
    return 1 if result.bad else 0


def run_show(options: ShowOptions) -> int:
    print(show(options, colour=sys.stdout.isatty()))
    return 0


def require_manifests(manifests: Sequence[str]) -> None:
    if not manifests:
        raise ConfigError("manifests: no value was given; set manifests=[train.jsonl]")


COMMANDS: Commands = {
    "convert": (ConvertOptions, run_convert),
    "chat": (ChatOptions, run_chat),
    "quiet": (QuietOptions, run_quiet),
    "check": (CheckOptions, run_check),
    "index": (IndexOptions, run_index),
    "stats": (IndexOptions, run_stats),
    "shard": (ShardOptions, run_shard),
    "visualize": (VisualizeOptions, run_visualize),
    "show": (ShowOptions, run_show),
}


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0, 1 where the data has errors, 2 where the command line has, 130 after Ctrl-C."""
    return run_command(COMMANDS, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
