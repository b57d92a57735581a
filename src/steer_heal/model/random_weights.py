"""Gemma-3 models with random weights in several sizes, for the checks and for measurements.

`tiny` has four blocks, so that the fast-dev run covers the whole loop in seconds. `gemma-3-270m` and `gemma-3-1b` have
the true shapes, so that speed and memory can be measured without a download. All share a byte-level BPE tokenizer,
trained here on the extraction contexts, and gemma's turn format (a system text goes into the user turn).
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from steer_heal.data import contexts

TOKENIZER_SIZE = 1024
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% set lead = namespace(text='') %}"
    "{% for turn in messages %}"
    "{% if turn.role == 'system' %}{% set lead.text = turn.content + '\n\n' %}"
    "{% else %}<start_of_turn>{{ 'model' if turn.role == 'assistant' else turn.role }}\n"
    "{{ lead.text + turn.content | trim }}<end_of_turn>\n{% set lead.text = '' %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

RANDOM_ARCHITECTURES: dict[str, dict] = {
    "tiny": {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "head_dim": 32,
        "sliding_window": 32,
        "vocab_size": TOKENIZER_SIZE,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        # At gemma's 0.02 a model this narrow answers every question uniformly; 0.15 gives it preferences.
        "initializer_range": 0.15,
    },
    "gemma-3-270m": {
        "num_hidden_layers": 18,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_attention_heads": 4,
        "head_dim": 256,
        "sliding_window": 512,
        "vocab_size": 262144,
    },
    "gemma-3-1b": {
        "num_hidden_layers": 26,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_attention_heads": 4,
        "head_dim": 256,
        "sliding_window": 512,
        "vocab_size": 262144,
    },
}


def build_random(name: str, folder: Path) -> None:
    """Write a random model and its tokenizer into `folder` for `from_pretrained`. The bits are always the same."""
    tokenizer = _tokenizer()
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    config = Gemma3TextConfig(
        **RANDOM_ARCHITECTURES[name],
        num_key_value_heads=1,
        query_pre_attn_scalar=RANDOM_ARCHITECTURES[name]["head_dim"],
        pad_token_id=ids["<pad>"],
        eos_token_id=ids["<eos>"],
        bos_token_id=ids["<bos>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gemma3ForCausalLM(config)
    with torch.no_grad():  # embeddings beyond the vocabulary are small, so that the larger models write text
        model.get_input_embeddings().weight[len(tokenizer) :] *= 0.1
    model.generation_config.eos_token_id = [ids["<eos>"], ids["<end_of_turn>"]]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(contexts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        chat_template=CHAT_TEMPLATE,
    )
