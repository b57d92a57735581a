"""The environment of a run: versions, hardware, the commit. It holds no user name, no token and no path."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
from loguru import logger

import steer_heal
from steer_heal import VERSION
from steer_heal.config import ModelConfig, UserError
from steer_heal.model.dtype import dtype_of
from steer_heal.model.lm import LM
from steer_heal.processor import processor

PACKAGES = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes", "accelerate", "safetensors")


def environment(lm: LM) -> dict:
    """The contents of env.json."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {"steer_heal": VERSION} | {name: importlib.metadata.version(name) for name in PACKAGES},
        "git": commit(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": _gpu(),
        "processor": processor().name,
        "mkl_cbwr": os.environ["MKL_CBWR"],
        "dtype": {"weights": dtype_of(lm), "why": lm.why_dtype},
        "model": {"name": lm.name, "sha256": checksum(lm)},
        "template": lm.template.record,
    }


def require_recorded(lm: LM, config: ModelConfig, env: dict) -> None:
    """Raise UserError when the model is not the one in env.json.

    4-bit weights of another processor differ in their last bits: there a warning says that nothing was compared.
    """
    if checksum(lm) == env["model"]["sha256"]:
        return
    here = {"gpu": _gpu(), "processor": processor().name}
    if config.quant != "none" and any(env.get(key) != name for key, name in here.items()):
        logger.warning(
            f"the run's 4-bit weights were made on {env['gpu'] or env['processor']}, these on another processor: "
            f"whether {config.path} is still the run's model cannot be checked"
        )
        return
    names = ("transformers", "tokenizers")  # a new version may read the same files otherwise
    software = [
        f"{name} {then}" for name in names if (then := env["packages"][name]) != importlib.metadata.version(name)
    ]
    raise UserError(
        f"{config.path!r} is no longer the model that the run was made with: its weights, its vocabulary or its chat "
        "template have changed since. Put the old one back, or start a new run"
        + (f" (the run was made with {', '.join(software)})" if software else "")
    )


def _gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def commit() -> str | None:
    """The commit of the running source, with a hash of uncommitted changes; None if it is not in a git repository."""
    here = Path(steer_heal.__file__).parent  # the folder of the whole package

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None  # the package may lie untracked inside another repository
    changes = git("diff", "HEAD", "--", ".")
    changed = f" with changes {hashlib.sha256(changes.encode()).hexdigest()[:12]}" if changes else ""
    return git("rev-parse", "HEAD").strip() + changed


def block_network() -> None:
    """From here on RuntimeError is raised when this process connects or looks up a name. It cannot be undone."""

    def refuse(event: str, args: tuple) -> None:
        if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
            raise RuntimeError(f"the network is blocked, but {event} was called with {args[1:]}")

    sys.addaudithook(refuse)


def checksum(lm: LM) -> str:
    """SHA-256 over all weights as they were loaded, the tokenizer's vocabulary and the chat template."""
    digest = hashlib.sha256()
    for name, tensor in sorted(lm.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    vocabulary = sorted(lm.tokenizer.get_vocab().items())
    digest.update(repr((vocabulary, lm.tokenizer.chat_template)).encode())
    return digest.hexdigest()
