#!/usr/bin/env bash
# The evaluations behind the README's table on the test split: all seeds of a task that learn.sh trained, in one run.
#   bash benchmark/evaluate.sh [TASK-SAMPLES...]       reports go to runs/eval/TASK-SAMPLES; FLAGS adds to the flags
set -euo pipefail
cd "$(dirname "$0")/.."
for job in ${@:-bbq_ambig-400 bbq_disambig-2000 truthfulqa-4000 mmlu-4000 xstest-50-folds xstest-200-folds \
            xstest-50-two-features-folds xstest-200-plain xstest-200-plain-folds harmbench-100}; do
  runs=(runs/learn/"$job"/*)
  case $job in
    *-folds) runs+=(runs/learn/"${job%-folds}"/*__1__*) ;;&  # fold 0 of seed 1; goes on to the flags of its task
    bbq_ambig-*) flags="--test-samples 200 --oracle-prompts 8" ;;
    xstest-50*|xstest-200-folds) flags="--sft lora --sft-epochs 15 --oracle-prompts 16" ;;  # stops early
    xstest-*|harmbench-*) flags="--sft lora --sft-epochs 3 --oracle-prompts 16" ;;
    mmlu-*) flags="--test-samples 200 --train-samples 100 --constant-prompts 8 --oracle-prompts 4" ;;
    simpleqa-*) flags="--test-samples 100 --train-samples 100 --oracle-prompts 8" ;;
    *) flags="--oracle-prompts 8" ;;
  esac
  python crl_eval.py --run "${runs[@]}" $flags --out "runs/eval/$job" ${FLAGS:-}
done
