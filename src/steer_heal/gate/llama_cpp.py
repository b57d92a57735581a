"""llama.cpp itself, for the checks of GGUF files, and tiny models as .gguf files of every family that is exported.

llama.cpp comes with the package xllamacpp (`pip install xllamacpp`, 34 MB), whose library has its C interface. The
package's own interface has no control vectors, and gives the log-probabilities of few tokens.
"""

from __future__ import annotations

import ctypes
import json
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers

from steer_heal.model.gguf_file import Directions, read_control_vector
from steer_heal.model.random_weights import CHAT_TEMPLATE, SPECIAL, _tokenizer

CALM = 0.15  # initializer_range, see `random_weights`
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "initializer_range": CALM, "max_position_embeddings": 512}
CONFIGS = {
    "llama": (transformers.LlamaConfig, {"head_dim": 32}),
    "mistral": (transformers.MistralConfig, {"head_dim": 32, "sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 128}),
    "phi3": (transformers.Phi3Config, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "gemma2": (transformers.Gemma2Config, {"head_dim": 256, "query_pre_attn_scalar": 256}),
    "gemma3_text": (transformers.Gemma3TextConfig, {"head_dim": 256, "query_pre_attn_scalar": 256}),
}
# Tokens that transformers adds to a vocabulary from a .gguf file where they are missing.
SPARE = ["<|endoftext|>", "<s>", "</s>", "<mask>", "<|im_end|>"]
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}


def tiny_gguf(family: str, file: Path, folder: Path | None = None) -> Path:
    """Write a tiny random model of a family as a .gguf file in float32, with the tiny tokenizer.

    With `folder` the same model is written there for transformers.
    """
    tokenizer = _tokenizer()
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    form, own = CONFIGS[family]
    special = {"bos_token_id": ids["<bos>"], "eos_token_id": ids["<eos>"], "pad_token_id": ids["<pad>"]}
    config = form(**SIZES | own | special, vocab_size=len(tokenizer) + len(SPARE), tie_word_embeddings=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():  # a new model's norms are all alike, and its biases are 0
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter) if "norm" in name else torch.randn_like(parameter)
    if folder is not None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    architecture = ARCHITECTURES.get(family, family)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_string("general.name", f"tiny {family}")
    writer.add_string("general.license", "mit")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _settings(writer, architecture, config)
    _tokens(writer, tokenizer, ids)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for path, weight in model.state_dict().items():
        if path != "lm_head.weight":  # the embedding
            name, _, kind = path.rpartition(".")
            writer.add_tensor(f"{names.get_name(name)}.{kind}", _as_stored(family, path, weight, config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _settings(writer: gguf.GGUFWriter, architecture: str, config: transformers.PreTrainedConfig) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_vocab_size(config.vocab_size)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if architecture in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(config.sliding_window or config.max_position_embeddings)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _tokens(writer: gguf.GGUFWriter, tokenizer: transformers.PreTrainedTokenizerFast, ids: dict[str, int]) -> None:
    vocabulary = tokenizer.get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.get), *SPARE]
    types = dict.fromkeys(SPECIAL, gguf.TokenType.CONTROL) | dict.fromkeys(SPARE, gguf.TokenType.UNUSED)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([types.get(token, gguf.TokenType.NORMAL) for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(ids["<bos>"])
    writer.add_eos_token_id(ids["<eos>"])
    writer.add_pad_token_id(ids["<pad>"])
    writer.add_unk_token_id(ids["<unk>"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _as_stored(family: str, path: str, weight: torch.Tensor, config: transformers.PreTrainedConfig) -> torch.Tensor:
    """The weight as llama.cpp keeps it: gemma's norms with their 1 added, llama's q and k in pairs of rows."""
    if family.startswith("gemma") and path.endswith("norm.weight"):
        return weight + 1
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(path.split(".")[-2])
    if heads is None or family not in ("llama", "mistral"):
        return weight
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, -1)
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


class ModelParams(ctypes.Structure):
    """llama.cpp's struct, of which nothing is read here. It is passed by value: more bytes than it has do no harm."""

    _fields_ = [("rest", ctypes.c_uint8 * 512)]


class ContextParams(ctypes.Structure):
    """The first fields of llama.cpp's struct; `_context` compares them with its defaults, as their order may change."""

    _fields_ = [
        ("sizes", ctypes.c_uint32 * 7),  # n_ctx, n_batch, n_ubatch first
        ("threads", ctypes.c_int32 * 2),
        ("kinds", ctypes.c_int32 * 5),  # the last: flash attention
        ("floats", ctypes.c_float * 6),
        ("yarn_orig_ctx", ctypes.c_uint32),
        ("defrag", ctypes.c_float),
        ("callback", ctypes.c_void_p * 2),
        ("cache_types", ctypes.c_int32 * 2),
        ("rest", ctypes.c_uint8 * 512),
    ]


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


F32, F16, OFF, AUTO = 0, 1, 0, -1


def log_probabilities(file: Path, ids: list[int], lora: Path | None = None, vector: Path | None = None) -> np.ndarray:
    """llama.cpp's log-probabilities after each token: [tokens, vocabulary]."""
    with _context(file) as (lib, model, context):
        if lora is not None:
            adapter = lib.llama_adapter_lora_init(model, str(lora).encode())
            assert adapter, "llama.cpp does not load the adapter"
            one = (ctypes.c_void_p * 1)(adapter)
            assert lib.llama_set_adapters_lora(context, one, ctypes.c_size_t(1), (ctypes.c_float * 1)(1.0)) == 0
        if vector is not None:
            width, blocks = lib.llama_model_n_embd(model), lib.llama_model_n_layer(model)
            data = _as_buffer(read_control_vector(vector, "vector"), width, blocks)
            place, size = data.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(data.size)
            assert lib.llama_set_adapter_cvec(context, place, size, width, 1, blocks) == 0
        batch = lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        assert lib.llama_decode(context, batch) == 0
        size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        logits = np.ctypeslib.as_array(lib.llama_get_logits(context), (len(ids), size)).copy()
        lib.llama_batch_free(batch)
    return torch.from_numpy(logits).log_softmax(-1).numpy()


def _as_buffer(directions: Directions, width: int, blocks: int) -> np.ndarray:
    """What llama.cpp's programs make of a control vector's file: direction.N begins at N - 1 times the width."""
    data = np.zeros((blocks - 1, width), np.float32)
    for block, direction in directions.items():
        data[block - 1] = direction.numpy()
    return data.reshape(-1)


@cache
def _library() -> ctypes.CDLL:
    """llama.cpp's C interface."""
    import xllamacpp

    lib = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    pointers = ("model_load_from_file", "init_from_model", "adapter_lora_init", "model_get_vocab")
    for name in pointers:
        getattr(lib, f"llama_{name}").restype = ctypes.c_void_p
    lib.llama_model_default_params.restype, lib.llama_context_default_params.restype = ModelParams, ContextParams
    lib.llama_model_load_from_file.argtypes = ctypes.c_char_p, ModelParams
    lib.llama_init_from_model.argtypes = ctypes.c_void_p, ContextParams
    lib.llama_adapter_lora_init.argtypes = ctypes.c_void_p, ctypes.c_char_p
    lib.llama_batch_init.restype = Batch
    lib.llama_decode.argtypes, lib.llama_batch_free.argtypes = (ctypes.c_void_p, Batch), (Batch,)
    lib.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
    takes_one = (
        "get_logits",
        "model_n_embd",
        "model_n_layer",
        "model_get_vocab",
        "vocab_n_tokens",
        "free",
        "model_free",
    )
    for name in takes_one:
        getattr(lib, f"llama_{name}").argtypes = (ctypes.c_void_p,)
    handle, count, many = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32
    lib.llama_set_adapters_lora.argtypes = handle, handle, count, handle
    lib.llama_set_adapter_cvec.argtypes = handle, handle, count, many, many, many
    lib.llama_set_n_threads.argtypes = handle, many, many
    lib.llama_log_set(SILENCE, None)
    lib.llama_backend_init()
    return lib


SILENCE = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)


@contextmanager
def _context(file: Path):
    """A model and its context on one thread, with caches in float32 and without fused attention."""
    lib = _library()
    model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
    assert model, "llama.cpp does not load the model"
    using = lib.llama_context_default_params()
    usual = (using.sizes[0], using.kinds[4], *using.cache_types)
    assert usual == (512, AUTO, F16, F16), f"llama.cpp's struct has changed: {usual}"
    using.kinds[4], using.cache_types[0], using.cache_types[1] = OFF, F32, F32
    context = lib.llama_init_from_model(model, using)
    assert context, "llama.cpp makes no context"
    lib.llama_set_n_threads(context, 1, 1)
    try:
        yield lib, model, context
    finally:
        lib.llama_free(context)
        lib.llama_model_free(model)
