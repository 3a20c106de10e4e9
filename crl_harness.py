"""A trained controller as a model of EleutherAI's lm-evaluation-harness (pip install lm-eval; tested with 0.4.13).

    python crl_harness.py run --model crl --model_args run=runs/RUN --tasks hellaswag --batch_size 8

The arguments are the harness's own, and so are tasks and prompts: with --apply_chat_template a chat model is asked as a
user would, without it in plain text. crl_eval.py asks a chat model to "Answer with the letter only." and reads the
likeliest token; the harness compares log-likelihoods of the options. With the same prompt and letters they agree.
"""
import torch
import torch.nn.functional as F
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from crl_model import Prompt, begin, hooked, load_model, prefill
from crl_ppo import decide, stored_args
from crl_steer import load_controller, steered


@register_model("crl")
class CRL(HFLM):
    """The model of a run directory, under its policy."""

    def __init__(self, run, batch_size=8, device=None, max_batch_size=None, **kwargs):
        args = stored_args(run)
        args.device = device or args.device
        lm = load_model(args)
        super().__init__(pretrained=lm.model, tokenizer=lm.tok, backend="causal",
                         batch_size=1 if batch_size == "auto" else int(batch_size), **kwargs)
        self.parts = load_controller(lm.model, lm.tok, run)
        self.open = steered(lm.model, lm.tok, run)  # generate() is steered from here on
        self.log = self.open.__enter__()

    @torch.no_grad()
    def forced(self, contexts, continuations):
        """[logits (T, V)] of the T tokens of each continuation after its context (lists of token ids), as the policy
        steers the model there."""
        args, lm, actions, agent = self.parts
        sites, T = [s.layer for s in actions.sites], max(map(len, continuations))
        asked = [Prompt({}, ids) for ids in contexts]
        full = [Prompt({}, c + said[:-1]) for c, said in zip(contexts, continuations)]
        columns = torch.arange(T) - torch.tensor([len(said) for said in continuations])[:, None]  # (B, T)
        steps = torch.arange(T) if args.decide == "token" else torch.arange(1)
        steps = steps[:args.steer_tokens or None]
        if args.decide == "once":
            _, xs, _, _ = prefill(lm, sorted({*sites, args.observe}), asked)
            read = {layer: x[:, None] for layer, x in xs.items()}  # (B, 1, d)
        else:  # what the site gives out hangs on no push, since pushes come after it
            read = {}

            def look(i, h):
                read[sites[0]] = torch.stack([h.gather(1, (columns[:, t].clamp(max=-1) % h.shape[1]).to(h.device)
                                              [:, None, None].expand(-1, 1, h.shape[2]))[:, 0] for t in steps], 1)
                return h
            with hooked(lm, sites[:1], look):
                self.run(lm, full, 1)
        made = []  # pushes (B, k) of each decision
        for t in steps.tolist():
            x = {layer: v[:, t] for layer, v in read.items()}
            mask = actions.active([x[layer] for layer in sites]) if args.afm == "active" else None
            made.append(agent.pushes[decide(agent, x[args.observe], mask, min(t, 1))["push"]].to(lm.device))

        def edit(i, h):
            h, rows = h.clone(), torch.arange(len(h))
            for t in range(T):
                if not args.steer_tokens or t < args.steer_tokens:
                    here = rows[columns[:, t] < 0]  # of rows that have a token t
                    at = h.shape[1] + columns[here, t]
                    push = actions.acting(made[min(t, len(made) - 1)], t)[here]
                    h[here, at] += actions.added(i, h[here, at], push).to(h.dtype)
            return h
        with hooked(lm, sites, edit):
            logits = self.run(lm, full, T)
        return [row[-len(said):] for row, said in zip(logits, continuations)]

    @staticmethod
    def run(lm, prompts, keep):
        """Logits (B, keep, V) at the last tokens of prompts."""
        ids, mask, cache = begin(lm, prompts)
        position = (mask.cumsum(1) - 1).clamp(min=0)
        return lm.model(ids, attention_mask=mask, position_ids=position, past_key_values=cache,
                        logits_to_keep=keep).logits

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        """[(log-likelihood, whether it is the greedy answer)] of requests (texts, context ids, continuation ids)."""
        out, size = {}, override_bs or self.batch_size
        order = sorted(range(len(requests)), key=lambda n: len(requests[n][1]) + len(requests[n][2]))
        for start in tqdm(range(0, len(order), size), disable=disable_tqdm):
            part = order[start:start + size]
            said = [requests[n][2] for n in part]
            asked = [requests[n][1][-max(1, self.max_length + 1 - len(requests[n][2])):] for n in part]
            for n, logits, ids in zip(part, self.forced(asked, said), said):
                gold = torch.tensor(ids, device=logits.device)
                logp = F.log_softmax(logits.float(), -1).gather(1, gold[:, None])
                out[n] = float(logp.sum()), bool((logits.argmax(-1) == gold).all())
                self.cache_hook.add_partial("loglikelihood", requests[n][0], out[n])
        return [out[n] for n in range(len(requests))]


if __name__ == "__main__":
    cli_evaluate()
