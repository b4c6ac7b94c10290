"""The `hf-vit` command, and the exit behaviour that every script in `conversion/` and `examples/` shares.

A subcommand is the `main` of the script of the same job; this file holds the table and nothing of the work itself.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


# Subcommand -> (script, what it does).
COMMANDS = {
    "convert": ("conversion/jax_to_safetensors.py", "Convert an original JAX checkpoint to a model folder."),
    "to-jax": ("conversion/safetensors_to_jax.py", "Write a model as a checkpoint of the JAX code."),
    "verify": ("conversion/verify_parity.py", "Compare a model with its original checkpoint, step by step."),
    "finetune": ("examples/finetune_trainer.py", "Fine-tune a model on a data set."),
    "pretrain": ("examples/pretrain.py", "Pre-train a model from scratch."),
    "evaluate": ("examples/eval.py", "Measure accuracy and calibration on a data set."),
    "predict": ("examples/predict.py", "Classify images."),
    "embed": ("examples/embed.py", "Write image features to parquet shards."),
    "search": ("examples/search.py", "Find similar images among embedded ones."),
    "few-shot": ("examples/few_shot.py", "Train a linear or nearest-neighbor classifier on features."),
    "explain": ("examples/explain.py", "Draw what a model attends to."),
    "export": ("examples/export.py", "Write a model for other libraries and runtimes."),
    "demo": ("examples/demo.py", "Convert, check, train and predict on small embedded data."),
}


class UsageError(ValueError):
    """A command line that cannot be carried out as it is written; ends a command with exit status 2."""


def run(main: Callable[[list[str]], Any], arguments: Sequence[str] | None = None) -> int:
    """Run the `main` of a command and return the exit status of the process.

    The status is 2 for wrong usage, 1 for failed work and 130 for Ctrl-C, each with one line on standard error;
    `--debug` anywhere on the command line shows the traceback instead.

    Args:
        main: Takes the arguments without `--debug`; an integer that it returns is the exit status, all else means 0.
        arguments: Those of the process by default.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        status = main([argument for argument in given if argument != "--debug"])
        return status if isinstance(status, int) else 0
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            raise
        print(f"error: {describe(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def describe(error: Exception) -> str:
    """Return an error as one line; of an unexpected type, with its name and how to see where it comes from."""
    line = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.filename:
        line = f"{error.filename}: {error.strerror}"
    if isinstance(error, (OSError, ValueError, ImportError, RuntimeError)) and line:
        return line
    return f"{type(error).__name__}: {line} (--debug shows the traceback)"


def find_script(name: str) -> Path:
    """Return the path of a script: packaged with the installed library, or in the checkout.

    Raises:
        FileNotFoundError: if the installation has neither.
    """
    package = Path(__file__).parent
    for root in (package / "scripts", package.parents[1]):
        if (root / name).is_file():
            return root / name
    raise FileNotFoundError(f"{name} is not part of this installation: run hf-vit from a checkout of the repository")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `hf-vit COMMAND ...` and return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print("usage: hf-vit COMMAND [--debug] ...   (hf-vit COMMAND --help lists the arguments)\n")
        for name, (_, text) in COMMANDS.items():
            print(f"  {name:<10}{text}")
        return 0 if given else 2
    if given[0] == "--version":
        from importlib.metadata import version

        print(version("hf-vit"))
        return 0
    return run(lambda rest: _run_script(given[0], rest), given[1:])


def _run_script(command: str, arguments: list[str]) -> Any:
    if command not in COMMANDS:
        from difflib import get_close_matches

        near = get_close_matches(command, COMMANDS, n=1)
        meant = f", did you mean {near[0]}?" if near else f": expected one of {', '.join(COMMANDS)}"
        raise UsageError(f"unknown command {command}{meant}")
    path = find_script(COMMANDS[command][0])
    sys.path.insert(0, str(path.parent))  # as `python SCRIPT` does: scripts import their siblings
    sys.argv[0] = f"hf-vit {command}"  # what usage lines show
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
