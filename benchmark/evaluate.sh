#!/usr/bin/env bash
# The test figures of docs/results.md: all runs of a job of learn.sh in one evaluation, its numbers in benchmark/results.
# CRL beside few-shot, the best constant, a probe and LoRA, on its own task and on every other one of the kind.
#   bash benchmark/evaluate.sh [JOB ...]      reports go to runs/eval/JOB; FLAGS="--conditions ..." changes what is done
# Resumable. INTO=samples keeps evaluations of another kind apart, in runs/samples and benchmark/results/samples.
set -euo pipefail
cd "$(dirname "$0")/.."
into=${INTO:-eval}
usual="--resume --conditions unsteered crl constant_best probe_switch few_shot sft_lora"
mkdir -p "benchmark/results/$into"
for job in ${@:-$(ls runs/learn)}; do
  python crl_eval.py --run runs/learn/"$job"/*__* --out "runs/$into/$job" ${FLAGS:-$usual}
  cp "runs/$into/$job/summary.json" "benchmark/results/$into/$job.json"
done
