#!/usr/bin/env bash
# The runs behind the README's results: 3 seeds a task on the embedded model, then their table.
#   bash benchmark/learn.sh DIR [TASK:SAMPLES...]      DIR is the --data-dir mirror; runs go to runs/learn
# truthfulqa and harmbench take their rows from the PyPI wheels. SEEDS="1 2" and FLAGS="--afm none" change the runs, and
# NAME=-afm-none keeps them apart. xstest was run in each of the four folds, fold 0 under its own name:
#   bash benchmark/learn.sh DIR xstest:50; SEEDS=1 bash benchmark/learn.sh DIR xstest:200
#   for k in 1 2 3; do SEEDS=1 NAME=-folds FLAGS="--fold $k" bash benchmark/learn.sh DIR xstest:50 xstest:200; done
# with xstest's earlier defaults, one feature a push or two and the dictionary not screened, it was run like this:
#   PLAIN="--features-per-token 1 --screen False --updates 150 --explore-fraction 0.7"
#   TWO="--features-per-token 2 --screen False --updates 150 --explore-fraction 0.7"
#   NAME=-plain FLAGS="$PLAIN" bash benchmark/learn.sh DIR xstest:50 xstest:200
#   NAME=-two-features FLAGS="$TWO" bash benchmark/learn.sh DIR xstest:50
#   for k in 1 2 3; do
#     SEEDS=1 NAME=-two-features-folds FLAGS="$TWO --fold $k" bash benchmark/learn.sh DIR xstest:50
#     SEEDS=1 NAME=-plain-folds FLAGS="$PLAIN --fold $k" bash benchmark/learn.sh DIR xstest:200
#   done
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1; shift
for job in ${@:-bbq_ambig:400 bbq_disambig:2000 truthfulqa:4000 mmlu:4000 xstest:50 xstest:200 harmbench:100}; do
  name=${job%%:*}; samples=${job#*:}
  mirror=(--data-dir "$data")
  case $name in truthfulqa|harmbench) mirror=() ;; esac
  for seed in ${SEEDS:-1 2 3}; do
    python crl_ppo.py --task "$name" --samples "$samples" --seed "$seed" "${mirror[@]}" --model smollm2-135m \
      --dtype bfloat16 --run-dir "runs/learn/$name-$samples${NAME:-}" --table-every 0 ${FLAGS:-}
  done
done
python benchmark/summary.py runs/learn/*
