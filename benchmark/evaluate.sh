#!/usr/bin/env bash
# The evaluations behind the README's table on the test split: all seeds of a task that learn.sh trained, in one run.
#   bash benchmark/evaluate.sh [TASK-SAMPLES...]       reports go to runs/eval/TASK-SAMPLES; FLAGS adds to the flags
set -euo pipefail
cd "$(dirname "$0")/.."
for job in ${@:-bbq_ambig-400 bbq_disambig-2000 truthfulqa-4000 xstest-50 xstest-200 harmbench-100}; do
  case $job in
    bbq_ambig-*) flags="--test-samples 200 --oracle-prompts 8" ;;
    xstest-*|harmbench-*) flags="--sft lora --sft-epochs 3 --oracle-prompts 16" ;;
    *) flags="--oracle-prompts 8" ;;
  esac
  python crl_eval.py --run runs/learn/"$job"/* $flags --out "runs/eval/$job" ${FLAGS:-}
done
