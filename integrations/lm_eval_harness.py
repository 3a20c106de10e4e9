"""A trained controller as a model of EleutherAI's lm-evaluation-harness (pip install lm-eval==0.4.13).

    python integrations/lm_eval_harness.py run --model crl --model_args run=runs/RUN --tasks arc_easy

The arguments are the harness's own, and so are tasks and prompts: with --apply_chat_template a chat model is
asked as a user would. crl_eval.py asks for a letter and reads the likeliest token; the harness compares
log-likelihoods of the options. With the same prompt and letters they agree.
"""

import re
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import crl_ppo  # noqa: E402
import crl_steer  # noqa: E402
import crl_tasks  # noqa: E402


@register_model("crl")
class CRL(HFLM):
    """The model of a run directory, under its policy."""

    def __init__(self, run=None, batch_size=8, device=None, max_batch_size=None, **kwargs):
        if not re.fullmatch(r"auto(:.*)?|0*[1-9][0-9]*", str(batch_size)):
            crl_ppo.hub.fail(f"--batch_size {batch_size}: give a number above 0, or auto for the run's own")
        if run is None:
            crl_ppo.hub.fail("--model_args run=runs/RUN is missing: give a run directory of crl_ppo.py")
        args = crl_ppo.stored_args(run)
        if device and not (device.startswith("cuda") and not torch.cuda.is_available()):
            args.device = device  # the harness asks for cuda:0 on any machine
        model, tok, _ = crl_ppo.load_model(args)
        tok = crl_tasks.fit_tokenizer(tok, args)  # chat or plain, thinking on or off, as in the training
        size = args.batch_size if str(batch_size).startswith("auto") else int(batch_size)
        super().__init__(pretrained=model, tokenizer=tok, backend="causal", batch_size=size, **kwargs)
        self.env, self.agent = crl_steer.load_controller(model, tok, run)
        self.open = crl_steer.steered(model, tok, (self.env, self.agent))
        self.log = self.open.__enter__()  # generate() is steered from here on

    @torch.no_grad()
    def forced(self, contexts, continuations):
        """[logits (T, V)] of the T tokens of each continuation after its context, lists of token ids.

        The policy steers as it would while the model writes them: what it reads at the (first) site does not
        hang on what is added there, so one forward pass does."""
        longest = max(map(len, continuations))
        prompts = []
        rows = []
        for context, said in zip(contexts, continuations, strict=True):
            prompt = crl_steer.prompt_of(self.env, context)
            prompts.append(prompt._replace(ids=context + said[:-1]))
            rows.append(prompts[-1].ids)
        padded = self.tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
        lengths = torch.tensor([len(said) for said in continuations])
        columns = torch.arange(longest) - lengths[:, None]  # (B, longest), from the end
        steering = crl_steer.Steering(self.env, self.agent, prompts)
        padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with crl_ppo.residual_hook(self.env.steered_layers, partial(steering.add, columns, 0)):
            logits = self.model(**padded.to(self.device), use_cache=False, logits_to_keep=longest).logits
        return [row[-len(said) :] for row, said in zip(logits, continuations, strict=True)]

    def _encode_pair(self, context, continuation):
        """As the harness does it, but a line break that ends the context stays there.

        The policy decides at the last token of the prompt, and chat templates end in one."""
        if not context.endswith("\n"):
            return super()._encode_pair(context, continuation)
        ids = self.tok_encode(context)
        return ids, self.tok_encode(context + continuation)[len(ids) :]

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        """[(log-likelihood, whether it is the greedy answer)] of requests (texts, context, continuation)."""
        found = {}
        size = override_bs or self.batch_size
        order = sorted(range(len(requests)), key=lambda n: len(requests[n][1]) + len(requests[n][2]))
        for start in tqdm(range(0, len(order), size), disable=disable_tqdm):
            part = order[start : start + size]
            said = [requests[n][2] for n in part]
            asked = [requests[n][1][-max(1, self.max_length + 1 - len(requests[n][2])) :] for n in part]
            for n, logits, ids in zip(part, self.forced(asked, said), said, strict=True):
                if not logits.amax(-1).isfinite().all():  # the harness would take the first option
                    text = (requests[n][0] or "?")[0][-60:]
                    crl_ppo.hub.fail(f"logits are not finite under steering after {text!r}; use float32")
                gold = torch.tensor(ids, device=logits.device)
                logp = F.log_softmax(logits.float(), -1).gather(1, gold[:, None])
                found[n] = (float(logp.sum()), bool((logits.argmax(-1) == gold).all()))
                if requests[n][0] is not None:  # a window of a rolling perplexity has no text
                    self.cache_hook.add_partial("loglikelihood", requests[n][0], found[n])
        return [found[n] for n in range(len(requests))]


if __name__ == "__main__":
    cli_evaluate()
