"""`meteora`: one frozen dataclass and one function a command.

Exit status: 0 done; 1 the input was refused, with one line that says why; 2 wrong usage; 75 a training that SIGTERM
ended after saving, which the same command goes on with; 130 interrupted; 141 whoever read the output has gone.
"""

from __future__ import annotations

import dataclasses
import inspect as python_inspect
import io
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Union, get_type_hints

import tyro

from meteora_jax import compilation_cache
from meteora_jax.cli.bank import (
    BankAdd,
    BankCommand,
    BankList,
    BankRemove,
    BankRename,
    BankSubtract,
    bank_add,
    bank_list,
    bank_remove,
    bank_rename,
    bank_subtract,
)
from meteora_jax.cli.compose import Compose, compose
from meteora_jax.cli.demo import Demo, demo
from meteora_jax.cli.devices import quiet_libtpu
from meteora_jax.cli.evaluate import Evaluate, evaluate
from meteora_jax.cli.export import (
    ExportAdapter,
    ExportBank,
    ExportBase,
    ExportGates,
    ExportMerged,
    export_adapter,
    export_bank,
    export_base,
    export_gates,
    export_merged,
)
from meteora_jax.cli.generate import Generate, generate
from meteora_jax.cli.importing import (
    ImportAdapters,
    ImportBase,
    ImportEncoder,
    ImportGates,
    import_adapters,
    import_base,
    import_encoder,
    import_gates,
)
from meteora_jax.cli.index import (
    IndexAdd,
    IndexBuild,
    IndexCommand,
    IndexEvaluate,
    IndexQuery,
    IndexRemove,
    index_add,
    index_build,
    index_evaluate,
    index_query,
    index_remove,
)
from meteora_jax.cli.index_rank import IndexRank, index_rank
from meteora_jax.cli.inspect import Inspect, inspect
from meteora_jax.cli.plan import Plan, plan
from meteora_jax.cli.prepare import Prepare, prepare
from meteora_jax.cli.quantize import Quantize, quantize
from meteora_jax.cli.report import json_alone
from meteora_jax.cli.serve import Serve, serve
from meteora_jax.cli.tasks import TasksCheck, TasksCommand, TasksSplit, tasks_check, tasks_split
from meteora_jax.cli.throughput import Throughput, throughput
from meteora_jax.cli.train import (
    TrainAdapter,
    TrainBank,
    TrainGates,
    gates_by_recipe,
    train_adapter,
    train_bank,
    train_gates,
)
from meteora_jax.cli.train_retriever import TrainRetriever, train_retriever
from meteora_jax.config import InputError, Preempted
from meteora_jax.text import check_text

sub = tyro.conf.subcommand


@dataclass(frozen=True)
class Import:
    """Convert files of other formats into the folders that every other command reads."""

    what: (
        Annotated[ImportBase, sub("base")]
        | Annotated[ImportAdapters, sub("adapters")]
        | Annotated[ImportGates, sub("gates")]
        | Annotated[ImportEncoder, sub("encoder")]
    )


@dataclass(frozen=True)
class Export:
    """Convert this project's folders into the formats of others, or take some adapters out of a bank."""

    what: (
        Annotated[ExportAdapter, sub("adapter")]
        | Annotated[ExportMerged, sub("merged")]
        | Annotated[ExportBase, sub("base")]
        | Annotated[ExportGates, sub("gates")]
        | Annotated[ExportBank, sub("bank")]
    )


@dataclass(frozen=True)
class Train:
    """Train gates, one adapter, all adapters of a bank, or the retriever's encoder."""

    what: Any


def train_commands(gates: TrainGates) -> type[Train]:
    """`Train` with its commands; gates: what `train gates` is by its recipe, unless options change it."""
    commands = Union[  # noqa: UP007 - a value here, no annotation
        Annotated[TrainGates, sub("gates", default=gates)],
        Annotated[TrainAdapter, sub("adapter")],
        Annotated[TrainBank, sub("bank")],
        Annotated[TrainRetriever, sub("retriever")],
    ]
    own = {"__doc__": Train.__doc__}
    return make_dataclass("Train", [("what", commands)], bases=(Train,), frozen=True, namespace=own)


def commands_for(args: Sequence[str]) -> Any:
    """All commands, as these words need them."""
    return Union[  # noqa: UP007 - a value here, no annotation
        Annotated[Import, sub("import")],
        Annotated[Export, sub("export")],
        Annotated[Quantize, sub("quantize")],
        Annotated[BankCommand, sub("bank")],
        Annotated[Inspect, sub("inspect")],
        Annotated[IndexCommand, sub("index")],
        Annotated[Prepare, sub("prepare")],
        Annotated[TasksCommand, sub("tasks")],
        Annotated[train_commands(gates_by_recipe(args)), sub("train")],
        Annotated[Plan, sub("plan")],
        Annotated[Generate, sub("generate")],
        Annotated[Serve, sub("serve")],
        Annotated[Compose, sub("compose")],
        Annotated[Evaluate, sub("evaluate")],
        Annotated[Throughput, sub("throughput")],
        Annotated[Demo, sub("demo")],
    ]


ACTIONS = {
    ImportBase: import_base,
    ImportAdapters: import_adapters,
    ImportGates: import_gates,
    ImportEncoder: import_encoder,
    ExportAdapter: export_adapter,
    ExportMerged: export_merged,
    ExportBase: export_base,
    ExportGates: export_gates,
    ExportBank: export_bank,
    Quantize: quantize,
    BankAdd: bank_add,
    BankRemove: bank_remove,
    BankRename: bank_rename,
    BankSubtract: bank_subtract,
    BankList: bank_list,
    Inspect: inspect,
    IndexBuild: index_build,
    IndexAdd: index_add,
    IndexRemove: index_remove,
    IndexQuery: index_query,
    IndexEvaluate: index_evaluate,
    IndexRank: index_rank,
    Prepare: prepare,
    TasksCheck: tasks_check,
    TasksSplit: tasks_split,
    TrainGates: train_gates,
    TrainAdapter: train_adapter,
    TrainBank: train_bank,
    Plan: plan,
    TrainRetriever: train_retriever,
    Generate: generate,
    Serve: serve,
    Compose: compose,
    Evaluate: evaluate,
    Throughput: throughput,
    Demo: demo,
}


METAVARS = {  # of positional arguments whose field is not called like what stands there
    "adapters": "NAME=PEFT_DIR ...", "files": "[NAME=FILE ...]", "names": "NAME ...", "prompts": "[PROMPT ...]",
    "texts": "[TEXT ...]", "composites": "[N ...]",
}  # fmt: skip


def name_positionals() -> None:
    """Positional arguments are called by what stands there, BANK and not {PATH}, in every command's help."""
    for command in {owner for action in ACTIONS for owner in action.__mro__ if dataclasses.is_dataclass(owner)}:
        assert isinstance(command, type)
        hints = get_type_hints(command, include_extras=True)
        for name in python_inspect.get_annotations(command):
            hint = hints[name]
            if tyro.conf.Positional[Any].__metadata__[0] in getattr(hint, "__metadata__", ()):
                called = tyro.conf.arg(metavar=METAVARS.get(name, name.upper()))
                command.__annotations__[name] = Annotated[hint, called]


def check_texts(command: Any) -> None:
    """Refuses words that are not valid UTF-8; paths may be anything."""
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        if dataclasses.is_dataclass(value):
            check_texts(value)
        words = [value] if isinstance(value, str) else value if isinstance(value, tuple) else []
        for i, word in enumerate(words):
            if isinstance(word, str):
                name = field.name.replace("_", "-")
                check_text(word, name if isinstance(value, str) else f"{name}: word {i}")


WHOLE = (  # commands that write DEST as a whole
    ImportBase, ImportAdapters, ImportGates, ImportEncoder, ExportAdapter, ExportMerged, ExportBase, ExportGates,
    ExportBank, Quantize, BankSubtract, IndexBuild,
)  # fmt: skip
LESS_MEMORY = (
    "other programs may hold it; when training --max-length, --accumulate or --batch-size, else --adapter-slots or a "
    "quantised base take less"
)


def replaced(command: Any) -> Path | None:
    """The folder that a command writes as a whole, if it has one; a training looks after its own."""
    if isinstance(command, BankAdd | BankRemove | BankRename):
        return command.bank
    if isinstance(command, IndexAdd | IndexRemove):
        return command.index
    return command.dest if isinstance(command, WHOLE) else None


def parse(args: Sequence[str]) -> Any:
    """The command that these words are; exits with status 2 where they are none.

    Raises:
        InputError: as `gates_by_recipe`.
    """
    name_positionals()
    command = tyro.cli(
        commands_for(args),
        prog="meteora",
        description="One LLaMA-family model, many LoRA adapters inside, and nobody has to pick the adapter.",
        args=args,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    groups = Import | Export | Train | BankCommand | IndexCommand | TasksCommand
    return command.what if isinstance(command, groups) else command


def main(args: Sequence[str] | None = None) -> None:
    """Parses and runs one command; exits with the status that the module's docstring lists."""
    for stream in (sys.stdout, sys.stderr):  # what a terminal's encoding lacks is shown by its number
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        args = sys.argv[1:] if args is None else args
        if list(args) == ["--version"]:
            from meteora_jax import __version__

            print(f"meteora {__version__}")
            return
        command = parse(args)
        if not isinstance(command, Plan):  # XLA cannot read back what it compiled for TPUs that are not there
            compilation_cache.use()
        quiet_libtpu()
        check_texts(command)
        with json_alone(command, replaced(command)):
            ACTIONS[type(command)](command)
        if sys.stdout is not None:  # as where the shell has closed it
            sys.stdout.flush()  # here, where it is known what to do if nobody reads it any more
    except Preempted as e:
        print(e, file=sys.stderr)
        sys.exit(Preempted.status)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # who read the output has gone, as in `meteora --help | head`
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python says so once more when it ends
        sys.exit(128 + signal.SIGPIPE)
    except OSError as e:
        print(f"error: {e.filename}: {e.strerror}" if e.filename else f"error: {e}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as e:  # JAX's, of a device
        status, _, why = str(e).partition(": ")
        if status != "RESOURCE_EXHAUSTED":
            raise
        found = f"found too little ({why.partition('[')[0].strip()})"
        print(f"error: device memory: expected room for what this takes, {found}: {LESS_MEMORY}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
