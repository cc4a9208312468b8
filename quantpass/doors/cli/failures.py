"""How commands end: the exit statuses, and what is printed of an exception."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

NO, BAD_INPUT, FAULT = 1, 2, 3
"""What was asked is not so (not fused, not legal, not equal); input that can't be used; a fault of quantpass."""

_OWN = Path(__file__).resolve().parents[2]
_MACHINERY = ("torch", "click", "importlib", "runpy", "contextlib", "functools")
"""Modules whose frames say nothing about a user's model."""


class BadInput(click.ClickException):
    """Input that can't be used: one line says what was given, what is accepted and what to do."""

    exit_code = BAD_INPUT


class Failing(click.Group):
    """A group of commands whose unexpected exceptions end with ``FAULT`` and a whole traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in their own order, not the alphabet's."""
        del ctx
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what a command does not explain is a fault of quantpass."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except ModuleNotFoundError as error:
            if error.name not in ("torch", "numpy"):
                raise
            raise BadInput(f"{ctx.invoked_subcommand} needs {error.name}, which is not installed here") from error
        except Exception:
            if os.environ.get("QUANTPASS_RAISE"):
                raise
            traceback.print_exc()
            click.echo(
                "\nThis is a fault of quantpass, not of what it was given. A report of it needs the text above, and "
                "the versions of quantpass and PyTorch.",
                err=True,
            )
            ctx.exit(FAULT)


@contextmanager
def explained(*also: type[Exception]) -> Iterator[None]:
    """What a door says about its input becomes one line, with the status of bad input."""
    expected: tuple[type[Exception], ...] = (TypeError, ValueError, *also)
    try:
        yield
    except expected as error:
        raise BadInput(str(error)) from error


@contextmanager
def models_own(what: str) -> Iterator[None]:
    """Exceptions of the user's code are shown with the user's frames alone."""
    try:
        yield
    except click.ClickException:
        raise
    except Exception as error:
        raise BadInput(f"{what} raised\n{users_frames(error)}") from error


@contextmanager
def running(model: Any, args: Sequence[Any]) -> Iterator[None]:
    """A door that captures ``model``: where the model fails without it too, the model's own error is shown."""
    try:
        yield
    except click.ClickException:
        raise
    except Exception:
        if callable(model):
            import torch

            with models_own("the model, called with its args and without quantpass,"), torch.no_grad():
                model(*args)
        raise


def users_frames(error: BaseException) -> str:
    """The traceback of ``error`` without the frames of quantpass, PyTorch and the interpreter's own machinery."""
    frames = traceback.extract_tb(error.__traceback__)
    users = [f for f in frames if _is_users(Path(f.filename))]
    return "".join([*traceback.format_list(users), *traceback.format_exception_only(error)]).rstrip()


def _is_users(path: Path) -> bool:
    if str(path).startswith("<"):
        return False
    files = [Path(file) for name in _MACHINERY if (file := getattr(sys.modules.get(name), "__file__", None))]
    folders = [_OWN, *(f.parent for f in files if f.name == "__init__.py")]
    return path not in files and not any(path.is_relative_to(folder) for folder in folders)
