#!/usr/bin/env bash
# Accuracy on test against labelled samples: CRL beside fine-tuning (LoRA) on the same prompts and what is cheaper, on 450
# test prompts (ids, and so their order, are hashes). At 100 samples and at the most but 2000 also what each loses on every
# other task of the kind. few_shot shows at most four samples, whatever their number. Resumable; some twenty hours on two
# cores, LoRA above all, and some nine with SEEDS=1 instead of 1 2 3.
#   bash benchmark/samples.sh DIR [TASK:SAMPLES ...]      DIR is the --data-dir mirror (harmbench takes the wheel's rows)
# Trains with learn.sh, evaluates with evaluate.sh, draws docs/samples.png with figures.py.
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1; shift
[ $# -gt 0 ] || set -- bbq_ambig:{25,50,100,200,400} bbq_disambig:{25,50,100,200,400,2000} xstest:{25,50,100,200} \
  harmbench:{25,50,100}

for job in "$@"; do
  rows=$data seeds=${SEEDS:-1 2 3} folds=0 tasks="--tasks none"
  conditions="unsteered crl constant_best probe_switch few_shot sft_lora"
  case $job in
    xstest:100) folds="0 1 2 3" ;;  # what a run loses elsewhere varies most here
    xstest:*) seeds=1 folds="0 1 2 3" ;;
    harmbench:*) rows="" ;;
  esac
  case $job in
    *:100 | bbq*:400 | xstest:200) tasks="" ;;
  esac
  SEEDS=$seeds FOLDS=$folds bash benchmark/learn.sh "$rows" "$job"
  FLAGS="--resume --test-samples 450 $tasks --conditions $conditions" INTO=samples bash benchmark/evaluate.sh "${job/:/-}"
done
python benchmark/figures.py samples
