"""``squeezeheads COMMAND``: a file a command, each imported when it is asked for."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "plan": "show what a recipe would do and cost, and all that is wrong with it; trains nothing",
    "inspect": "the same with weights and data: which heads share a map, in which proportions, what that loses",
    "distill": "carry out a recipe: train students, compare them, save the best",
    "report": "write the page of a finished run anew",
    "evaluate": "measure a saved student on a recipe's test split",
    "demo": "the whole job on the digits that scikit-learn ships, in a few minutes",
}

USAGE = (
    "usage: squeezeheads COMMAND [...]\n\ncommands:\n"
    + "\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items())
    + "\n\n`squeezeheads COMMAND --help` says more."
)

GO_ON = {"inspect", "distill", "demo"}
"""Commands that keep checkpoints."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0, 2 for a mistake that the user can mend, 130 when stopped by Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from squeezeheads import __version__

        print(__version__)
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        from squeezeheads.errors import similar

        print(f"squeezeheads: {command!r} is no command.{similar(command, COMMANDS)}\n\n{USAGE}", file=sys.stderr)
        return 2
    # Read when transformers is imported: its notices about optional packages say nothing about this run.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Likewise: where the package kernels is installed, models would fetch code from the hub for what they compute.
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    from squeezeheads.errors import RecipeError, in_short

    try:
        code: int = importlib.import_module(f"squeezeheads.cli.{command}").main(rest)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read this has seen enough (`| head`); Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, as shells report it
    except RecipeError as error:
        print(f"squeezeheads {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        advice = "; start the same command again to go on from the last checkpoint" if command in GO_ON else ""
        print(f"squeezeheads {command}: stopped{advice}", file=sys.stderr)
        return 130  # 128 + SIGINT, as shells report it
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "squeezeheads":
            raise
        from squeezeheads.extras import how_to_install

        missing = _missing(error)
        told = in_short(error) if missing is None else f"the package {missing!r} is missing."
        print(f"squeezeheads {command}: {told} {how_to_install(missing)}", file=sys.stderr)
        return 2
    except Exception as error:
        from squeezeheads.files import disk_trouble

        trouble = disk_trouble(error)
        if trouble is None:
            raise
        advice = (
            " Make room and start the same command again: it goes on from what is whole." if command in GO_ON else ""
        )
        print(f"squeezeheads {command}: a file could not be written: {trouble}{advice}", file=sys.stderr)
        return 2


def _missing(error: BaseException) -> str | None:
    """The package that could not be imported: lazy imports of other libraries raise a nameless error from the real
    one."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, ModuleNotFoundError) and found.name is not None:
            return found.name.split(".")[0]
        found = found.__cause__ or found.__context__
    return None


def hide_foreign_bars() -> None:
    """Turns off transformers' bars for loading and saving weights, which would break up our own."""
    from transformers.utils import logging

    logging.disable_progress_bar()
