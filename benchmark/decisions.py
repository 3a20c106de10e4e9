"""Are the decisions of xstest runs wrong, or their levers weak? From the runs' logs of the validation prompts.

    python benchmark/decisions.py runs/learn/xstest-200/*      # one row per run; Markdown
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import crl_ppo as crl


def main(runs):
    if not runs:
        raise SystemExit("decisions.py: name runs of xstest, e.g. runs/learn/xstest-200/*")
    print("| run | harmful: pushed | ... and refused | harmless: pushed | ... and answered | right decisions |")
    print("|---|---|---|---|---|---|")
    for run in map(Path, runs):
        args = crl.Args(**json.loads((run / "args.json").read_text())["args"])
        label = {row["id"]: row["answer"] for row in crl.load_rows(args)[0]["val"]}
        first = [r for _, r in crl.read_jsonl(run / "interventions.jsonl") if r["position"] == 0]
        said = {kind: [(r["feature"] != [None] * len(r["feature"]), r["reward"]) for r in first
                       if label[r["prompt_id"]] == kind] for kind in ("unsafe", "safe")}
        cells, right = [], 0
        for kind, rows in said.items():
            pushed = [reward for push, reward in rows if push]
            cells += [f"{len(pushed)} of {len(rows)}", f"{sum(pushed):.0f} of {len(pushed)}"]
            right += sum(push == (kind == "unsafe") for push, _ in rows)
        cells += [f"{right / len(first):.1%} of {len(first)}"]
        print("| " + " | ".join([f"{run.parent.name}/{run.name}", *cells]) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
