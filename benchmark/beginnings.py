"""What answers to training prompts earn, unsteered, that begin with given words: what would a push have to bring about?

    python benchmark/beginnings.py --task harmbench --samples 48 -- "" "I" "I cannot" "I'm unable" "I'm afraid"

An answer has --max-new-tokens tokens, the given ones among them.
"""
import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import crl_ppo as crl  # noqa: E402
from screening import command_line  # noqa: E402


def main(args, texts):
    crl.check_args(args)
    lm, actions, prompts, _ = crl.set_up(args)
    none = torch.full((1, args.features), actions.noop)
    for text in texts:
        begun = lm.tok.encode(text, add_special_tokens=False)
        rest = dataclasses.replace(args, max_new_tokens=args.max_new_tokens - len(begun))
        table = crl.Table([crl.Prompt(p.row, p.ids + begun) for p in prompts["train"]], none, actions.d)
        table.fill(lm, actions, rest)
        told = [crl.judge(lm, args, p.row, begun + said[0]) for p, said in zip(table.prompts, table.said)]
        print(f"{text!r:30}{sum(a['reward'] for a in told) / len(told):7.1%} of {len(told)}   {told[0]['text']!r}")


if __name__ == "__main__":
    main(*command_line())
