#!/usr/bin/env bash
# Transfer: trained without one category of BBQ, tested on that one alone, CRL beside LoRA; and the runs of learn.sh on
# one of bbq_ambig and bbq_disambig applied to the other. Resumable; many hours. SEEDS as in learn.sh.
#   bash benchmark/transfer.sh DIR [TASK:SAMPLES ...]      default: bbq_ambig:400 bbq_disambig:400
# Rows without the category are the train split (15 % of it, by template, for validation), its own are the test split.
# Reports go to runs/transfer, their numbers to benchmark/results/transfer.
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1; shift
python - "$data" <<'PYTHON'
import json, sys
from pathlib import Path
rows = [json.loads(line) for path in sorted(Path(sys.argv[1], "bbq").glob("*.jsonl")) for line in path.open()]
for left_out in sorted({row["category"] for row in rows}):
    out = Path("runs/transfer-data", left_out, "bbq")
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        part = [row for row in rows if (row["category"] == left_out) == (split == "test")]
        (out / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
PYTHON
conditions="--resume --conditions unsteered crl constant_best probe_switch sft_lora"
for job in ${@:-bbq_ambig:400 bbq_disambig:400}; do
  for rows in runs/transfer-data/*; do
    NAME=-without-$(basename "$rows") bash benchmark/learn.sh "$PWD/$rows" "$job"
    FLAGS="$conditions --tasks none --test-samples 600" \
      INTO=transfer bash benchmark/evaluate.sh "${job/:/-}-without-$(basename "$rows")"
  done
  bash benchmark/learn.sh "$data" "$job"
  case $job in bbq_ambig:*) other=bbq_disambig ;; *) other=bbq_ambig ;; esac
  FLAGS="$conditions --test-samples 450 --tasks $other" INTO=transfer bash benchmark/evaluate.sh "${job/:/-}"
done
