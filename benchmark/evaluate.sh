#!/usr/bin/env bash
# The test figures of docs/results.md: all runs of a job of learn.sh in one evaluation, its numbers in benchmark/results.
#   bash benchmark/evaluate.sh [JOB ...]      reports go to runs/eval/JOB; FLAGS="--conditions ..." changes the conditions
# INTO=samples keeps evaluations of another kind apart, in runs/samples and benchmark/results/samples.
set -euo pipefail
cd "$(dirname "$0")/.."
into=${INTO:-eval}
mkdir -p "benchmark/results/$into"
for job in ${@:-$(ls runs/learn)}; do
  python crl_eval.py --run runs/learn/"$job"/*__* --out "runs/$into/$job" ${FLAGS:---conditions unsteered crl}
  cp "runs/$into/$job/summary.json" "benchmark/results/$into/$job.json"
done
