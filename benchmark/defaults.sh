#!/usr/bin/env bash
# The figures behind the defaults (docs/results.md): whole runs with one flag changed, and PPO again, with others, on
# the tables of runs/learn that learn.sh has made (seed 1). Training and validation prompts only; resumable.
#   bash benchmark/defaults.sh DIR [runs] [replay]      DIR is the --data-dir mirror
# Then `python benchmark/summary.py runs/learn/*--*` makes a table of the runs.
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1; shift

with() {  # with FLAG VALUE TASK:SAMPLES: its run with seed 1, in runs/learn/TASK-SAMPLES--FLAGVALUE
  SEEDS=1 FLAGS="$1 $2" NAME="$1$2" bash benchmark/learn.sh "$data" "$3"
}

for part in ${@:-runs replay}; do
  case $part in
    runs)
      with --coef 0.5 bbq_ambig:400; with --coef 2 bbq_ambig:400
      with --observe 15 bbq_ambig:400; with --screen 1 bbq_ambig:400
      with --coef 0.5 mmlu:400; with --coef 1 mmlu:400  # the first is the default
      with --coef 1 xstest:200; FOLDS="0 1 2 3" with --features 1 xstest:200;;
    replay)
      for job in bbq_ambig-400 bbq_disambig-400 xstest-200 harmbench-100; do
        [ -d runs/learn/$job ] || continue
        echo "== $job"
        python benchmark/replay.py runs/learn/$job/*__1__* -- "" "updates=150, learning_rate=1e-3" \
          "updates=30, learning_rate=3e-4" "pool=2" "pool=4" "pool=8" "pool=16" "weight_decay=0.1" "hidden=16" \
          "epsilon=0.0" "group=16" "algo='grpo'"
      done;;
    *) echo "unknown part $part: runs or replay" >&2; exit 1;;
  esac
done
