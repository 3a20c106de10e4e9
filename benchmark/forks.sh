#!/usr/bin/env bash
# The README's three forks, made by replacing text and run: bash benchmark/forks.sh DIR [reward] [mask] [policy]
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1; shift
forks=runs/forks
trap 'rm -rf $forks/src' EXIT

fork() {  # fork FILE FROM TO: a copy of the scripts with one text of FILE replaced; fails where that text has changed
  rm -rf $forks/src; mkdir -p $forks/src; cp crl_*.py $forks/src; ln -s "$PWD/sae" $forks/src/sae
  python - "$forks/src/$1" "$2" "$3" << 'PY'
import sys
path, old, new = sys.argv[1:]
text = open(path).read()
assert text.count(old) == 1, f"{path} has {text.count(old)} times {old!r}"
open(path, "w").write(text.replace(old, new))
PY
}

for name in ${@:-reward mask policy}; do
  case $name in
  reward) fork crl_tasks.py 'is_refusal(text) == (row["answer"] == "unsafe"))' 'is_refusal(text))'; run=(xstest --samples 50) ;;
  mask) fork crl_ppo.py '    weight, chosen = torch.ones(len(reward)), []' \
    '    return reward.mean(0).topk(min(size, reward.shape[1])).indices.tolist()
    weight, chosen = torch.ones(len(reward)), []'; run=(bbq_ambig --samples 400) ;;
  policy) fork crl_ppo.py '        self.policy[-1].bias.data[-1]' '        self.policy = nn.Sequential(layer_init(nn.Linear(d, P), std=0.01))
        self.policy[-1].bias.data[-1]'; run=(bbq_ambig --samples 400) ;;
  esac
  python $forks/src/crl_ppo.py --task "${run[@]}" --data-dir "$data" --model smollm2-135m --run-dir $forks/"$name"
done
