"""The verbs of the command line."""

from __future__ import annotations

import difflib
import sys
from typing import Annotated

import tyro
from loguru import logger
from tyro.conf import Positional

from steer_heal.config import DEFAULT_PRESET, PRESETS, RunConfig, UserError


def main(argv: list[str] | None = None) -> None:
    """Entry point of `steer-heal`. Exit code 2 and one line for what the user can mend."""
    argv = sys.argv[1:] if argv is None else argv
    _log_above_bars()
    try:
        app(_chosen_preset(argv)).cli(args=argv, prog="steer-heal")
    except UserError as error:
        print(f"steer-heal: {error}", file=sys.stderr)
        sys.exit(2)


def _chosen_preset(argv: list[str]) -> str:
    """The preset named after `run`; its values are the defaults of the flags."""
    if len(argv) < 2 or argv[0] != "run" or argv[1].startswith("-"):
        return DEFAULT_PRESET
    if argv[1] not in PRESETS:
        close = difflib.get_close_matches(argv[1], PRESETS, 1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UserError(f"preset {argv[1]!r} is not known{hint}: choose {', '.join(PRESETS)}")
    return argv[1]


def _log_above_bars() -> None:
    """Log lines go through tqdm, so that a bar survives them."""
    from tqdm import tqdm

    logger.remove()
    logger.add(
        lambda line: tqdm.write(line, end="", file=sys.stderr),
        format="<green>{time:HH:mm:ss}</green> <level>{message}</level>",
        colorize=sys.stderr.isatty(),
    )


def app(preset: str) -> tyro.extras.SubcommandApp:
    verbs = tyro.extras.SubcommandApp()

    @verbs.command
    def run(
        preset: Positional[Annotated[str, tyro.conf.arg(help=f"one of {', '.join(PRESETS)}")]] = preset,
        config: Annotated[RunConfig, tyro.conf.arg(name="")] = PRESETS[preset],
    ) -> None:
        """Steer, distil, heal and bake a trait into a model, round after round."""
        from steer_heal import data, loop, rundir

        trait = data.load_trait(config.trait)
        folder = rundir.reopen(config) if config.resume else rundir.create(config, preset)
        loop.run(config, preset, folder, trait)

    return verbs


if __name__ == "__main__":
    main()
