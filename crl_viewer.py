"""What viewer.html shows of a run: cards of its features, and its prompts, replayed token by token.

analyze_features.py calls it; `lab` is its Lab. The page is viewer_template.html with the data as JSON.
"""

import math
import re
from contextlib import contextmanager, suppress
from pathlib import Path

import jinja2
import numpy as np
import torch
from tqdm import tqdm

import crl_ppo as ppo
from crl_draw import finite
from crl_tasks import hub

OUTCOMES = ("corrected", "misguided", "right", "wrong")  # against the unsteered model; right, wrong: both are
READ = 64  # prompts on which features' activations are read
TIE = {"float32": 0.01}  # nats by which rounding may change a log-probability; half precision: 0.5


@contextmanager
def watched(model, look):
    """While open, look(module, inputs, output) is called after the model's forward
    pass."""
    handle = model.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


# --- cards of features ---
class Read(Exception):
    """Ends a forward pass once what was wanted of it is read."""


@torch.no_grad()
def activations(env, site, ids, texts):
    """[(tokens - 1, features)] of lists of token ids: how active features `ids` are, first token aside.

    Padding stands on the right, where no token sees it; the layers above the site are not run."""
    seen = []

    def look(_, h):  # (B, tokens, d)
        seen.append(h)
        raise Read

    found = {}
    order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
    starts = range(0, len(order) if ids else 0, 16)
    for start in tqdm(starts, desc="activations", leave=False, delay=2):
        rows = order[start : start + 16]
        some = {"input_ids": [texts[n] for n in rows]}
        padded = env.tok.pad(some, padding_side="right", return_tensors="pt").to(env.device)
        with suppress(Read), ppo.residual_hook([env.layers[site.layer]], look):
            env.decoder(padded.input_ids, use_cache=False)
        for n, h in zip(rows, seen.pop(), strict=True):
            x = h[1 : len(texts[n])]
            if site.sae is None:
                every = x.float() @ site.directions.T.to(x.device)
            else:
                every = site.sae.to(x.device).encode(x.to(site.sae.W_dec.dtype)).float()
            found[n] = every[:, ids].clamp(min=0).cpu()
    return [found[n] for n in range(len(texts))] if ids else []


def corpus_contexts(env, site, ids):
    """{feature: up to three of its contexts in features.jsonl, as [text, activation] of every token}."""
    texts = []
    owners = []
    for feature in ids:
        for context in site.names.get(feature, {}).get("contexts", ())[:3]:
            texts.append(env.tok(re.sub("[«»]", "", context["text"]))["input_ids"])
            owners.append(feature)
    texts = [text for text in texts if text]
    found = {}
    for feature, text, acts in zip(owners, texts, activations(env, site, ids, texts), strict=True):
        own = [0.0, *acts[:, ids.index(feature)].tolist()]
        words = [env.tok.decode([token]) for token in text]
        found.setdefault(feature, []).append([list(pair) for pair in zip(words, own, strict=True)])
    return found


def own_contexts(env, acts):
    """Up to five strongest contexts of a feature in the run's prompts, as [text, activation] of every token.

    acts [(tokens - 1,)]: its activations at all tokens but the first."""
    found = []
    for n in sorted(range(len(acts)), key=lambda n: -acts[n].max().item())[:5]:
        best = int(acts[n].argmax())
        ids = env.prompts[n].ids[1:]
        around = range(max(0, best - 10), min(len(ids), best + 6))
        if acts[n][best] > 0:
            found.append([[env.tok.decode([ids[t]]), acts[n][t].item()] for t in around])
    return found


def promoted(env, site, ids):
    """{feature: {"promoted", "suppressed": tokens; "promoted_logits", "suppressed_logits"}}.

    It is what the direction adds to the logits straight through the last norm, up to a factor."""
    head = env.model.get_output_embeddings()
    inside = set(env.layers.modules())
    norms = [m for m in env.model.modules() if "norm" in type(m).__name__.lower() and m not in inside]
    own = site.directions[ids].to(head.weight)
    logits = (norms[-1](own) - norms[-1](torch.zeros_like(own))) @ head.weight.T  # (n, V)
    found = {}
    for feature, row in zip(ids, logits.float(), strict=True):
        found[feature] = {}
        for key, sign in (("promoted", 1), ("suppressed", -1)):
            best = (sign * row).topk(8).indices.tolist()
            found[feature][key] = [env.tok.decode([token]) for token in best]
            found[feature][f"{key}_logits"] = row[best].tolist()
    return found


def neighbours(site, ids):
    """{feature: the five directions nearest to it, as [number, name, cosine]}."""
    near = (site.directions[ids] @ site.directions.T).topk(min(6, len(site.directions)))
    found = {}
    for feature, others, cosines in zip(ids, near.indices.tolist(), near.values.tolist(), strict=True):
        found[feature] = []
        for other, cosine in zip(others, cosines, strict=True):
            if other != feature:
                name = site.names.get(other, {}).get("name", "")
                found[feature].append([other, name, cosine])
    return found


@torch.no_grad()
def cards(lab, wanted):
    """What the features `wanted` {(layer, number)} are: tokens, activations, contexts, neighbours."""
    env = lab.env
    found = []
    for site in lab.sites:
        ids = sorted(feature for layer, feature in wanted if layer == site.layer)
        tokens = promoted(env, site, ids)
        near = neighbours(site, ids)
        corpus = corpus_contexts(env, site, ids)
        acts = activations(env, site, ids, [prompt.ids for prompt in env.prompts[:READ]])
        page = str(site.sae.cfg.metadata.neuronpedia_id) if site.sae is not None else ""
        has_page = re.fullmatch(r"[\w.-]+/[\w.-]+", page)
        for j, feature in enumerate(ids):
            own_acts = [part[:, j] for part in acts]
            values = torch.cat(own_acts)
            top = max(1e-6, values.max().item())
            counts, _ = np.histogram(values[values > 0], bins=10, range=(0, top))
            row = site.names.get(feature, {})
            card = {"layer": site.layer, "feature": feature, "name": row.get("name", "")}
            card |= {"dictionary": site.name, "hash": site.hash} | tokens[feature]
            card |= {"tokens": len(values), "active": counts.sum(), "density": counts.sum() / len(values)}
            card |= {"density_corpus": row.get("density"), "top": top, "histogram": counts.tolist()}
            card |= {"contexts": own_contexts(env, own_acts), "corpus": corpus.get(feature, [])}
            card |= {"neighbours": near[feature][:5]}
            card["url"] = f"https://www.neuronpedia.org/{page}/{feature}" if has_page else None
            found.append(card)
    return found


# --- the page ---
@torch.no_grad()
def replay(lab):
    """{(n, column, t): (top, at)} of the log's answers: column 0 steered as they were, column 1 unsteered.

    top: the five likeliest next tokens there as (token, log-probability); at: the log-probabilities of the
    logged token and unsteered_token. One pass in batches like the run's own: after each token the logged one
    takes the place of the model's."""
    env = lab.env
    T = lab.args.decisions
    width = int(lab.log["position"].max()) + 1
    end = next(iter(env.eos), 0)
    tokens = torch.full((len(lab.val), 2, width + 1), end)
    actions = torch.full((len(lab.val), 2, T), env.noop)
    for n, part in lab.log.groupby("n"):
        tokens[n, 0, : len(part)] = torch.tensor(part["token"].tolist())
        tokens[n, 1, : len(part)] = torch.tensor(part["unsteered_token"].tolist())
        own = lab.picks[n]
        actions[n, 0, : len(own)] = torch.tensor(own)
    tokens = tokens.clamp(min=0)
    batch = {}
    found = {}

    def choose(x, t, rows, columns):
        if t == 0:
            batch.update(rows=rows, columns=columns, t=0)
        return actions[rows][:, columns, t]

    def look(module, inputs, output):  # logits (B, G, V) after the model's pass
        rows = batch["rows"]
        columns = batch["columns"]
        t = min(batch["t"], width)
        logprobs = output.logits.float().log_softmax(-1).cpu()
        best = logprobs.topk(min(5, logprobs.shape[-1]))
        at = logprobs.gather(-1, tokens[rows][:, None, :, t].expand(-1, len(columns), -1))
        for i, n in enumerate(rows.tolist()):
            for g, column in enumerate(columns.tolist()):
                top = zip(best.indices[i, g].tolist(), best.values[i, g].tolist(), strict=True)
                found[n, column, batch["t"]] = (list(top), at[i, g].tolist())
        logged = tokens[rows][:, :1, t, None].to(output.logits.device).expand(-1, len(columns), -1)
        output.logits = torch.zeros_like(output.logits).scatter_(-1, logged, 1.0)
        batch["t"] += 1

    with watched(env.model, look):
        env.generate(lab.val, choose, 2)
    return found


def compared(lab, logged, at, top):
    """None where the replay says what was logged; else [logged, its probability, the replay's, its
    probability, whether they are a tie within rounding].

    at: log-probability of the logged token; top: [(token, log-probability)], likeliest first."""
    best, value = top[0]
    if logged < 0 or best == logged:
        return None
    texts = [lab.env.tok.decode([token]) for token in (logged, best)]
    tie = bool(value - at <= TIE.get(lab.args.dtype, 0.5))
    return [texts[0], math.exp(at), texts[1], math.exp(value), tie]


def view_tokens(lab, n, replayed):
    """The tokens of prompt n's answer as the page shows them; replayed: replay()."""
    shown = []
    for t, line in enumerate(lab.log[lab.log["n"] == n].to_dict("records")):
        token = {key: line[key] for key in ("decided", "value", "logprob", "entropy", "mask_size")}
        token |= {"text": line["token_text"], "plain": line["unsteered_token_text"], "others": []}
        token["next"] = []
        token["differs"] = []
        for column, key in enumerate(("token", "unsteered_token")):  # steered, unsteered
            top, at = replayed[n, column, t]
            token["next"].append([[lab.env.tok.decode([other]), math.exp(p)] for other, p in top])
            token["differs"].append(compared(lab, line[key], at[column], top))
        token["effect"] = replayed[n, 0, t][1][0] - replayed[n, 1, t][1][0]
        token["action"] = line["action"] if line["steering"] or line["decided"] else None
        if line["decided"]:
            token["others"] = [list(pair) for pair in lab.likeliest(n, t)[:3]]
        shown.append(token)
    return shown


def view_prompt(lab, n, run, replayed, said_by):
    """Prompt n as the page shows it: the run's own stored answers, and what was said under every action."""
    prompt = lab.val[n]
    row = prompt.row
    at = int(lab.at[n])
    options = [f"{chr(65 + j)}. {choice}" for j, choice in enumerate(row["choices"] or ())]
    answer = lab.answers.iloc[n]
    plain = lab.env.completions[at][lab.env.noop]
    shown = {"run": run, "id": row["id"], "prompt": "\n".join([row["prompt"], *options])}
    shown["gold"] = options[row["answer"]] if options else row["answer"]
    shown["outcome"] = OUTCOMES.index(answer["outcome"])
    shown["reward"] = [answer["reward"], answer["unsteered_reward"]]
    shown["plain"] = lab.env.tok.decode(plain, skip_special_tokens=True)
    shown["tokens"] = view_tokens(lab, n, replayed)
    shown["says"] = [said_by[name].get(prompt.row["id"]) for name in lab.names]  # per action of the mask
    shown["rewards"] = lab.env.memo[at].tolist()
    return shown


def add_run(lab, found, table, classes, data):
    """Adds a run to the page's data; returns at how many tokens the replay says otherwise than the run.

    found: the result of `features`; table: said_table(); classes: of answers. Features and actions are a
    run's own: the cards show its prompts."""
    run = len(data["runs"])
    first = len(data["actions"])  # number of the run's first action
    about = {"name": lab.name, "task": lab.args.task, "model": lab.identity["model"]}
    about |= {"layer": lab.identity["layer"], "first": first, "classes": classes}
    about |= {key: value for key, value in found.items() if key not in ("actions", "features")}
    data["runs"].append(about)
    for card in found["features"]:
        data["features"][f"{run}:{card['layer']}:{card['feature']}"] = card
    by_name = {action["name"]: action for action in found["actions"]}
    for name in lab.names:  # in the order of the mask
        does = by_name[name]["steering"] or {"layer": None, "feature": None}
        key = f"{run}:{does['layer']}:{does['feature']}"
        card = key if key in data["features"] else None
        data["actions"].append(by_name[name] | {"run": run, "card": card})
    said_by = {name: {} for name in lab.names}
    for name in said_by.keys() & table.keys():
        said_by[name] = {prompt.row["id"]: word for prompt, word, _ in table[name]}
    replayed = replay(lab)
    count = 0
    for n in tqdm(range(len(lab.val)), desc="page", leave=False, delay=2):
        shown = view_prompt(lab, n, run, replayed, said_by)
        for token in shown["tokens"]:
            token["action"] = None if token["action"] is None else first + token["action"]
            token["others"] = [[first + action, p] for action, p in token["others"]]
            count += any(token["differs"])
        data["prompts"].append(shown)
    return count


def write_viewer(out, data):
    """Writes viewer.html. jinja2 escapes what could end the data's script."""
    template = Path(__file__).with_name("viewer_template.html").read_text("utf-8")
    page = jinja2.Environment(autoescape=True).from_string(template).render(data=finite(data))
    hub.write_atomically(out / "viewer.html", lambda temporary: temporary.write_text(page, "utf-8"))
