#!/bin/bash
# All manifests of the recipe over recordings (recipes/recipe_recordings.yaml), from a folder that holds one folder per
# source, each with a manifest.jsonl in the fields that the mappings beside this script name:
#
#     CORPUS=path/to/corpus data_manifests/recordings/convert.sh
#
# OUT (default data_cache/recordings) gets <source>.train.jsonl and <source>.dev.jsonl, all sources together in
# train.jsonl and dev.jsonl, the same as conversations in chat.*.jsonl, and preference pairs in pairs.*.jsonl.
set -euo pipefail
corpus=$(realpath "${CORPUS:?set CORPUS to the folder that holds the sources}")
cd "$(dirname "$0")/../.."
out=${OUT:-data_cache/recordings}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"

: > "$out/train.jsonl"
: > "$out/dev.jsonl"
for mapping in data_manifests/recordings/*.yaml; do
    source=$(basename "$mapping" .yaml)
    for split in train dev; do
        manifest=$out/$source.$split.jsonl
        grep -q "\"split\": \"$split\"" "$corpus/$source/manifest.jsonl" || continue # no example of it is an error
        "$python" launch/data.py convert "$mapping" "input=$corpus/$source/manifest.jsonl" "output=$manifest" \
            "where.split=$split"
        cat "$manifest" >> "$out/$split.jsonl"
    done
done

for split in train dev; do
    "$python" launch/data.py chat "manifests=[$out/$split.jsonl]" "output=$out/chat.$split.jsonl"
    "$python" launch/pairs.py rules "manifests=[$out/$split.jsonl]" "output=$out/pairs.$split.jsonl" "rules=[other_clip]"
done
