#!/usr/bin/env bash
# The test figures of docs/results.md: all runs of a job of learn.sh in one evaluation, its numbers in benchmark/results.
#   bash benchmark/evaluate.sh [JOB ...]      reports go to runs/eval/JOB; FLAGS="--conditions ..." changes the conditions
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p benchmark/results/eval
for job in ${@:-$(ls runs/learn)}; do
  python crl_eval.py --run runs/learn/"$job"/*__* --out "runs/eval/$job" ${FLAGS:---conditions unsteered crl}
  cp "runs/eval/$job/summary.json" "benchmark/results/eval/$job.json"
done
