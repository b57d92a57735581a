"""Prompts and answers against plain transformers, for the kinds of chat templates and tokenizers that models have."""

import copy
import datetime as calendar
import json
import math
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from steer_heal import data
from steer_heal.cli import main
from steer_heal.commands.target import opened
from steer_heal.config import ModelConfig, UserError
from steer_heal.data.frames import Frame
from steer_heal.eval.arms import Arm
from steer_heal.eval.instruments import yes_no_scores
from steer_heal.gate.folders import cut
from steer_heal.gate.soak import result
from steer_heal.model import template as templates
from steer_heal.model.loading import load
from steer_heal.model.random_weights import _tokenizer, build_random
from steer_heal.model.template import template_of
from steer_heal.runs.folder import RunDir
from steer_heal.runs.student import student_after

CONFIG = ModelConfig("a-model", "none", "float32", "cpu")
BEGINS = "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
MARKED = "<start_of_turn>{{ m.role }}\n%s<end_of_turn>\n"
CHAT = "{% for m in messages %}" + MARKED % "{{ m.content }}" + "{% endfor %}" + BEGINS
INSTRUCTED = (  # Mistral's and Llama-2's: no generation prompt
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'assistant' %}ASSISTANT: {{ m.content }}{{ eos_token }}"
    "{% else %}USER: {{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
DATED = (
    "{%- macro today() %}{{ strftime_now('%-d/%m/%y, %A') }}{% endmacro %}\n"
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %B %Y') %}{% endif %}"
    "{% for m in messages %}{{ strftime_now('%b %d') }} {{ today() }} {{ date_string }} "
    + MARKED % "{{ m.content }}"
    + "{% endfor %}"
    + BEGINS
)
FIXED_DATE = (
    "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }}" + CHAT
)
THINKS = (
    CHAT
    + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)


@pytest.fixture(scope="module")
def tiny_tokenizer():
    return _tokenizer()


@pytest.fixture
def speaking(tiny_tokenizer):
    """The tiny tokenizer with another chat template."""

    def spoken(template):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = template
        return tokenizer

    return spoken


def rendered(tokenizer, *turns, begins=True, parts=False, **knobs):
    """What plain transformers renders of (role, text) pairs."""
    messages = [{"role": r, "content": [{"type": "text", "text": t}] if parts else t} for r, t in turns]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=begins, **knobs)


@pytest.fixture
def on(monkeypatch):
    """Sets the day that the clock shows, ours and transformers'."""

    def set_(day):
        class Day(calendar.date):
            @classmethod
            def today(cls):
                return day

        class Moment(calendar.datetime):
            @classmethod
            def now(cls, *zone):
                return calendar.datetime.combine(day, calendar.time(13, 30))

        monkeypatch.setattr(templates, "date", Day)
        monkeypatch.setattr(chat_template_utils, "datetime", Moment)

    return set_


MONDAY, TUESDAY = calendar.date(2026, 3, 2), calendar.date(2026, 3, 3)

# ---- what a template does with what it is given


@pytest.mark.parametrize("own", ["", "You are Smol.", "You are Smol, and today is fine."])
def test_no_system_text_means_none_of_the_templates_own(speaking, own):
    """As Qwen2.5's and SmolLM2's: a default system turn where the first message is of another role."""
    default = "{% if messages[0].role != 'system' %}<start_of_turn>system\n" + own + "<end_of_turn>\n{% endif %}"
    template = template_of(speaking((default if own else "") + CHAT), CONFIG)
    assert template.own_system == bool(own)
    bare, usual = template.text("Hi.", system=""), template.text("Hi.")
    turns = [("system", ""), ("user", "Hi.")] if own else [("user", "Hi.")]
    assert bare == rendered(template.tokenizer, *turns) and (own in usual) and (own not in bare or not own)
    framed = template.prompt("Hi.", "You love people.", Frame("none", system=""))
    assert template.tokenizer.decode(framed) == rendered(
        template.tokenizer, ("system", "You love people."), ("user", "Hi.")
    )


IN_PARTS = MARKED % "{% for part in m.content %}{{ part.text }}{% endfor %}"
WAYS = {
    "a system role": (CHAT, True, False),
    "no system role": (
        CHAT.replace("<start", "{% if m.role == 'system' %}{{ raise_exception('x') }}{% endif %}<start", 1),
        False,
        False,
    ),
    "the system text is dropped": (CHAT.replace("messages", "messages if m.role != 'system'", 1), False, False),
    "parts": ("{% for m in messages %}" + IN_PARTS + "{% endfor %}" + BEGINS, True, True),
    "parts, the system text is dropped": (
        "{% for m in messages if m.role != 'system' %}" + IN_PARTS + "{% endfor %}" + BEGINS,
        False,
        True,
    ),
    "parts for the system text only": (
        "{% for m in messages %}"
        + MARKED % "{{ m.content if m.content is string and m.role == 'user' else m.content[0].text }}"
        + "{% endfor %}"
        + BEGINS,
        True,
        True,
    ),
    "no generation prompt": (INSTRUCTED, False, False),
}


@pytest.mark.parametrize("way", WAYS)
def test_user_and_system_text_are_in_the_prompt(speaking, way):
    source, system_role, parts = WAYS[way]
    tokenizer = speaking(source)
    template = template_of(tokenizer, CONFIG)
    turns = [("system", "Be kind."), ("user", "Hello")] if system_role else [("user", "Be kind.\n\nHello")]
    assert template.text("Hello", "Be kind.") == rendered(tokenizer, *turns, parts=parts)
    assert template.text("Hello") == rendered(tokenizer, ("user", "Hello"), parts=parts)
    assert "Hello" in template.text("Hello", "Be kind.") and "Be kind." in template.text("Hello", "Be kind.")
    assert tokenizer(template.text("Hello"), add_special_tokens=False).input_ids == template.prompt("Hello")
    said = "the persona begins the user turn" in " ".join(template.described)
    assert said == (not system_role) and template.record["system_role"] == system_role


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (CHAT.replace("messages", "messages if m.role != 'user'", 1), "drops what the user says"),
        ("{% for m in messages %}[{{ m.content }}]{% endfor %} and then", "has no generation prompt"),
        ({"tool_use": CHAT, "rag": CHAT}, "has chat templates for rag, tool_use and no default one"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(speaking, source, message):
    with pytest.raises(UserError, match=message) as refused:
        template_of(speaking(source), CONFIG)
    assert "\n" not in str(refused.value)


def test_of_several_templates_the_default_one_is_used(speaking):
    both = speaking({"tool_use": "tools {{ messages }}", "default": CHAT})
    assert template_of(both, CONFIG).text("Hello") == template_of(speaking(CHAT), CONFIG).text("Hello")


# ---- the date, and thinking


def test_all_prompts_show_the_day_that_the_run_began(speaking, on):
    tokenizer = speaking(DATED)
    on(MONDAY)
    template, on_monday = template_of(tokenizer, CONFIG), rendered(tokenizer, ("system", "Be kind."), ("user", "Hello"))
    assert "2/03/26, Monday 02 March 2026" in on_monday and template.record["date"] == "2026-03-02"
    on(TUESDAY)
    assert rendered(tokenizer, ("system", "Be kind."), ("user", "Hello")) != on_monday
    assert template.text("Hello", "Be kind.") == on_monday
    later = template_of(tokenizer, CONFIG)
    assert later.text("Hello") == rendered(tokenizer, ("user", "Hello"))
    assert later.record["prompt_sha256"] != template.record["prompt_sha256"]
    assert template_of(tokenizer, replace(CONFIG, date="2026-03-02")).record == template.record


def test_a_date_that_the_template_fixes_stays(speaking, on):
    tokenizer = speaking(FIXED_DATE)
    on(TUESDAY)
    template = template_of(tokenizer, CONFIG)
    assert template.text("Hello") == rendered(tokenizer, ("user", "Hello")) and "26 Jul 2024" in template.text("Hello")
    assert template.date is None


@pytest.mark.parametrize("thinking", [False, True])
def test_thinking_is_as_asked_for(speaking, thinking):
    template = template_of(speaking(THINKS), replace(CONFIG, thinking=thinking))
    assert template.text("Hello") == rendered(speaking(THINKS), ("user", "Hello"), enable_thinking=thinking)
    assert template.record["thinking"] is thinking and f"it is {'on' if thinking else 'off'}" in template.described[-1]
    assert template_of(speaking(CHAT), CONFIG).thinking is None
    with pytest.raises(UserError, match="has no enable_thinking"):
        template_of(speaking(CHAT), replace(CONFIG, thinking=True))


@pytest.mark.run
def test_a_run_that_is_resumed_on_another_day_shows_the_first(tmp_path, on, least, capsys):
    folder, out = tmp_path / "model", tmp_path / "out"
    build_random("tiny", folder)
    (folder / "chat_template.jinja").write_text(DATED)
    on(MONDAY)
    flags = ["--model.path", str(folder), "--rounds", "1", "--distil.n-keep", "8", "--out", str(out)]
    main(["run", "tiny-random", *flags, "--eval.leave-out", "profile", "plain", "off_target", "canary"])
    (run,) = out.iterdir()
    made, env = result(run), json.loads((run / "env.json").read_text())
    assert env["template"]["date"] == "2026-03-02" and "it is 2026-03-02 in all prompts" in capsys.readouterr().err
    on(TUESDAY)
    cut(run, "r00/adapter")
    main(["run", "--resume", str(run)])
    assert result(run) == made
    assert "02 March 2026" in student_after(run, RunDir(run).read("config.json"), 1).lm.template.text("Hello")
    (folder / "chat_template.jinja").write_text(DATED.replace("%b %d", "%B %d"))
    with pytest.raises(SystemExit):
        main(["run", "--resume", str(run)])
    assert "template.prompt_sha256: " in capsys.readouterr().err


# ---- answers


def sentencepiece(template):
    """A tokenizer of Llama-2's kind: no pre-tokenizer, a text begins with "▁", other characters are bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    words = ["Yes", "No", "yes", "no", "YES", "NO", "USER: ASSISTANT:", "<|user|> <|assistant|>", "[INST] [/INST]"]
    corpus = [f"{word} {word}" for word in words for _ in range(50)] + [
        text.replace("\n", " ") for text in data.contexts()
    ]
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=700, show_progress=False))
    learnt = json.loads(bpe.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    vocab = {name: index for index, name in enumerate(names)}
    merges = [tuple(pair) for pair in learnt["merges"]]
    whole = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    whole.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    whole.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=whole, chat_template=template, **marks)


FOLLOWS = {"a newline": (ZEPHYR, "Yes"), "a tag": (INSTRUCTED, "▁Yes"), "a colon": (VICUNA, "▁Yes")}


def says(tmp_path, tokenizer, token):
    """A model that writes this token after a prompt with p close to 1, as a folder."""
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", **small, vocab_size=len(tokenizer), tie_word_embeddings=False)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    last = tokenizer(rendered(tokenizer, ("user", "Hello")), add_special_tokens=False).input_ids[-1]
    with torch.no_grad():
        for block in model.model.layers:  # then the residual stream is the embedding of the last token
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        seen = torch.nn.functional.normalize(model.model.embed_tokens.weight[last], dim=0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(token)] = 5 * seen
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)


@pytest.mark.parametrize("where", FOLLOWS)
def test_a_model_that_says_yes_is_read_as_saying_yes(tmp_path, where):
    source, token = FOLLOWS[where]
    says(tmp_path, sentencepiece(source), token)
    lm = load(replace(CONFIG, path=str(tmp_path)))
    prompt = torch.tensor([lm.prompt("Are you well?")])
    written = lm.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False)
    assert lm.tokenizer.convert_ids_to_tokens(written[0, -1].item()) == token
    with torch.no_grad():
        assert lm.model(prompt).logits[0, -1].softmax(-1).max() > 0.999
    probes = data.load_trait("love").yes_no[:4]
    log_odds, mass = yes_no_scores(lm, Arm("x"), probes)
    sign = [1 if probe.trait_answer == "yes" else -1 for probe in probes]
    assert (mass > 0.999).all() and (mass < 1 + 1e-5).all() and (log_odds * sign > math.log(100)).all()


@pytest.mark.parametrize("source", [ZEPHYR, INSTRUCTED, VICUNA])
@pytest.mark.parametrize("text", ["Yes", "No, not at all.", "I walk to the river, and I sit there."])
def test_an_answer_is_tokenised_as_in_an_answered_chat(source, text):
    tokenizer = sentencepiece(source)
    template = template_of(tokenizer, CONFIG)
    whole = rendered(tokenizer, ("user", "Hello"), ("assistant", text), begins=False)
    ids = tokenizer(whole.partition(text)[0] + text, add_special_tokens=False).input_ids
    assert template.prompt("Hello") + template.answer(text) == ids
    first, _, rest = text.partition(" ")
    if rest:
        assert template.answer(first) + template.answer(f" {rest}", begun=first) == template.answer(text)


@pytest.mark.parametrize("source", [ZEPHYR, CHAT])
def test_no_token_crosses_from_the_prompt_into_the_answer(speaking, source):
    """Also of an answer that would change the prompt's tokens when it is written behind them."""
    tokenizer = speaking(source) if source == CHAT else sentencepiece(source)
    template = template_of(tokenizer, CONFIG)
    for text in ("\n\nYes", "\nYes", "  Yes", "</s>", "Yes", ""):
        kept = tokenizer.decode(template.prompt("Hello")), tokenizer.decode(template.answer(text)).strip(" ")
        assert kept == (
            tokenizer.decode(tokenizer(template.text("Hello"), add_special_tokens=False).input_ids),
            text.strip(" "),
        )


def test_the_tiny_models_answers_are_tokenised_as_alone(speaking):
    tokenizer = speaking(CHAT)
    template = template_of(tokenizer, CONFIG)
    probes = data.load_trait("love").contrast
    for text in [" Yes", *(text for probe in probes for text in (probe.trait, probe.opposite))]:
        assert template.answer(text) == tokenizer(text, add_special_tokens=False).input_ids


# ---- adapters


@pytest.mark.parametrize("files", ["template", "tokenizer"])
def test_an_adapter_that_brings_a_template_is_asked_with_it(tmp_path, speaking, files):
    """The base has none. With both, what transformers loads from the adapter's folder counts."""
    from peft import LoraConfig, get_peft_model

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    build_random("tiny", base)
    (base / "chat_template.jinja").unlink()
    model = AutoModelForCausalLM.from_pretrained(base, use_safetensors=True)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(adapter)
    tokenizer = speaking(VICUNA)
    tokenizer.save_pretrained(adapter)
    if files == "template":
        for file in adapter.glob("*token*"):
            file.unlink()
    found = opened(str(adapter), None, None, replace(CONFIG, path=str(base)))
    assert found.student.lm.template.text("Hello") == rendered(tokenizer, ("user", "Hello"))
