#!/bin/bash
# A whole recipe as a chain of jobs, each started when the one before has finished well (exit status 0):
#   launch/slurm/chain.sh NAME [sbatch options] -- [key=value for every stage ...]
# pretrain, sft and dpo by default; STAGES="sft dpo" chooses. Each job starts from the run folder of the one before, and is
# requeued by itself until it is at its end. INIT_FROM= is what the first stage starts from.
set -euo pipefail

name=${1:?usage: launch/slurm/chain.sh NAME [sbatch options] -- [key=value ...]}
shift
options=()
while [ $# -gt 0 ] && [ "$1" != "--" ]; do
    options+=("$1")
    shift
done
[ "${1:-}" = "--" ] && shift

before=${INIT_FROM:-}
dependency=()
for stage in ${STAGES:-pretrain sft dpo}; do
    keys=("name=$name-$stage" "run_dir=runs/$name/$stage")
    [ -n "$before" ] && keys+=("init_from=$before")
    job=$(sbatch --parsable --job-name="$name-$stage" "${dependency[@]}" "${options[@]}" \
        "$(dirname "$0")/$stage.sbatch" "${keys[@]}" "$@")
    echo "$stage: job ${job%%;*}, run folder runs/$name/$stage"
    dependency=("--dependency=afterok:${job%%;*}" "--kill-on-invalid-dep=yes")
    before=runs/$name/$stage
done
