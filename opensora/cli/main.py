"""`opensora`: parse, load the config, call one function; every failure is one line and a code.

Commands live beside this file and import what they need when they run, so that `--help` and
refusals are quick.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import typer

from opensora import __version__, interrupts
from opensora.cli import checkpoints, data, elsewhere, evaluate, inspect, run, serving
from opensora.errors import (
    RESTARTABLE,
    OpensoraError,
    Preempted,
    StorageError,
    UsageError,
    did_you_mean,
    tell_launcher,
)

# Typer may bring its own copy of click; its exceptions are reached through the public one.
UsageFault: Any = typer.BadParameter.__mro__[1]
ClickFault: Any = UsageFault.__mro__[1]
_TYPERS_INTERRUPT = 130

app = typer.Typer(
    name="opensora",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Open video generation and world-model training.",
    epilog="Exit codes: 0 done, 64 usage or config, 65 bad data, 66 checkpoint unusable, "
    "69 another rank was lost, 70 numerics, 71 out of memory, 74 disk or I/O, "
    "75 stopped and resumable, 124 no progress.",
)
app.add_typer(data.app, name="data", help="Render, probe and check training data.")
app.add_typer(evaluate.app, name="eval", help="Judge checkpoints, compare two, tabulate many.")
app.add_typer(inspect.config_app, name="config", help="Show configs and their schema.")
run.register(app)
serving.register(app)
inspect.register(app)
checkpoints.register(app)


@app.callback(invoke_without_command=True)
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        typer.echo(f"opensora {__version__}")
        raise typer.Exit


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with the code of its outcome.

    SIGTERM ends a command as Ctrl-C does: what is half written is removed, and the same command
    goes on. Training listens for itself. Under `opensora.cli.launch` the code goes to the launcher,
    and torchrun sees only those that another attempt may mend, because it restarts whatever fails.
    """
    interrupts.listen()
    try:
        code = invoke(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:  # while another one, or another outcome, was being told
        code = Preempted.exit_code
    interrupts.ignore()
    told = tell_launcher(code)
    sys.exit(0 if told and code not in RESTARTABLE else code)


def invoke(arguments: list[str]) -> int:
    """Run the command line; returns the exit code, with any error told on stderr."""
    command = typer.main.get_command(app)
    try:
        code = command.main(arguments, prog_name="opensora", standalone_mode=False)
        if code == _TYPERS_INTERRUPT:
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except typer.Exit as error:
        return error.exit_code
    except UsageFault as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)
            return UsageError.exit_code
        return _refuse(_usage(error), UsageError.exit_code)
    except ClickFault as error:
        return _refuse(error.format_message(), UsageError.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        return _refuse("interrupted; run the same command to go on", Preempted.exit_code)
    except OpensoraError as error:
        return _refuse(str(error), error.exit_code)
    except OSError as error:
        if error.errno is None:
            raise
        return _refuse(f"{error.filename or 'disk'}: {error.strerror}", StorageError.exit_code)


def _refuse(message: str, code: int) -> int:
    print(f"opensora: {' '.join(message.split())}", file=sys.stderr)
    return code


def _usage(error: Any) -> str:
    """A usage error with the command's own help and the nearest command."""
    message: str = error.format_message()
    context = error.ctx
    if context is None:
        return message
    commands = getattr(context.command, "commands", {})
    if commands and message.startswith("No such command"):
        found = message.split("'")[1]
        message = f"no command '{found}'.{did_you_mean(found, commands)}"
    option = str(getattr(error, "option_name", "")).replace("_", "-")
    if context.command.name == "sample" and option in elsewhere.SAMPLE:
        message = f"no option {error.option_name}: here it is {elsewhere.SAMPLE[option]}"
    return f"{message} (see: {context.command_path} --help)"
