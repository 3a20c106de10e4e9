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

from crl_model import Prompt, begin, hooked, load_model, logits_of, prefill
from crl_ppo import stored_args
from crl_steer import load_controller, steered


@register_model("crl")
class CRL(HFLM):
    """The model of a run directory, under its policy."""

    def __init__(self, run, batch_size=8, device=None, max_batch_size=None, **kwargs):
        args = stored_args(run)
        args.device = device or args.device
        lm = load_model(args)
        super().__init__(
            pretrained=lm.model,
            tokenizer=lm.tok,
            backend="causal",
            batch_size=1 if batch_size == "auto" else int(batch_size),
            **kwargs,
        )
        self.own = load_controller(lm.model, lm.tok, run)
        self.open = steered(lm.model, lm.tok, self.own)  # generate() is steered from here on
        self.log = self.open.__enter__()

    @torch.no_grad()
    def forced(self, contexts, continuations):
        """[logits (T, V)] of the T tokens of each continuation after its context (lists of token ids), as the policy
        steers the model there."""
        own, lm, T = self.own, self.own.lm, max(map(len, continuations))
        full = [Prompt({}, c + said[:-1]) for c, said in zip(contexts, continuations)]
        columns = (
            torch.arange(T) - torch.tensor([len(said) for said in continuations])[:, None]
        )  # (B, T), from the end
        rows, steps = torch.arange(len(full)), [t for t in range(T) if own.acts(t)]
        if own.args.decide == "once":
            _, xs, _, _ = prefill(
                lm, own.layers, [Prompt({}, ids) for ids in contexts], own.args.observe_options
            )
            made = [own.choose(xs, 0)]
        else:
            made = []

            def look(i, h):  # what the site gives out hangs on no push, since pushes come after it
                made.extend(
                    own.choose({own.sites[0]: h[rows, columns[:, t].clamp(max=-1)]}, t) for t in steps
                )
                return h

            with hooked(lm, own.sites[:1], look):
                logits_of(lm, *begin(lm, full), 1)

        def edit(i, h):
            h = h.clone()
            for t in steps:
                here = rows[columns[:, t] < 0]  # of rows that have a token t
                x, push = h[here, columns[here, t]], own.push(made[min(t, len(made) - 1)], t)[here]
                h[here, columns[here, t]] = x + own.actions.added(i, x, push.to(lm.device)).to(h.dtype)
            return h

        with hooked(lm, own.sites, edit):
            logits = logits_of(lm, *begin(lm, full), T)
        return [row[-len(said) :] for row, said in zip(logits, continuations)]

    def _encode_pair(self, context, continuation):
        """As the harness does it, but a line break that ends the context, as in chat templates, stays there: the policy
        decides at the last token of the prompt."""
        if not context.endswith("\n"):
            return super()._encode_pair(context, continuation)
        ids = self.tok_encode(context)
        return ids, self.tok_encode(context + continuation)[len(ids) :]

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        """[(log-likelihood, whether it is the greedy answer)] of requests (texts, context ids, continuation ids)."""
        out, size = {}, override_bs or self.batch_size
        order = sorted(range(len(requests)), key=lambda n: len(requests[n][1]) + len(requests[n][2]))
        for start in tqdm(range(0, len(order), size), disable=disable_tqdm):
            part = order[start : start + size]
            said = [requests[n][2] for n in part]
            asked = [requests[n][1][-max(1, self.max_length + 1 - len(requests[n][2])) :] for n in part]
            for n, logits, ids in zip(part, self.forced(asked, said), said):
                gold = torch.tensor(ids, device=logits.device)
                logp = F.log_softmax(logits.float(), -1).gather(1, gold[:, None])
                out[n] = float(logp.sum()), bool((logits.argmax(-1) == gold).all())
                if requests[n][0] is not None:  # a window of a rolling perplexity has no text
                    self.cache_hook.add_partial("loglikelihood", requests[n][0], out[n])
        return [out[n] for n in range(len(requests))]


if __name__ == "__main__":
    cli_evaluate()
