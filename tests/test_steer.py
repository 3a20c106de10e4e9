"""crl_steer.py on tiny models: generate() says what the environment says, and leaves no trace."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import small_run
import tiny
import torch
from statsmodels.stats.proportion import proportion_confint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
)

import crl_ppo
import crl_steer
import crl_tasks
from crl_tasks import hub

KINDS = ["one", "strong", "held", "first", "turns"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder and runs: letters at one site and at two, long answers with one decision and with two."""
    folder = tmp_path_factory.mktemp("steer")
    sites = dict(sae=("random:9", f"{folder}/sae"), layer=(0, 1))
    kinds = {"one": dict(coef=(1.0, 4.0)), "strong": dict(coef=(4.0,), seed=2, **sites)}
    kinds["held"] = dict(task="long", coef=(2.0,), steer_tokens=0)
    kinds["first"] = dict(task="long", coef=(4.0,), steer_tokens=1, seed=2)
    kinds["turns"] = dict(task="long", coef=(4.0,), decisions=2, steer_tokens=2, seed=3)
    with small_run.world(folder, **kinds) as made:
        yield made


def load(folder):
    """Model and tokenizer as anyone loads them."""
    tok = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval(), tok


@pytest.fixture
def loaded(world):
    """(model, tokenizer, what the tokenizer makes of a list of texts)"""
    model, tok = load(world[0])
    return model, tok, partial(tok, return_tensors="pt", padding=True)


def expected(run):
    """(prompts, answers, actions (n, T), environment) of a run's greedy policy, by Environment.generate."""
    args = crl_ppo.stored_args(run)
    env, prompts, identity = crl_ppo.set_up(args)
    prompts = prompts["train"] + prompts["val"]
    env.ask(prompts)
    crl_ppo.load_rewards(run / "rewards.safetensors", identity, env)
    agent = crl_ppo.load_agent(run / "best.safetensors", identity)
    actions = torch.zeros(len(prompts), args.decisions).long()

    def choose(x, t, rows, columns):
        action = agent.get_policy(agent.observe(x, t)).logits.argmax(-1)
        actions[rows, t] = action[:, 0]
        return action

    answers = env.generate(prompts, choose, 1)
    return prompts, [answer for (answer,) in answers], actions, env


@pytest.mark.parametrize("batched, cached", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("kind", KINDS)
def test_generate_says_what_the_environment_says(world, kind, batched, cached):
    folder, run = world[0], world[1][kind]
    prompts, answers, actions, env = expected(run)
    model, tok = load(folder)
    with crl_steer.steered(model, tok, run) as log:
        ids = [prompt.ids for prompt in prompts]
        for part in [ids] if batched else [[row] for row in ids]:
            asked = tok.pad({"input_ids": part}, return_tensors="pt")
            model.generate(**asked, max_new_tokens=env.args.max_new_tokens, use_cache=cached, do_sample=False)
    for n, answer in enumerate(answers):
        own = [line for line in log if (line["row"], line["call"]) == ((n, 0) if batched else (0, n))]
        assert [line["token"] for line in own] == answer
        assert [line["position"] for line in own] == list(range(len(answer)))
        for t, line in enumerate(own):
            action = actions[n, min(t, env.args.decisions - 1)].item()
            steered = env.args.steer_tokens == 0 or t < env.args.steer_tokens
            assert line["action"] == action and line["decided"] == (t < env.args.decisions)
            assert line["steering"] == (env.describe(action) if steered else None)
    assert len({str(some) for some in actions.tolist()}) > 2


def test_the_log_holds_the_agents_numbers(world):
    run = world[1]["turns"]
    prompts, _, _, env = expected(run)
    agent = crl_ppo.load_agent(run / "best.safetensors", {})
    greedy = crl_ppo.rollout(env, agent, torch.arange(len(prompts)), greedy=True)
    entropy = agent.get_policy(greedy.obs).entropy()
    buffers = {"logprob": greedy.logprobs, "value": greedy.values, "entropy": entropy}
    with crl_steer.steered(env.model, env.tok, run) as log:
        asked = env.tok.pad({"input_ids": [p.ids for p in prompts]}, padding_side="left", return_tensors="pt")
        env.model.generate(**asked, max_new_tokens=3, do_sample=False)
    for line in log:
        for key, buffer in buffers.items():
            own = buffer[min(line["position"], 1), line["row"], 0].item()
            assert line[key] == pytest.approx(own, abs=1e-3)


@pytest.mark.parametrize("kind", ["one", "held", "turns"])
def test_the_no_op_is_plain_generate(world, loaded, kind, tmp_path):
    model, tok, ask = loaded
    run = shutil.copytree(world[1][kind], tmp_path / "run")
    tensors, state = hub.load_tensors(run / "best.safetensors", {})
    tensors["agent"]["prior"][:, -1] = 1e6
    hub.save_tensors(run / "best.safetensors", tensors, state)
    asked = ask(["abc", "a longer question"])
    options = dict(max_new_tokens=4, output_logits=True, return_dict_in_generate=True)
    before = model.generate(**asked, **options)
    with crl_steer.steered(model, tok, run) as log:
        after = model.generate(**asked, **options)
    assert log and all(line["steering"] is None for line in log)
    assert torch.equal(before.sequences, after.sequences)
    assert torch.equal(torch.stack(before.logits), torch.stack(after.logits))


@pytest.mark.parametrize("kind", ["one", "held", "turns"])
def test_the_model_is_what_it_was(world, loaded, kind):
    model, tok, ask = loaded
    asked = ask(["a question"])
    before = model.generate(**asked, max_new_tokens=3)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), crl_steer.steered(model, tok, world[1][kind]):
        model.generate(**asked, max_new_tokens=3)
        1 / 0  # noqa: B018
    assert torch.equal(model.generate(**asked, max_new_tokens=3), before)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert tiny.untouched(model) and tok.padding_side == "left"
    assert not {"generate", "init_continuous_batching"} & vars(model).keys()
    assert all(weight.requires_grad for weight in model.parameters())


def test_sampling_several_answers_decides_once_for_each_row(world, loaded):
    model, tok, ask = loaded
    with crl_steer.steered(model, tok, world[1]["turns"]) as log:
        torch.manual_seed(0)
        asked = ask(["abc", "z"])
        out = model.generate(**asked, max_new_tokens=4, do_sample=True, num_return_sequences=3)
    assert torch.equal(out[:, :-4], asked["input_ids"].repeat_interleave(3, 0))
    assert {line["row"] for line in log} == set(range(6))
    first = [line["action"] for line in log if line["position"] == 0]
    for row in range(6):
        own = [line for line in log if line["row"] == row]
        assert [line["decided"] for line in own] == [True, True, False, False][: len(own)]
        assert [line["token"] for line in own] == out[row, -4:][: len(own)].tolist()
        assert first[row] == first[row // 3 * 3]


def test_copies_of_a_prompt_share_its_options(world, loaded):
    model, tok, ask = loaded
    asked = ask(["item 3\nA. u\nB. v\nAnswer:", "xx item\nA. u\nB. v\nC. w\nD. x\nAnswer:"])
    with crl_steer.steered(model, tok, world[1]["one"]) as log:
        model.generate(**asked, max_new_tokens=1)
        model.generate(**asked, max_new_tokens=1, do_sample=True, num_return_sequences=3)
    values = [line["value"] for line in log]
    assert values[2:] == pytest.approx([values[0]] * 3 + [values[1]] * 3, abs=1e-5) and values[0] != values[1]


NO_TEXT = [*range(5), *range(99, 261)]  # tokens that are part of a character only, or special


def test_padding_after_a_stop_string_is_not_logged(world, loaded):
    model, tok, ask = loaded
    asked = ask(["abc", "z", "yet another"]) | dict(max_new_tokens=3, suppress_tokens=NO_TEXT)
    with crl_steer.steered(model, tok, world[1]["held"]) as log:
        first = model.generate(**asked, do_sample=False)[0, -3:]
        log.clear()
        stop = tok.decode(first[:1])
        model.generate(**asked, do_sample=False, stop_strings=stop, tokenizer=tok)
    assert [line["token"] for line in log if line["row"] == 0] == first[:1].tolist()
    assert max(line["position"] for line in log) == 2  # another one goes on


def test_nothing_behind_the_end_of_an_answer_is_logged(world, loaded):
    """Ends of the caller's own, and a stop string that begins in the prompt."""
    model, tok, ask = loaded
    asked = ask(["abc", "z", "yet another"])
    options = dict(max_new_tokens=4, do_sample=False, suppress_tokens=NO_TEXT)

    class Second(StoppingCriteria):
        """Ends the first answer with its second token."""

        def __call__(self, ids, scores, **kwargs):
            return (torch.arange(3) == 0) & (ids.shape[1] == asked["input_ids"].shape[1] + 2)

    def lengths(**ending):
        log.clear()
        model.generate(**asked, **options, **ending)
        return [sum(line["row"] == row for line in log) for row in range(3)]

    with crl_steer.steered(model, tok, world[1]["held"]) as log:
        first = tok.decode(model.generate(**asked, **options)[0, -4])
        assert lengths(eos_token_id=-1) == [4, 4, 4]
        assert lengths(eos_token_id=-1, stopping_criteria=[Second()], pad_token_id=2) == [2, 4, 4]
        assert lengths(stop_strings=["bc" + first], tokenizer=tok) == [1, 4, 4]


@pytest.mark.parametrize("kind", ["held", "turns"])
def test_other_ways_to_call_generate_say_the_same(world, loaded, kind):
    model, tok, ask = loaded
    asked = ask(["abc", "a longer question", "z"])
    ids = asked["input_ids"]
    mask = asked["attention_mask"]
    config = GenerationConfig(max_new_tokens=4, do_sample=False)
    ways = [
        dict(max_new_tokens=4, cache_implementation="static"),
        dict(max_length=ids.shape[1] + 4, use_cache=False, output_hidden_states=True),
        dict(max_new_tokens=4, guidance_scale=1.0, num_beams=1, penalty_alpha=0.0, stopping_criteria=[]),
    ]
    controller = crl_steer.load_controller(torch.compile(model), tok, world[1][kind])
    with crl_steer.steered(torch.compile(model), tok, controller) as log:
        expected = model.generate(ids, config, None, attention_mask=mask)
        lines = list(log)
        for way in ways:
            log.clear()
            assert torch.equal(model.generate(**asked, do_sample=False, **way), expected)
            assert [line["token"] for line in log] == [line["token"] for line in lines]
        again = crl_steer.steered(torch.compile(model), tok, controller)
        tiny.one_line(again.__enter__, "steered already")
    assert not torch.equal(model.generate(ids, config, attention_mask=mask), expected)


def test_a_forward_pass_in_another_thread_is_not_steered(world, loaded):
    model, tok, ask = loaded
    asked = ask(["abc", "z"])
    ids = torch.tensor([[70], [71]])
    plain = model(ids).logits
    found = []

    class Meanwhile(LogitsProcessor):
        """Has another thread run the model between two tokens."""

        def __call__(self, input_ids, scores):
            with ThreadPoolExecutor(1) as threads:
                found.append(threads.submit(lambda: model(ids).logits).result())
            return scores

    with crl_steer.steered(model, tok, world[1]["held"]):
        alone = model.generate(**asked, max_new_tokens=3, do_sample=False)
        watched = dict(max_new_tokens=3, do_sample=False, logits_processor=[Meanwhile()])
        assert torch.equal(model.generate(**asked, **watched), alone)
    assert len(found) == 3 and all(torch.equal(logits, plain) for logits in found)


def test_logits_that_are_not_finite_end_in_one_line(world, loaded):
    model, tok, ask = loaded
    env, agent = crl_steer.load_controller(model, tok, world[1]["held"])
    env.steering[:-1] = torch.inf
    with crl_steer.steered(model, tok, (env, agent)) as log:
        tiny.one_line(lambda: model.generate(**ask(["abc", "z"]), max_new_tokens=3), "row ", "not finite")
    assert log == [] and tiny.untouched(model)


def test_two_threads_wait_for_each_other(world, loaded):
    model, tok, ask = loaded
    texts = ["abc", "a longer question", "z", "Say 5"]

    def answer(text):
        return model.generate(**ask(text), max_new_tokens=3, do_sample=False).tolist()

    with crl_steer.steered(model, tok, world[1]["held"]):
        alone = [answer(text) for text in texts * 3]
        with ThreadPoolExecutor(12) as threads:
            assert list(threads.map(answer, texts * 3)) == alone


def test_forward_passes_of_others_end_in_one_line(world, loaded):
    model, tok, ask = loaded

    class Curious(LogitsProcessor):
        """A logits processor that runs the model itself."""

        def __call__(self, input_ids, scores):
            model(input_ids[:, -1:])
            return scores

    class Nested(LogitsProcessor):
        def __call__(self, input_ids, scores):
            model.generate(input_ids, max_new_tokens=1)

    with crl_steer.steered(model, tok, world[1]["held"]):
        options = dict(max_new_tokens=3, logits_processor=[Curious()])
        tiny.one_line(lambda: model.generate(**ask(["abc", "z"]), **options), "passes")
        options = dict(max_new_tokens=3, logits_processor=[Nested()])
        tiny.one_line(lambda: model.generate(**ask(["abc"]), **options), "generate() between two tokens")
        tiny.one_line(lambda: model.generate_batch([[0, 70]]), "continuous batching")
        paged = dict(max_new_tokens=3, cache_implementation="paged")
        tiny.one_line(lambda: model.generate(**ask(["abc"]), **paged), "continuous batching")


REFUSED = [
    (dict(num_beams=4), "num_beams 4"),
    (dict(prompt_lookup_num_tokens=3), "prompt_lookup_num_tokens"),
    (dict(guidance_scale=1.5), "guidance_scale"),
    (dict(prefill_chunk_size=4), "prefill_chunk_size"),
    (dict(assistant_early_exit=2), "assistant_early_exit"),
    (dict(inputs_embeds=torch.zeros(1, 2, 16)), "inputs_embeds"),
    (dict(generation_config=GenerationConfig(prompt_lookup_num_tokens=3)), "prompt_lookup_num_tokens"),
    (dict(penalty_alpha=0.6, top_k=4), "penalty_alpha"),
    (dict(dola_layers="high"), "dola_layers"),
    (dict(custom_generate=print), "custom_generate"),
    (dict(num_beam_groups=2), "num_beam_groups"),
    (dict(force_words_ids=[[5]]), "force_words_ids"),
    (dict(token_healing=True), "token_healing"),
    (dict(past_key_values=()), "past_key_values"),
    (dict(attention_mask=torch.tensor([[1, 0]])), "padding_side = 'left'"),
    (dict(inputs=torch.tensor([[0, 70, 71]]), attention_mask=torch.tensor([[1, 0, 1]])), "padding in it"),
    (dict(attention_mask=torch.tensor([[1]])), "(1, 1) is not of the shape of input_ids (1, 2)"),
    (dict(inputs=torch.tensor([[2, 0, 70]])), "hand on attention_mask"),
    (dict(inputs=[[0, 70]]), "input_ids of shape"),
    (dict(inputs=torch.zeros(1, 0).long()), "input_ids of shape"),
    (dict(inputs=torch.tensor([[2, 70], [0, 70]])), "hand on attention_mask"),
    (dict(inputs=torch.tensor([[0, 2], [0, 70]])), "hand on attention_mask"),
    (dict(inputs=torch.tensor([0, 70])), "input_ids of shape"),
    (dict(inputs=None), "input_ids of shape"),
]


@pytest.mark.parametrize("flags, words", REFUSED)
def test_what_cannot_be_steered_is_refused(world, loaded, flags, words):
    model, tok, _ = loaded
    flags = {"inputs": torch.tensor([[0, 70]]), "max_new_tokens": 2} | flags
    with crl_steer.steered(model, tok, world[1]["one"]):
        tiny.one_line(lambda: model.generate(**flags), words)
        model.generation_config.num_beams = 3
        ids = torch.tensor([[0, 70]])
        tiny.one_line(lambda: model.generate(ids, GenerationConfig(max_new_tokens=2)), "num_beams 3")
        tiny.one_line(lambda: crl_steer.steered(model, tok, world[1]["one"]).__enter__(), "steered already")


@pytest.mark.parametrize(
    "field",
    ["dtype differs", "model_hash differs", "sae_hash differs", "coef differs", "offloaded", "compiled"],
)
def test_another_model_or_sae_is_refused_by_field(world, loaded, tmp_path, field):
    run = world[1]["one"]
    model, tok, _ = loaded
    if field == "dtype differs":
        model = model.to(torch.bfloat16)
    elif field == "model_hash differs":
        model.get_input_embeddings().weight.data[0, 0] += 1
    elif field == "coef differs":
        run = small_run.changed(run, tmp_path / "run", coef=[5.0])
    elif field == "offloaded":
        model = model.to("meta")
    elif field == "compiled":
        controller = crl_steer.load_controller(model, tok, run)
        other = load(world[0])[0]
        tiny.one_line(crl_steer.steered(other, tok, controller).__enter__, "given another model")
        model.compile()
        return tiny.one_line(crl_steer.steered(model, tok, run).__enter__, field)
    else:
        sae = tiny.tiny_sae_dir(tmp_path / "sae", 16, 24, small_run.HOOK, seed=5)
        run = small_run.changed(run, tmp_path / "run", sae=[sae])
    tiny.one_line(lambda: crl_steer.load_controller(model, tok, run), field)


# ----------------------------------------------------------------------------------------- where options end
OPTIONS = {
    "plain": ("Which?", ["one", "two", "three"]),
    "several lines": ("Which?", ["one\nof two lines", "two", "three\n\nwith a gap", "four\nand more"]),
    "a list in the question": ("A. x\nB. y\nC. z\nD. w\nWhich?", ["first", "second"]),
    "a letter in an option": ("A. Lincoln asks", ["one\nA. bar\nQ. E. D.", "two\nC sharp", "three"]),
    "unicode": ("Où ça? 🙂", ["à côté", "北京", "naïve é"]),
    "no options": ("Well,\nA. and nothing more", None),
}


@pytest.mark.parametrize("chat", [None, tiny.CHAT])
@pytest.mark.parametrize("kind", OPTIONS)
def test_options_are_found_where_training_put_them(kind, chat):
    tok = tiny.tiny_tokenizer(chat)
    prompt, choices = OPTIONS[kind]
    shots = []
    if kind != "no options":
        shots = [{"prompt": "Before?", "choices": list("uvwxyz"), "answer": 2, "task": "file"}]
    row = {"prompt": prompt, "choices": choices, "answer": 0, "task": "file"}
    encoded = crl_tasks.encode_prompt(tok, row, shots)
    env = SimpleNamespace(tok=tok, ends=len(choices or "?"))
    assert crl_steer.prompt_of(env, encoded.ids).ends == encoded.ends
    text = "Which?\nA. x\nB. y\nC. z\nA. w\nAnswer:"  # a letter in the last option begins no list
    assert [text[end] for end in crl_steer.find_ends(text, "\nAnswer:", True)] == ["x", "y", "z"]
    assert [text[end] for end in crl_steer.find_ends(text, "\nAnswer:", False)] == ["w"]
    with pytest.warns(UserWarning, match="as if it were cut"):
        assert crl_steer.find_ends("x\nB. y\nC. z\nAnswer:", "\nAnswer:", True) == []
    with pytest.warns(UserWarning, match="does not end with"):
        assert crl_steer.find_ends(text, "other", False) == [-1]


# ----------------------------------------------------------------------------------------------------- export
def test_an_exported_controller_steers_alike_and_holds_nothing_of_this_machine(world, loaded, tmp_path):
    folder = world[0]
    shutil.copytree(folder / "sae", tmp_path / "sae")
    (tmp_path / "sae" / "run_me.py").write_text("nothing executable is exported")
    run = small_run.changed(world[1]["turns"], tmp_path / "run", sae=[str(tmp_path / "sae")])
    (run / "eval").mkdir()
    (run / "eval" / "report.md").write_text("# Evaluation\n\n## the task: 1 run\n")
    crl_steer.export(run, tmp_path / "out")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".md"}
    for path in files:
        assert not any(str(place).encode() in path.read_bytes() for place in (folder, tmp_path))
    card = (tmp_path / "out" / "README.md").read_text()
    final = json.loads((run / "final.json").read_text())
    low, high = proportion_confint(round(final["steered"] * final["val_n"]), final["val_n"], method="wilson")
    figures = f"| CRL | {100 * final['steered']:.1f} ({100 * low:.1f} to {100 * high:.1f}) |"
    for words in (final["verdict"], figures, "#### the task: 1 run", "model_hash: ", "## Licences"):
        assert words in card
    assert "Gemma" not in card
    model, tok, ask = loaded
    logs = []
    for place in (run, tmp_path / "out"):
        with crl_steer.steered(model, tok, place) as log:
            model.generate(**ask(["Say 3", "x"]), max_new_tokens=3)
        logs.append(log)
    assert logs[0] == logs[1] and any(line["steering"] for line in logs[0])


def test_export_names_gemma_and_refuses_what_is_not_finished(world, tmp_path):
    run = shutil.copytree(world[1]["one"], tmp_path / "run")
    record = json.loads((run / "args.json").read_text())
    record["identity"]["model"] = "tiny-gemma"
    hub.write_json(run / "args.json", record)
    for name in ("best.safetensors", "rewards.safetensors"):
        tensors, state = hub.load_tensors(run / name, {})
        hub.save_tensors(run / name, tensors, state | {"model": "tiny-gemma"})
    crl_steer.export(run, tmp_path / "gemma")
    assert "Gemma Terms of Use" in (tmp_path / "gemma" / "README.md").read_text()
    tiny.one_line(lambda: crl_steer.export(run, tmp_path / "gemma"), "exists")
    for final, words in (({}, "lacks 'val_n'"), ([], "no readable final.json")):
        part = small_run.changed(world[1]["one"], tmp_path / words)
        hub.write_json(part / "final.json", final)
        tiny.one_line(lambda: crl_steer.export(part, tmp_path / "other"), words)  # noqa: B023
    (run / "final.json").unlink()
    tiny.one_line(lambda: crl_steer.export(run, tmp_path / "other"), "--resume")
    record["identity"].pop("model_hash")
    hub.write_json(run / "args.json", record)
    tiny.one_line(lambda: crl_steer.export(run, tmp_path / "other"), run, "lacks the identity")
    assert not (tmp_path / "other").exists()
