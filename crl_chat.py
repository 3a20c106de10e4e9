"""Chat templates and tokenizers: how a text becomes the token ids that a model is asked with.

crl_tasks.py says what is asked. Templates and tokenizers come with models and differ; what is done with them
here is checked on what they give back, or ends with one line.
"""

import copy
import datetime
import re
import string

import crl_hub as hub
from crl_hub import fail, first_line

DATE = datetime.datetime(2024, 7, 26)  # today, for chat templates
MARK = "what-is-asked"
SWITCHED = "{# thinking off #}{% set"  # how without_thinking() begins


def has_chat(tok):
    """Whether prompts are chat turns; without a chat template a model is asked as a base model."""
    return getattr(tok, "chat_template", None) is not None


def fit_tokenizer(tok, args):
    """A copy of a tokenizer that asks as a run with these flags does; resolves args.prompt.

    Plain: the copy has no chat template. Chat: its template is told DATE as today's date, so that tokens do
    not change at midnight; letters are asked with thinking off, if there is a switch for it. A tokenizer that
    was fitted before is fitted anew. One line if --prompt chat has no template.
    """
    loaded = getattr(tok, "as_loaded", tok)
    tok = copy.copy(loaded)
    tok.as_loaded = loaded
    if isinstance(getattr(tok, "chat_template", None), dict):  # named ones
        tok.chat_template = tok.chat_template.get("default")
    if args.prompt == "auto":
        plain = args.model in hub.ASKED_PLAIN or not has_chat(tok)
        args.prompt = "plain" if plain else "chat"
    if args.prompt == "plain":
        tok.chat_template = None
    elif not has_chat(tok):
        fail(f"--prompt chat: {args.model} has no chat template; use --prompt plain")
    elif "strftime_now" in tok.chat_template:
        tok.chat_template = f"{told_date()}\n{tok.chat_template}"
    if has_chat(tok) and args.max_new_tokens == 1:
        tok.chat_template = without_thinking(tok)
    return tok


def told_date():
    """A strftime_now() for chat templates that always says DATE, in their language: they take no other."""
    said = "form"
    for letter in string.ascii_letters.replace("s", ""):
        for code in (f"%{letter}", f"%-{letter}"):
            said += f" | replace('{code}', '{DATE.strftime(code)}')"
    return f"{{% macro strftime_now(form) %}}{{{{ {said} }}}}{{% endmacro %}}"


def render(tok, contents, parts=False):
    """What the chat template makes of turns of user and assistant; after the user the assistant's is opened.

    parts: contents as lists of parts, as templates of models that see expect them. Whatever the template
    raises is raised.
    """
    turns = []
    for number, content in enumerate(contents):
        content = [{"type": "text", "text": content}] if parts else content
        turns.append({"role": ("user", "assistant")[number % 2], "content": content})
    return tok.apply_chat_template(turns, tokenize=False, add_generation_prompt=len(contents) % 2 == 1)


def after_mark(tok, *turns):
    """What the chat template writes after the last of these turns, which is MARK; "" if it has none."""
    for parts in (False, True):
        try:
            before, mark, after = render(tok, turns, parts).rpartition(MARK)
        except Exception:  # chat_text() says so
            continue
        if mark:
            return after
    return ""


def opens_think(tok):
    """Whether the chat template opens a <think> block in the generation prompt (reasoning models)."""
    return has_chat(tok) and after_mark(tok, MARK).rstrip().endswith("<think>")


def may_think(tok):
    """Whether the chat template speaks of thinking, which without_thinking() has not turned off."""
    template = tok.chat_template if has_chat(tok) else ""
    return bool(re.search("think|reasoning", template)) and not template.startswith(SWITCHED)


def without_thinking(tok):
    """The chat template with its switches for thinking off, as far as it has any.

    A switch is a variable of the template, such as enable_thinking, thinking, no_think or reasoning_effort,
    that changes a prompt when it is set. All variables with such names are tried.
    """
    quiet = tok
    names = re.findall(r"\b[A-Za-z_]*(?:think|reason)[A-Za-z_]*\b", tok.chat_template)
    values = [value for value in ("'none'", "'off'") if value in tok.chat_template.replace('"', "'")]
    for name in dict.fromkeys(names):
        negative = re.match("no_|nothink|non_|disable|skip|without", name)
        for value in ("true",) if negative else ("false", *values):
            trial = copy.copy(tok)
            trial.chat_template = f"{SWITCHED} {name} = {value} %}}\n{quiet.chat_template}"
            try:
                before = render(quiet, [MARK])
                after = render(trial, [MARK])
            except Exception:  # it is no variable, or has no such value
                continue
            written_out = re.findall("True|False", before) != re.findall("True|False", after)
            if before != after and not written_out and not opens_think(trial):
                quiet = trial
                break
    return quiet.chat_template


def chat_text(tok, contents):
    """(text, index in it at which the last content starts) of turns in the chat template.

    Templates may trim contents. Where one leaves out or changes more, or raises, the program ends with one
    line: the model would answer something else than what was asked.
    """
    reason = ""
    for parts in (False, True):
        try:
            text = render(tok, contents, parts)
            before, mark, after = render(tok, [*contents[:-1], MARK], parts).partition(MARK)
        except Exception as e:  # a template raises what it likes
            reason = reason or f"fails ({first_line(e)})"
            continue
        asked = text[len(before) : len(text) - len(after)]
        whole = mark and MARK not in after and text == before + asked + after
        place = 0
        for content in contents[:-1]:
            found = before.find(content.strip(), place)
            whole = whole and found >= 0
            place = found + len(content.strip())
        if whole and asked.strip() == contents[-1].strip():
            shift = contents[-1].find(asked.strip()) - asked.find(asked.strip())
            return text, len(before) - shift
        reason = reason or "leaves the question out, changes it or moves it"
    fail(f"the chat template of the tokenizer {reason}; use --prompt plain, or another tokenizer")


def encode_text(tok, text):
    """(token ids of a prompt, how many of them stand before the text, the encoding of the text alone).

    A chat template writes its own special tokens. Plain text gets those that the tokenizer puts in front,
    but no end-of-text token behind, and none twice.
    """
    encoding = tok(text, add_special_tokens=False)
    ids = encoding["input_ids"]
    front = []
    if not has_chat(tok):
        whole = tok(text, add_special_tokens=True)["input_ids"]
        starts = [n for n in range(len(whole)) if whole[n : n + len(ids)] == ids]
        if not starts:
            fail("the tokenizer reads a text otherwise where it adds special tokens; take another tokenizer")
        front = whole[: starts[0]]
    if ids[-1] == tok.eos_token_id and not text.rstrip().endswith(tok.eos_token):
        ids = ids[:-1]
    if has_chat(tok) and ids[-1] == tok.eos_token_id:
        fail(f"the chat template ends a prompt with {tok.eos_token!r}; use --prompt plain")
    ids = front + ids
    if ids[:2] == [tok.bos_token_id] * 2:
        return ids[1:], len(front) - 1, encoding
    return ids, len(front), encoding


def token_at(encoding, first, last):
    """The number of the token with which characters `first` to `last` end; -1 if no token holds any of them.

    A character may be several tokens, and some tokenizers leave out spaces.
    """
    for char in range(last, first - 1, -1):
        token = encoding.char_to_token(char)
        if token is not None:
            span = encoding.token_to_chars(token)
            while token + 1 < len(encoding["input_ids"]) and encoding.token_to_chars(token + 1) == span:
                token += 1
            return token
    return -1
