"""Where a model may lie: what the verbs that use one accept, and how a table is given to them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from common.inference.predictor import Predictor
    from common.inference.saved import SavedModel

ModelArgument = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A run folder, a checkpoint, a client file, or an exported model.")
]
TableArgument = Annotated[Path, typer.Argument(metavar="TABLE", help="CSV or Parquet that fits the schema.")]
TargetOption = Annotated[
    str | None, typer.Option("--target", metavar="NAME", help="Which target, of several [default: the first].")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace the file that is there.")]
SkipBadOption = Annotated[bool, typer.Option("--skip-bad", help="Go on where cells do not fit the schema.")]


def load(path: Path, target: str | None = None) -> SavedModel:
    """A model and its document, from any of the places where one may lie; of several targets, that of one.

    Raises:
        CloisterError: there is none, or it is damaged, or it has no such target; the message says which.
    """
    return _whole(path).task(target)


def _whole(path: Path) -> SavedModel:
    from client.kept import newest
    from client.settings import load_client_file
    from common.errors import ModelError
    from common.inference import saved
    from server.folder import checkpoint, folder

    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError as error:  # a name that is too long, a link that leads to itself
        raise ModelError(f"{path}: cannot be used: {error.strerror}") from error
    if is_folder:
        return folder.saved_model(path)
    if not is_there:
        raise ModelError(f"{path}: no such file or folder; {EXPECTED}")
    if path.suffix.lower() in (".yaml", ".yml"):
        kept = newest(load_client_file(path).models)
        return saved.from_bytes(saved.read_bytes(kept), str(kept))
    if path.suffix.lower() == ".safetensors":
        if path.name == "model.safetensors" and (path.parent / "federation.yaml").is_file():
            return folder.saved_model(path.parent)
        if path.resolve().parent.name == checkpoint.FOLDER:
            return checkpoint.saved_model(path)
        return saved.from_bytes(saved.read_bytes(path), str(path))
    if path.suffix.lower() == ".pt":
        from common.inference.torch_file import from_torch

        return from_torch(saved.read_bytes(path), str(path))
    if path.suffix.lower() == ".onnx":
        raise ModelError(f"{path}: an ONNX file predicts and is evaluated; for this, give what it was exported from")
    raise ModelError(f"{path}: {EXPECTED}")


EXPECTED = "a model is a run folder, a checkpoint in one, a client file, or what `cloister export` wrote"


def predictor(path: Path, target: str | None = None) -> Predictor:
    """What predicts with the model that lies there. Raises as `load` does."""
    from common.inference import saved
    from common.inference.predictor import TorchPredictor

    if path.suffix.lower() == ".onnx" and path.is_file():
        needs("export", "onnxruntime")
        from common.inference.onnx_predictor import OnnxPredictor

        found = OnnxPredictor(saved.read_bytes(path), str(path))
        found.federation.alone(target or found.federation.data_schema.target.name)  # it has one, and says so
        return found
    return TorchPredictor(load(path, target))


def named(model: SavedModel) -> str:
    """What a file of it is called by default: after its federation, and of one of several targets after that, too."""
    name = model.federation.name
    target = re.sub(r"[^A-Za-z0-9._-]+", "-", model.federation.data_schema.target.name)
    return f"{name}-{target}" if model.whole else name


def needs(extra: str, *packages: str) -> None:
    """Raises `ConfigError` if packages are missing that an extra of ours brings."""
    from common.errors import ConfigError

    if absent := lacks(*packages):
        raise ConfigError([f"this needs {' and '.join(absent)}: pip install 'cloister[{extra}]'"])


def lacks(*packages: str) -> list[str]:
    """Those that are not installed."""
    from importlib.util import find_spec

    return [package for package in packages if find_spec(package) is None]


def check_out(out: Path, *, force: bool, inputs: tuple[Path, ...] = ()) -> None:
    """Raises `OutputError` where a file would be lost that is not to be replaced."""
    from common.errors import OutputError

    try:
        if any(out.resolve() == given.resolve() for given in inputs):
            raise OutputError(f"{out}: is what is read; name another file")
        if out.is_dir():
            raise OutputError(f"{out}: is a folder; name a file")
        if (out.exists() or out.is_symlink()) and not force:
            raise OutputError(f"{out}: is there already; --force replaces it")
        if not out.resolve().parent.is_dir():
            raise OutputError(f"{out.resolve().parent}: no such folder")
    except (OSError, RuntimeError) as error:  # a name that is too long, a link that leads to itself
        raise OutputError(f"{out}: cannot be used: {getattr(error, 'strerror', None) or error}") from error
