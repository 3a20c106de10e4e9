"""What the screening finds under other flags of crl_ppo.py: its one line and its seconds, no training.

    python benchmark/screening.py --task harmbench --samples 100 -- "coef=(1.4,), features=2" "steer_tokens=0"
"""
import ast
import dataclasses
import sys
import time
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import crl_ppo as crl  # noqa: E402


def flags(text):
    """"a=1, b=(2,)" -> {"a": 1, "b": (2,)}; literals only."""
    call = ast.parse(f"f({text})", mode="eval").body
    return {k.arg: ast.literal_eval(k.value) for k in call.keywords}


def command_line():
    """(Args before a --, texts after it or one empty text)."""
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    return tyro.cli(crl.Args, args=sys.argv[1:cut]), sys.argv[cut + 1:] or [""]


if __name__ == "__main__":
    base, texts = command_line()
    for text in texts:
        args, start = dataclasses.replace(base, **flags(text)), time.time()
        lm, actions, prompts, _ = crl.set_up(args)
        crl.screen(lm, actions, args, prompts["train"],
                   lambda line: print(f"{text or 'defaults'}: {line} ({time.time() - start:.0f} s)", flush=True))
