"""Puts token shards and their tokenizer where the trainer reads them, and checks what lies there.

    python tools/prepare_data.py demo
    python tools/prepare_data.py jsonl train.jsonl.xz --val val.jsonl --tokenizer T.model --name N
    python tools/prepare_data.py download sp8192 --train-shards 10
    python tools/prepare_data.py verify data/datasets/fineweb10B_sp8192

Every command but `verify` leaves, under --data-dir,

    datasets/<name>/fineweb_train_%06d.bin   training stream
    datasets/<name>/fineweb_val_%06d.bin     validation stream
    datasets/<name>/fineweb_val_bytes_%06d.bin    raw bytes of its tokens, if text is transformed
    datasets/<name>/manifest.json            what the streams are: counts, bytes, hashes, source
    tokenizers/<tokenizer>.model

A stream is documents in order, each the id BOS followed by its pieces; one may span two shards.
A dataset is built beside its place and renamed; a download appears file by file, checked, its
manifest last. Exit codes: 0 done; 1 a line `error: ...` that names the file, the value and the
bound (or whatever `verify` found); 2 usage.
"""

from __future__ import annotations

import argparse
import ast
import functools
import gzip
import hashlib
import importlib
import importlib.util
import io
import itertools
import json
import lzma
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import time
import tokenize
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import IO, NamedTuple, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import sentencepiece

from tools import caseops
from tools.command import number_between
from tools.runs import sha256_of
from train_gpt import (
    BOS_ID,
    SHARD_HEADER_INTS,
    SHARD_MAGIC,
    SHARD_VERSION,
    DataError,
    GolfError,
    TokenBytes,
    bytes_of_targets,
    find_shards,
    is_transformed,
    load_tokenizer,
    read_shard,
    token_bytes,
    write_atomically,
)

Item = TypeVar("Item")

TRAIN, VAL, SIDECAR = "train", "val", "val_bytes"
SHARD_NAME = re.compile(r"fineweb_(train|val|val_bytes)_\d{6}\.bin")
MANIFEST = "manifest.json"
TOKENS_AT_ONCE = 1 << 22  # bounds the temporary arrays of a pass over a shard


# ==================================================================================================
# 1  Progress
# ==================================================================================================


class Progress:
    """A bar on a terminal where tqdm is installed, else a line on stderr every few seconds."""

    SECONDS_BETWEEN_LINES = 5.0

    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.last_line = time.monotonic()
        self.bar = None
        if sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
            # Imported by name: an optional package, which the type checker need not have.
            tqdm = importlib.import_module("tqdm").tqdm
            self.bar = tqdm(total=total, desc=label, unit=unit, unit_scale=True, leave=False)

    def reach(self, done: int) -> None:
        """Reports that `done` of the total units are finished."""
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
        elif time.monotonic() - self.last_line > self.SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            share = 100 * done / max(1, self.total)
            print(f"{self.label}: {share:.0f} % of {self.total:,} {self.unit}", file=sys.stderr)

    def close(self) -> None:
        """Takes the bar off the terminal."""
        if self.bar is not None:
            self.bar.close()


def track(items: Sequence[Item], label: str, unit: str) -> Iterator[Item]:
    """The items in order, with progress shown as they are worked off."""
    with closing(Progress(label, len(items), unit)) as progress:
        for done, item in enumerate(items, start=1):
            yield item
            progress.reach(done)


# ==================================================================================================
# 2  Documents in JSON lines
# ==================================================================================================


class Document(NamedTuple):
    """One text and where it stands, as "file:line" for messages."""

    text: str
    origin: str


def document_hash(text: str) -> bytes:
    """16 bytes that are equal for texts that differ in white space only."""
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()


def open_decompressed(path: Path, raw: IO[bytes]) -> AbstractContextManager[Iterable[bytes]]:
    """A stream of the lines in `raw`, which holds `path` as stored.

    Raises: DataError for a name that ends in none of .jsonl, .jsonl.xz, .jsonl.gz.
    """
    if path.name.endswith(".jsonl"):
        return raw
    if path.name.endswith(".jsonl.xz"):
        return lzma.open(raw)
    if path.name.endswith(".jsonl.gz"):
        return gzip.open(raw)
    raise DataError(f"{path}: name must end in .jsonl, .jsonl.xz or .jsonl.gz")


def parse_document(line: bytes, origin: str) -> Document:
    """The document of one JSON line.

    Raises: DataError unless it is an object with a string "text" that UTF-8 can hold.
    """
    try:
        text = json.loads(line)["text"]
        text.encode()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f'{origin}: not a JSON object with a string "text" ({reason})') from None
    return Document(text, origin)


def read_jsonl(paths: Sequence[Path], label: str) -> Iterator[Document]:
    """Documents of the files in order, read as a stream; empty lines and blank texts are left out.

    Raises: DataError naming file and line for damaged input.
    """
    finished = 0
    total = sum(path.stat().st_size for path in paths)
    with closing(Progress(label, total, "B")) as progress:
        for path in paths:
            number = 0
            with path.open("rb") as raw, open_decompressed(path, raw) as lines:
                try:
                    for number, line in enumerate(lines, start=1):
                        progress.reach(finished + raw.tell())
                        if line.strip():
                            document = parse_document(line, f"{path}:{number}")
                            if document.text.strip():
                                yield document
                except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
                    raise DataError(f"{path}: damaged after line {number}: {error}") from None
            finished += path.stat().st_size


def check_inputs(paths: Iterable[Path]) -> None:
    """Raises DataError for a file that is missing or that `read_jsonl` could not open."""
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        with path.open("rb") as raw:
            open_decompressed(path, raw)


@dataclass(frozen=True)
class JsonlSource:
    """Training and validation texts of JSON-lines files.

    Validation is `val_files` where given, else the documents of `files` whose hash falls into the
    first `val_fraction` of the range; equal texts then land on the same side.
    """

    files: tuple[Path, ...]
    val_files: tuple[Path, ...]
    val_fraction: float

    @functools.cached_property
    def held_out(self) -> frozenset[bytes]:
        """Hashes of the documents in `val_files`."""
        documents = read_jsonl(self.val_files, "hashing validation documents")
        return frozenset(document_hash(document.text) for document in documents)

    def val_texts(self) -> Iterator[str]:
        """Validation texts, in file order."""
        if self.val_files:
            return (document.text for document in read_jsonl(self.val_files, "validation"))
        return self._split_by_hash("validation", wanted=True)

    def train_texts(self) -> Iterator[str]:
        """Training texts, in file order.

        Raises: DataError at the first one that is also a validation document.
        """
        if not self.val_files:
            yield from self._split_by_hash("training", wanted=False)
            return
        held_out = self.held_out
        for document in read_jsonl(self.files, "training"):
            if document_hash(document.text) in held_out:
                raise DataError(f"{document.origin}: this document is also a validation document")
            yield document.text

    def _split_by_hash(self, label: str, *, wanted: bool) -> Iterator[str]:
        bound = self.val_fraction * 2.0**64
        for document in read_jsonl(self.files, label):
            key = int.from_bytes(document_hash(document.text)[:8], "big")
            if (key < bound) == wanted:
                yield document.text


# ==================================================================================================
# 3  Demo corpus
# ==================================================================================================
# English prose that every Python carries: the topics of `help()`, and the docstrings and comments
# of its standard library. Sources are parsed, never imported, so nothing runs.

# Folders that some distributions leave out or that users add to: without them the corpus of one
# Python version is nearly the same everywhere.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
)
DEMO_NAME, DEMO_TOKENIZER = "demo_sp1024", "demo_1024_bpe.model"
DEMO_RECIPE = {
    "version": 1, "vocab_size": 1024,
    "shard_tokens": 200_000,  # several shards, so that two ranks have something to share
    "corpus_bytes_min": 2_000_000,
    "val_bytes_min": 64_000,  # the document that crosses it is the last one
    "document_chars_min": 200, "document_chars_max": 4_000,
    "paragraph_chars_max": 3_000,  # longer ones are tables
    "marks_percent_max": 22,  # of a paragraph's characters
}
COMMENT_BLOCK = re.compile(r"^[ \t]*#.*(?:\n[ \t]*#.*)+", re.MULTILINE)
COMMENT_MARK = re.compile(r"^[ \t]*#+:?", re.MULTILINE)
MARK = re.compile(r"[^\w\s]|[\d_]")  # neither letter nor space
RULE_LINE = re.compile(r"^\s*[^\w\s]{3,}\s*$", re.MULTILINE)
PARAGRAPH_BREAK = re.compile(r"\n\s*\n")


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph, white space collapsed, reads as text and not as a session or table."""
    marks = len(MARK.findall(paragraph))
    return (
        not paragraph.startswith(">>>")
        and len(paragraph) <= DEMO_RECIPE["paragraph_chars_max"]
        and 100 * marks <= DEMO_RECIPE["marks_percent_max"] * len(paragraph)
    )


def paragraphs_of(text: str) -> Iterator[str]:
    """Prose paragraphs of a docstring or comment, each on one line."""
    for block in PARAGRAPH_BREAK.split(RULE_LINE.sub("\n", text)):
        paragraph = " ".join(block.split())
        if paragraph and is_prose(paragraph):
            yield paragraph


def statements_below(node: ast.AST) -> Iterator[ast.AST]:
    """All statements inside a node, top to bottom; expressions, most of any tree, are skipped."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield child
            yield from statements_below(child)


def texts_of_module(path: Path) -> Iterator[str]:
    """Docstrings of a source file from top to bottom, then its comment blocks.

    A file that this Python cannot read or parse gives nothing.
    """
    try:
        with tokenize.open(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source = file.read()
            tree = ast.parse(source)
    except (SyntaxError, ValueError, OSError):
        return
    for node in [tree, *statements_below(tree)]:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
    for block in COMMENT_BLOCK.findall(source):
        yield COMMENT_MARK.sub("", block)


def pydoc_topics(library: Path) -> list[tuple[str, str]]:
    """(topic, text) of what `help("topic")` shows, by name; empty where Python came without it."""
    path = library / "pydoc_data" / "topics.py"
    if not path.is_file():
        return []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            return sorted(ast.literal_eval(node.value).items())
    return []


def pack_documents(paragraphs: Iterable[str]) -> Iterator[str]:
    """Documents of consecutive paragraphs, each as long as it may be; short rests are dropped."""
    shortest, longest = DEMO_RECIPE["document_chars_min"], DEMO_RECIPE["document_chars_max"]
    document = ""
    for paragraph in itertools.chain(paragraphs, [" " * longest]):
        if len(document) + len(paragraph) < longest:
            document = f"{document} {paragraph}".strip()
            continue
        if len(document) >= shortest:
            yield document
        document = paragraph


def library_modules(library: Path) -> Iterator[Path]:
    """Source files of the standard library, in an order that names alone decide."""
    for folder, subfolders, names in os.walk(library):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def drop_repeats(paragraphs: Iterable[str], seen: set[int]) -> Iterator[str]:
    """The paragraphs that are new and have no run of `SHINGLE_WORDS` words in common with `seen`.

    `seen` takes the hashes of all paragraphs and of all their runs of words.
    """
    for paragraph in paragraphs:
        hashes = {hash(paragraph), *shingle_hashes([paragraph]).tolist()}
        if hashes.isdisjoint(seen):
            yield paragraph
        seen |= hashes


def harvest_documents(library: Path) -> list[str]:
    """Documents of the Python whose standard library lies in `library`, ordered by their hash.

    No paragraph and no run of words occurs twice: training text stays out of the validation part.
    Raises: DataError if there is less text than the recipe asks for.
    """
    topics = ([text] for _, text in pydoc_topics(library))
    sources = [*topics, *map(texts_of_module, library_modules(library))]
    seen: set[int] = set()
    documents: list[str] = []
    for texts in track(sources, "reading the standard library", "files"):
        paragraphs = (paragraph for text in texts for paragraph in paragraphs_of(text))
        documents.extend(pack_documents(drop_repeats(paragraphs, seen)))
    size, bound = sum(len(text.encode()) for text in documents), DEMO_RECIPE["corpus_bytes_min"]
    if size < bound:
        raise DataError(
            f"{library}: {size:,} B of documentation, at least {bound:,} B are needed "
            "(a Python without its sources? use `jsonl` with text of your own)"
        )
    return sorted(documents, key=document_hash)


def split_demo(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """(training, validation) documents; the first ones by hash are held out."""
    size = 0
    for count, text in enumerate(documents, start=1):
        size += len(text.encode())
        if size >= DEMO_RECIPE["val_bytes_min"]:
            return list(documents[count:]), list(documents[:count])
    raise DataError(f"demo corpus: {size:,} B, all of it would be validation text")


# ==================================================================================================
# 4  Tokenizer
# ==================================================================================================

VOCAB_SIZE_MAX = 1 << 16  # ids are stored in 16 bits
TOKENIZER_TEXT_BYTES = 300_000_000  # SentencePiece holds its training text in memory, about 4x this


def head_of(texts: Iterable[str], size_bytes: int) -> Iterator[str]:
    """Texts from the front until `size_bytes` of UTF-8 are reached."""
    for text in texts:
        yield text
        size_bytes -= len(text.encode())
        if size_bytes <= 0:
            return


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path, *,
                    transformed: bool = False) -> None:
    """Writes a SentencePiece BPE model of `vocab_size` pieces with the competition's settings.

    One for transformed text sees case operators as letters: they may merge into words.
    The same texts give the same file: one thread, no sampling, no paths inside.
    Raises: DataError if the texts yield fewer pieces, and whatever `texts` raises.
    """
    model, failures = io.BytesIO(), []

    def guarded() -> Iterator[str]:
        # SentencePiece turns an exception of its input into a RuntimeError without the cause.
        try:
            head = head_of(texts, TOKENIZER_TEXT_BYTES)
            yield from map(caseops.transform, head) if transformed else head
        except GolfError as error:
            failures.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=guarded(), model_writer=model, model_type="bpe",
            vocab_size=vocab_size, hard_vocab_limit=False, character_coverage=0.999,
            byte_fallback=True, split_digits=True, normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False, pad_id=0, bos_id=BOS_ID, eos_id=2, unk_id=3,
            max_sentence_length=1 << 30,  # longer documents would be left out
            # An operator and a letter are of two scripts, and so are a letter and a full stop.
            split_by_unicode_script=not transformed,
            required_chars=caseops.OPERATORS if transformed else "",
            num_threads=1, minloglevel=2,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        reason = str(error).splitlines()[0]
        raise DataError(f"tokenizer of {vocab_size} pieces: SentencePiece: {reason}") from None
    path.write_bytes(model.getvalue())
    pieces = open_tokenizer(path).vocab_size()
    if pieces != vocab_size:
        raise DataError(f"tokenizer of {vocab_size} pieces: the text yields only {pieces}")


def open_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """The tokenizer in `path`, whatever its size. Raises: DataError as `load_tokenizer` does."""
    try:
        size = sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()
    except (OSError, RuntimeError):
        size = 0  # load_tokenizer finds the words for it
    return load_tokenizer(path, size)


def check_tokenizer(tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    """Raises DataError for a tokenizer whose shards the trainer could not read or count."""
    size, bos = tokenizer.vocab_size(), tokenizer.bos_id()
    if size > VOCAB_SIZE_MAX:
        raise DataError(f"tokenizer of {size:,} pieces: shards hold ids below {VOCAB_SIZE_MAX:,}")
    if bos != BOS_ID:
        raise DataError(f"tokenizer: BOS is id {bos}, it must be {BOS_ID}")
    token_bytes(tokenizer)


# ==================================================================================================
# 5  Encoding and writing
# ==================================================================================================

TOKEN_BYTES_MAX = (1 << 16) - 1  # what a side-car can say of one token
CHARS_PER_BATCH = 1 << 20  # work for one process; large enough to hide the cost of handing it over
BATCHES_PER_WORKER = 2


class Encoded(NamedTuple):
    """Some documents as one stream; texts that normalise to nothing are left out."""

    tokens: np.ndarray  # uint16, each document as BOS and its pieces
    raw_bytes: int  # UTF-8 length of the texts before normalisation
    sidecar: np.ndarray | None = None  # uint16, raw bytes of every token, if they were wanted


@functools.cache
def worker_tokenizer(path: str) -> sentencepiece.SentencePieceProcessor:
    """The tokenizer in `path`, opened once in each process."""
    return sentencepiece.SentencePieceProcessor(model_file=path)


def encode_batch(texts: Sequence[str], tokenizer_path: str, count_bytes: bool = False) -> Encoded:
    """The texts as a stream of tokens, transformed if the tokenizer is for such text."""
    tokenizer, written = worker_tokenizer(tokenizer_path), list(texts)
    if is_transformed(tokenizer):
        written = list(map(caseops.transform, texts))
    elif count_bytes:
        raise DataError(f"{tokenizer_path}: raw bytes of tokens are for transformed text")
    pieces, counts = tokenizer.encode(written, out_type=int), [np.empty(0, np.int64)]
    if count_bytes:
        for text in written:
            ends = caseops.token_ends(tokenizer, text)
            counts += [np.zeros(min(1, len(ends)), np.int64), caseops.token_raw_bytes(text, ends)]
    sidecar = np.concatenate(counts)
    if sidecar.max(initial=0) > TOKEN_BYTES_MAX:
        raise DataError(f"a token stands for {sidecar.max()} bytes, at most {TOKEN_BYTES_MAX}")
    kept = [(text, ids) for text, ids in zip(texts, pieces, strict=True) if ids]
    stream = itertools.chain.from_iterable([BOS_ID, *ids] for _, ids in kept)
    tokens = np.fromiter(stream, dtype=np.uint16)
    return Encoded(tokens, sum(len(text.encode()) for text, _ in kept),
                   sidecar.astype(np.uint16) if count_bytes else None)


def batches_of(texts: Iterable[str]) -> Iterator[list[str]]:
    """Consecutive texts in lists of about `CHARS_PER_BATCH`."""
    batch: list[str] = []
    room = CHARS_PER_BATCH
    for text in texts:
        batch.append(text)
        room -= len(text)
        if room <= 0:
            yield batch
            batch, room = [], CHARS_PER_BATCH
    if batch:
        yield batch


def encode_texts(texts: Iterable[str], tokenizer_path: Path, workers: int, *,
                 count_bytes: bool = False) -> Iterator[Encoded]:
    """The texts as tokens, in order, encoded by `workers` processes.

    Only a few batches per process exist at a time, however long the input is.
    """
    path = str(tokenizer_path)
    if workers == 1:
        yield from (encode_batch(batch, path, count_bytes) for batch in batches_of(texts))
        return
    with ProcessPoolExecutor(workers) as pool:
        pending: deque[Future[Encoded]] = deque()
        for batch in batches_of(texts):
            pending.append(pool.submit(encode_batch, batch, path, count_bytes))
            if len(pending) > BATCHES_PER_WORKER * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def shard_path(folder: Path, split: str, number: int) -> Path:
    """Where shard `number` of a split lies."""
    return folder / f"fineweb_{split}_{number:06d}.bin"


def sidecar_files(folder: Path) -> list[Path]:
    """The files that state the raw bytes of every validation token; most datasets have none."""
    return sorted(folder.glob(f"fineweb_{SIDECAR}_*.bin"))


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Writes token ids in the competition's format."""
    header = np.zeros(SHARD_HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, tokens.size
    write_atomically(path, header.tobytes() + tokens.astype("<u2").tobytes())


class ShardWriter:
    """Writes a stream as shards of a fixed size, the last one shorter."""

    def __init__(self, folder: Path, split: str, shard_tokens: int) -> None:
        self.folder, self.split = folder, split
        self.buffer = np.empty(shard_tokens, dtype=np.uint16)
        self.filled = self.shards = 0

    def write(self, rest: np.ndarray) -> None:
        """Adds to the stream."""
        while len(rest):
            taken = rest[: len(self.buffer) - self.filled]
            self.buffer[self.filled : self.filled + len(taken)] = taken
            self.filled, rest = self.filled + len(taken), rest[len(taken) :]
            if self.filled == len(self.buffer):
                self.close()

    def close(self) -> None:
        """Writes what has not been written yet."""
        if self.filled:
            path = shard_path(self.folder, self.split, self.shards)
            write_shard(path, self.buffer[: self.filled])
            self.filled, self.shards = 0, self.shards + 1


def write_split(folder: Path, split: str, encoded: Iterable[Encoded], shard_tokens: int) -> int:
    """Writes a stream, and its side-car if there is one, as shards; returns its raw bytes.

    Raises: DataError if there are no documents.
    """
    writers = [ShardWriter(folder, name, shard_tokens) for name in (split, f"{split}_bytes")]
    raw_bytes = 0
    for part in encoded:
        raw_bytes += part.raw_bytes
        for writer, values in zip(writers, (part.tokens, part.sidecar), strict=True):
            if values is not None:
                writer.write(values)
    for writer in writers:
        writer.close()
    if not raw_bytes:
        raise DataError(f"{folder.name}: no {split} documents, at least 1 is needed")
    return raw_bytes


def count_documents(tokens: np.ndarray) -> int:
    """Documents that begin in a stretch of a stream."""
    starts = range(0, len(tokens), TOKENS_AT_ONCE)
    return sum(
        int(np.count_nonzero(tokens[start : start + TOKENS_AT_ONCE] == BOS_ID)) for start in starts
    )


def count_bytes(shards: Sequence[np.ndarray], table: TokenBytes) -> int:
    """Bytes of text that the token table counts for a stream, which begins with BOS."""
    total, previous = 0, BOS_ID
    for shard in track(shards, "counting bytes", "shards"):
        for start in range(0, len(shard), TOKENS_AT_ONCE):
            target = np.asarray(shard[start : start + TOKENS_AT_ONCE])
            before = np.concatenate([np.array([previous], dtype=target.dtype), target[:-1]])
            total += int(bytes_of_targets(before, target, table).sum(dtype=np.int64))
            previous = int(target[-1])
    return total


def measure_streams(
    shards: Mapping[str, Sequence[np.ndarray]], table: TokenBytes
) -> dict[str, int]:
    """The counts that a manifest states, from the shards of both streams."""
    counts = {}
    for split in (TRAIN, VAL):
        counted = track(shards[split], f"counting {split} documents", "shards")
        counts[f"{split}_documents"] = sum(map(count_documents, counted))
        counts[f"{split}_tokens"] = sum(map(len, shards[split]))
        counts[f"{split}_shards"] = len(shards[split])
    return counts | {"val_bytes": count_bytes(shards[VAL], table)}


def write_manifest(folder: Path, manifest: Mapping[str, object]) -> None:
    """Writes the manifest of a dataset folder."""
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def describe_files(folder: Path, known: Mapping[str, str | None]) -> dict[str, object]:
    """Size and SHA-256 of every shard in a dataset folder, by name; `known` hashes are trusted."""
    paths = sorted(path for path in folder.iterdir() if SHARD_NAME.fullmatch(path.name))
    return {
        path.name: {
            "bytes": path.stat().st_size, "sha256": known.get(path.name) or sha256_of(path),
        }
        for path in track(paths, "SHA-256", "files")
    }


def describe_dataset(
    folder: Path,
    tokenizer_path: Path,
    vocab_size: int,
    known: Mapping[str, str | None],
) -> dict[str, object]:
    """The entries that every manifest has: tokenizer, counts of the streams, files."""
    shards = {
        split: [read_shard(path) for path in find_shards(folder, split)] for split in (TRAIN, VAL)
    }
    return {
        "tokenizer": tokenizer_path.name, "tokenizer_sha256": sha256_of(tokenizer_path),
        "vocab_size": vocab_size,
        **measure_streams(shards, token_bytes(load_tokenizer(tokenizer_path, vocab_size))),
        "files": describe_files(folder, known),
    }


@dataclass(frozen=True)
class BuildPlan:
    """One dataset to be built from texts, with the tokenizer that exists or one to be trained."""

    name: str
    data_dir: Path
    train_texts: Callable[[], Iterable[str]]
    val_texts: Callable[[], Iterable[str]]
    tokenizer_name: str
    tokenizer_source: Path | None  # None: train one of `vocab_size` pieces on the training texts
    vocab_size: int
    shard_tokens: int
    workers: int
    transformed: bool  # whether a tokenizer to be trained is for text with case operators
    provenance: dict[str, object]  # manifest entries: source, revision, ...

    @property
    def folder(self) -> Path:
        """Where the shards go."""
        return self.data_dir / "datasets" / self.name

    @property
    def tokenizer_path(self) -> Path:
        """Where the tokenizer goes."""
        return self.data_dir / "tokenizers" / self.tokenizer_name


def write_dataset(plan: BuildPlan, folder: Path, tokenizer_path: Path) -> None:
    """Fills `folder` with the plan's shards and manifest, encoded by the tokenizer given."""
    tokenizer = load_tokenizer(tokenizer_path, plan.vocab_size)
    check_tokenizer(tokenizer)
    transformed, raw_bytes = is_transformed(tokenizer), {}
    # Validation first: it is short, so that what is wrong with it is known soon.
    for split, texts in ((VAL, plan.val_texts), (TRAIN, plan.train_texts)):
        encoded = encode_texts(texts(), tokenizer_path, plan.workers,
                               count_bytes=transformed and split == VAL)
        raw_bytes[f"{split}_raw_bytes"] = write_split(folder, split, encoded, plan.shard_tokens)
    described = describe_dataset(folder, tokenizer_path, plan.vocab_size, known={})
    manifest = {"name": plan.name, "transform": "caseops" if transformed else None,
                **plan.provenance, **raw_bytes, **described}
    write_manifest(folder, manifest)


def build_dataset(plan: BuildPlan) -> None:
    """Builds a dataset beside its place and moves it there, over an older one if need be."""
    plan.folder.parent.mkdir(parents=True, exist_ok=True)
    plan.tokenizer_path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=plan.data_dir) as staging_name:
        staging = Path(staging_name)
        tokenizer_path = staging / plan.tokenizer_name
        if plan.tokenizer_source is None:
            print(f"training a tokenizer of {plan.vocab_size:,} pieces")
            train_tokenizer(plan.train_texts(), plan.vocab_size, tokenizer_path,
                            transformed=plan.transformed)
        else:
            shutil.copyfile(plan.tokenizer_source, tokenizer_path)
        folder = staging / plan.name
        folder.mkdir()
        write_dataset(plan, folder, tokenizer_path)
        if plan.folder.exists():
            os.rename(plan.folder, staging / "replaced")
        os.rename(folder, plan.folder)
        os.replace(tokenizer_path, plan.tokenizer_path)


def read_manifest(folder: Path) -> dict[str, object] | None:
    """The manifest of a dataset folder, None where there is none or it is no JSON object."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def print_summary(folder: Path, tokenizer_path: Path) -> None:
    """Prints what a dataset holds and the settings that make the trainer read it."""
    manifest = read_manifest(folder) or {}
    for split in (TRAIN, VAL):
        documents, tokens = manifest[f"{split}_documents"], manifest[f"{split}_tokens"]
        shards = manifest[f"{split}_shards"]
        print(f"{split:6}{documents:>12,} documents{tokens:>16,} tokens{shards:>6,} shards")
    print(f"validation bytes {manifest['val_bytes']:,} decoded", end="")
    print(f", {manifest['val_raw_bytes']:,} raw" if "val_raw_bytes" in manifest else "")
    print(f"DATA_PATH={folder} TOKENIZER_PATH={tokenizer_path} VOCAB_SIZE={manifest['vocab_size']}")


# ==================================================================================================
# 6  Download
# ==================================================================================================

DOWNLOADS_AT_ONCE = 4
PUBLISHED_VAL_DOCUMENTS = 50_000


class Variant(NamedTuple):
    """One published export on the Hugging Face hub; file names are unique inside a repository."""

    repository: str
    dataset: str
    tokenizer: str
    vocab_size: int


CASEOPS = "lossless_caps_caseops_v1_reserved"
VARIANTS = {
    "sp1024": Variant(
        "willdepueoai/parameter-golf", "fineweb10B_sp1024", "fineweb_1024_bpe.model", 1024
    ),
    "sp4096": Variant(
        "kevclark/parameter-golf", "fineweb10B_sp4096", "fineweb_4096_bpe.model", 4096
    ),
    "sp8192": Variant(
        "kevclark/parameter-golf", "fineweb10B_sp8192", "fineweb_8192_bpe.model", 8192
    ),
    "caseops": Variant(
        "romeerp/parameter-golf-caseops-v1",
        f"fineweb10B_sp8192_{CASEOPS}",
        f"fineweb_8192_bpe_{CASEOPS}.model",
        8192,
    ),
}


class RemoteFile(NamedTuple):
    """One file of a repository and its place here."""

    remote: str  # path inside the repository
    local: Path
    size_bytes: int
    sha256: str | None  # None where the hub keeps no SHA-256 of it


class Hub(NamedTuple):
    """One commit of a dataset repository."""

    library: ModuleType  # huggingface_hub
    repository: str
    commit: str
    endpoint: str | None


def import_hub() -> ModuleType:
    """The package huggingface_hub, which only downloads need."""
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise DataError("huggingface_hub is not installed: pip install huggingface_hub") from None
    utilities = importlib.import_module("huggingface_hub.utils")
    utilities.disable_progress_bars()
    utilities.logging.set_verbosity_error()  # what fails for good is reported here, in one line
    return hub


def hub_error(repository: str, error: Exception) -> DataError:
    """The one-line form of whatever the hub's client raised."""
    lines = str(error).strip().splitlines() or [""]
    return DataError(
        f"{repository}: {type(error).__name__}: {lines[0]} (network and --revision as they should "
        "be? a later run goes on where this one stopped; `demo` and `jsonl` work offline)"
    )


def list_remote(variant: Variant, revision: str, data_dir: Path) -> tuple[Hub, list[RemoteFile]]:
    """The commit that `revision` names and the variant's files in it, tokenizer first.

    Files are found by name and parent folder, for the exports lie at different depths.
    Raises: DataError if the hub is out of reach or lacks the variant.
    """
    library, endpoint = import_hub(), os.environ.get("HF_ENDPOINT") or None
    try:
        info = library.HfApi(endpoint=endpoint).dataset_info(
            variant.repository, revision=revision, files_metadata=True
        )
    except Exception as error:  # the client's HTTP library, and so its errors, differ by version
        raise hub_error(variant.repository, error) from None
    folder = data_dir / "datasets" / variant.dataset
    tokenizers, shards = [], []
    for item in sorted(info.siblings or [], key=lambda item: item.rfilename):
        path = Path(item.rfilename)
        sha256 = item.lfs.sha256 if item.lfs else None
        if path.name == variant.tokenizer:
            local = data_dir / "tokenizers" / path.name
            tokenizers.append(RemoteFile(item.rfilename, local, item.size or 0, sha256))
        elif path.parent.name == variant.dataset and SHARD_NAME.fullmatch(path.name):
            shards.append(RemoteFile(item.rfilename, folder / path.name, item.size or 0, sha256))
    if not tokenizers or not shards:
        missing = variant.dataset if tokenizers else variant.tokenizer
        raise DataError(f"{variant.repository} at {info.sha}: no {missing}")
    return Hub(library, variant.repository, info.sha, endpoint), [tokenizers[0], *shards]


def split_of(path: Path) -> str | None:
    """The split that a shard's name tells, None for other files."""
    match = SHARD_NAME.fullmatch(path.name)
    return match[1] if match else None


def select_files(files: Sequence[RemoteFile], train_shards: int | None) -> list[RemoteFile]:
    """Tokenizer, all validation files and the first `train_shards` training shards (None: all).

    Training shards that are already here stay part of the dataset, for the trainer reads them.
    Raises: DataError for too few shards, or for shards here that the repository lacks.
    """
    train = [file for file in files if split_of(file.local) == TRAIN]
    wanted = len(train) if train_shards is None else train_shards
    if not 1 <= wanted <= len(train):
        raise DataError(f"--train-shards {wanted}: the repository holds {len(train)}, at least 1")
    folder = train[0].local.parent
    known = {file.local for file in files}
    for path in folder.glob("fineweb_*.bin"):
        if path not in known:
            raise DataError(f"{path}: not part of the published export; move it away")
    left_out = {file for file in train[wanted:] if not file.local.exists()}
    return [file for file in files if file not in left_out]


def check_file(path: Path, file: RemoteFile, vocab_size: int) -> None:
    """Raises DataError unless `path` has the size, the SHA-256 and the shard header it should."""
    size = path.stat().st_size
    if size != file.size_bytes:
        raise DataError(f"{path}: {size:,} B, the hub has {file.size_bytes:,} B")
    if file.sha256 is not None and sha256_of(path) != file.sha256:
        raise DataError(f"{path}: SHA-256 is not the hub's {file.sha256}")
    split = split_of(file.local)
    if split is None:
        load_tokenizer(path, vocab_size)
    else:
        read_shard(path, None if split == SIDECAR else vocab_size)


def is_complete_file(file: RemoteFile, vocab_size: int) -> bool:
    """Whether the file is here and passes `check_file`."""
    try:
        check_file(file.local, file, vocab_size)
    except (DataError, OSError):
        return False
    return True


def fetch_file(hub: Hub, file: RemoteFile, staging: Path, vocab_size: int) -> int:
    """Downloads one file, moves it into place once it is checked, and returns its bytes.

    The hub's client goes on with transfers that break. Raises: DataError if it gives up, or if the
    file is not what the hub announced.
    """
    try:
        path = Path(
            hub.library.hf_hub_download(
                hub.repository,
                file.remote,
                repo_type="dataset", revision=hub.commit, local_dir=staging, endpoint=hub.endpoint,
            )
        )
    except Exception as error:  # see list_remote
        raise hub_error(f"{hub.repository}/{file.remote}", error) from None
    try:
        check_file(path, file, vocab_size)
    except DataError:
        path.unlink()  # else the hub's client would take it for complete next time
        raise
    file.local.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, file.local)
    return file.size_bytes


def check_disk_space(folder: Path, needed_bytes: int) -> None:
    """Raises DataError if the disk of `folder` cannot take the bytes and one percent more."""
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes * 1.01 > free_bytes:
        needed, free = needed_bytes / 1e9, free_bytes / 1e9
        raise DataError(f"{folder}: the download needs {needed:.2f} GB, {free:.2f} GB are free")


def fetch_files(hub: Hub, files: Sequence[RemoteFile], staging: Path, vocab_size: int) -> None:
    """Downloads files, some at a time; the first failure stops those that have not begun."""
    total, done = sum(file.size_bytes for file in files), 0
    progress = Progress("download", total, "B")
    with closing(progress), ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as pool:
        jobs = [pool.submit(fetch_file, hub, file, staging, vocab_size) for file in files]
        try:
            for job in as_completed(jobs):
                done += job.result()
                progress.reach(done)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def write_download_manifest(
    variant: Variant, hub: Hub, files: Sequence[RemoteFile], folder: Path
) -> None:
    """Describes a downloaded dataset; warns if its validation part is not the competition's."""
    known = {file.local.name: file.sha256 for file in files}
    manifest: dict[str, object] = {
        "name": variant.dataset, "source": f"https://huggingface.co/datasets/{hub.repository}",
        "revision": hub.commit,
        **describe_dataset(folder, files[0].local, variant.vocab_size, known),
    }
    sidecar = [read_shard(path) for path in sidecar_files(folder)]
    if sidecar:
        manifest["val_raw_bytes"] = sum(int(counts.sum(dtype=np.int64)) for counts in sidecar)
    write_manifest(folder, manifest)
    documents = manifest["val_documents"]
    if documents != PUBLISHED_VAL_DOCUMENTS:
        print(
            f"warning: {variant.dataset}: {documents:,} validation documents, the competition "
            f"scores {PUBLISHED_VAL_DOCUMENTS:,}",
            file=sys.stderr,
        )


# ==================================================================================================
# 7  Verify
# ==================================================================================================

SHINGLE_WORDS = 20
SHINGLE_SHARE_MAX = 0.01
SHINGLE_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word's hash is lost in the product


@dataclass
class Findings:
    """What verification found: errors fail it, warnings do not, rows are printed."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    rows: list[tuple[str, str]] = field(default_factory=list)


def split_documents(shards: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Documents of a stream in order, each from its BOS to the next one, across shard borders."""
    parts: list[np.ndarray] = []
    for shard in shards:
        begin = 0
        for start in np.flatnonzero(shard == BOS_ID).tolist():
            if start > begin:
                parts.append(shard[begin:start])
            if parts:
                yield np.concatenate(parts)
            parts, begin = [], start
        parts.append(shard[begin:])
    if parts:
        yield np.concatenate(parts)


def decode_documents(
    documents: Iterable[np.ndarray], tokenizer: sentencepiece.SentencePieceProcessor
) -> Iterator[list[str]]:
    """Texts of the documents, in lists that keep temporary memory bounded."""
    batch: list[list[int]] = []
    size = 0
    for document in documents:
        batch.append(document.tolist())
        size += len(document)
        if size >= TOKENS_AT_ONCE // 4:
            yield tokenizer.decode(batch)
            batch, size = [], 0
    if batch:
        yield tokenizer.decode(batch)


def shingle_hashes(texts: Iterable[str]) -> np.ndarray:
    """64-bit hashes, uint64, of all runs of `SHINGLE_WORDS` words inside a text; repeats stay."""
    hashes = [np.zeros(0, dtype=np.uint64)]
    for text in texts:
        words = text.split()
        count = len(words) - SHINGLE_WORDS + 1
        if count > 0:
            of_word = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
            rolling = np.zeros(count, dtype=np.uint64)
            for offset in range(SHINGLE_WORDS):
                rolling = rolling * SHINGLE_BASE + of_word[offset : offset + count]
            hashes.append(rolling)
    return np.concatenate(hashes)


def token_hash(document: np.ndarray) -> bytes:
    """16 bytes that identify a document by its tokens, hence by its normalised text."""
    return hashlib.blake2b(document.tobytes(), digest_size=16).digest()


class ValScan(NamedTuple):
    """What the training stream is compared with."""

    documents: int
    hashes: frozenset[bytes]
    shingles: np.ndarray  # uint64, sorted, without repeats
    decoded_bytes: int


def scan_val(
    shards: Sequence[np.ndarray], tokenizer: sentencepiece.SentencePieceProcessor
) -> ValScan:
    """Hashes, shingles and decoded size of the validation documents."""
    documents = list(split_documents(shards))
    shingles, decoded_bytes, done = [], 0, 0
    with closing(Progress("validation text", len(documents), "documents")) as progress:
        for texts in decode_documents(documents, tokenizer):
            decoded_bytes += sum(len(text.encode()) for text in texts)
            shingles.append(np.unique(shingle_hashes(texts)))
            done += len(texts)
            progress.reach(done)
    hashes = frozenset(map(token_hash, documents))
    return ValScan(len(documents), hashes, np.unique(np.concatenate(shingles)), decoded_bytes)


def count_shared_documents(shards: Sequence[np.ndarray], held_out: frozenset[bytes]) -> int:
    """Distinct documents of a stream whose hash is among `held_out`."""
    shared: set[bytes] = set()
    done = 0
    with closing(Progress("training documents", sum(map(len, shards)), "tokens")) as progress:
        for document in split_documents(shards):
            key = token_hash(document)
            if key in held_out:
                shared.add(key)
            done += len(document)
            progress.reach(done)
    return len(shared)


def head_of_stream(documents: Iterable[np.ndarray], tokens: int) -> Iterator[np.ndarray]:
    """Documents from the front until `tokens` are reached."""
    for document in documents:
        yield document
        tokens -= len(document)
        if tokens <= 0:
            return


def share_of_shingles(known: np.ndarray, texts: Iterable[Sequence[str]], documents: int) -> float:
    """The share of the sorted shingle hashes `known` that occur in the texts of `documents`."""
    found = np.zeros(len(known), dtype=bool)
    done = 0
    with closing(Progress("training shingles", documents, "documents")) as progress:
        for batch in texts:
            hashes = np.sort(shingle_hashes(batch))
            at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            found[at[known[at] == hashes]] = True
            done += len(batch)
            progress.reach(done)
    return float(found.mean())


def check_shards(folder: Path, split: str, vocab_size: int, findings: Findings) -> list[np.ndarray]:
    """The readable shards of a split; what is wrong with them goes into the findings."""
    paths, shards = find_shards(folder, split), []
    for path in track(paths, f"{split} token ids", "shards"):
        try:
            tokens = read_shard(path, vocab_size)
        except DataError as error:
            findings.errors.append(str(error))
            continue
        if not count_documents(tokens):
            findings.errors.append(f"{path}: no document begins here, BOS is id {BOS_ID}")
        elif path == paths[0] and tokens[0] != BOS_ID:
            findings.errors.append(f"{path}: begins with id {tokens[0]}, not with BOS ({BOS_ID})")
        shards.append(tokens)
    return shards


def check_sidecar(folder: Path, findings: Findings) -> int | None:
    """Raw bytes by the side-car of the validation shards, None where the dataset has none."""
    sidecar = sidecar_files(folder)
    if not sidecar:
        return None
    val = find_shards(folder, VAL)
    if len(sidecar) != len(val):
        findings.errors.append(f"{folder}: {len(sidecar)} side-car files, {len(val)} val shards")
        return None
    total = 0
    for byte_path, token_path in zip(sidecar, val, strict=True):
        counts, tokens = read_shard(byte_path), read_shard(token_path)
        if len(counts) != len(tokens):
            findings.errors.append(f"{byte_path}: {len(counts):,} counts, {len(tokens):,} tokens")
        elif np.any(counts[tokens == BOS_ID]):
            findings.errors.append(f"{byte_path}: counts bytes for BOS, 0 expected")
        total += int(counts.sum(dtype=np.int64))
    return total


def check_bytes(
    shards: Mapping[str, Sequence[np.ndarray]], val: ValScan, table: TokenBytes, findings: Findings
) -> None:
    """Checks that the token table counts the bytes of the decoded validation text."""
    counted = count_bytes(shards[VAL], table)
    if counted != val.decoded_bytes:
        findings.errors.append(
            f"validation: the token table counts {counted:,} B, the decoded text has "
            f"{val.decoded_bytes:,} B"
        )
    findings.rows += [
        ("train bytes", f"{count_bytes(shards[TRAIN], table):,} by the token table"),
        ("val bytes", f"{counted:,} by the token table, {val.decoded_bytes:,} decoded"),
    ]


def check_disjoint(
    train: Sequence[np.ndarray],
    val: ValScan,
    tokenizer: sentencepiece.SentencePieceProcessor,
    shingle_tokens: int,
    findings: Findings,
) -> None:
    """Checks that validation documents are not in train, and how many of their phrases are."""
    shared = count_shared_documents(train, val.hashes)
    if shared:
        findings.errors.append(
            f"{shared:,} of {len(val.hashes):,} distinct validation documents occur in train"
        )
    findings.rows.append(("shared documents", f"{shared:,}"))
    if not len(val.shingles):
        findings.warnings.append(f"validation: no document has {SHINGLE_WORDS} words")
        return
    tokens = sum(map(len, train))
    compared = min(shingle_tokens or tokens, tokens)
    documents = head_of_stream(split_documents(train), compared)
    expected = sum(map(count_documents, train)) * compared // tokens
    share = share_of_shingles(val.shingles, decode_documents(documents, tokenizer), expected)
    if share > SHINGLE_SHARE_MAX:
        findings.warnings.append(
            f"{share:.2%} of the validation {SHINGLE_WORDS}-word shingles occur in train, "
            f"over {SHINGLE_SHARE_MAX:.0%}"
        )
    findings.rows.append(
        ("shared shingles", f"{share:.3%} of val, in {compared:,} of {tokens:,} train tokens")
    )


def compare_counts(folder: Path, counts: Mapping[str, int], findings: Findings) -> None:
    """Checks counted figures against the manifest's."""
    stated = read_manifest(folder) or {}
    findings.errors += [
        f"{folder / MANIFEST}: {key} is {stated[key]}, the files hold {value}"
        for key, value in counts.items()
        if key in stated and stated[key] != value
    ]
    for split in (TRAIN, VAL):
        documents, tokens = counts[f"{split}_documents"], counts[f"{split}_tokens"]
        shards = counts[f"{split}_shards"]
        value = f"{documents:,} documents, {tokens:,} tokens, {shards:,} shards"
        findings.rows.append((split, value))
    raw_bytes = counts.get("val_raw_bytes", stated.get("val_raw_bytes"))
    if isinstance(raw_bytes, int):
        findings.rows.append(("val raw bytes", f"{raw_bytes:,}"))


def file_errors(folder: Path, manifest: dict[str, object], tokenizer_path: Path) -> list[str]:
    """How the files of a dataset differ from what its manifest says of them."""
    if not tokenizer_path.is_file():
        return [f"{tokenizer_path}: no such tokenizer file"]
    errors = []
    if manifest.get("tokenizer_sha256") != sha256_of(tokenizer_path):
        errors.append(f"{tokenizer_path}: not the tokenizer of {folder / MANIFEST} (SHA-256)")
    stated, actual = manifest.get("files"), describe_files(folder, known={})
    if not isinstance(stated, dict):
        return [*errors, f"{folder / MANIFEST}: no list of files"]
    for name in sorted(stated.keys() | actual.keys()):
        if name not in actual:
            errors.append(f"{folder / name}: missing, the manifest lists it")
        elif name not in stated:
            errors.append(f"{folder / name}: not in the manifest")
        elif stated[name] != actual[name]:
            errors.append(f"{folder / name}: size or SHA-256 differs from the manifest")
    return errors


def find_tokenizer(folder: Path, manifest: dict[str, object]) -> Path:
    """The tokenizer that the manifest names, else the one that belongs to the folder's name.

    Raises: DataError if neither tells.
    """
    name = manifest.get("tokenizer")
    published = {variant.dataset: variant.tokenizer for variant in VARIANTS.values()}
    if not isinstance(name, str):
        name = published.get(folder.resolve().name)
    if name is None:
        raise DataError(f"{folder}: no {MANIFEST} that names the tokenizer; give --tokenizer")
    return folder.resolve().parent.parent / "tokenizers" / name


def verify_dataset(folder: Path, tokenizer_path: Path | None, shingle_tokens: int) -> Findings:
    """Checks a dataset folder against its format, its tokenizer, itself and its manifest.

    Shingles of the first `shingle_tokens` training tokens are compared, 0 for all of them.
    Raises: DataError if there is no folder, no shard of a split or no usable tokenizer.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    findings = Findings()
    manifest = read_manifest(folder)
    if manifest is None:
        findings.warnings.append(f"{folder / MANIFEST}: missing or unreadable, not compared")
    tokenizer_path = tokenizer_path or find_tokenizer(folder, manifest or {})
    tokenizer = open_tokenizer(tokenizer_path)
    shards = {
        split: check_shards(folder, split, tokenizer.vocab_size(), findings)
        for split in (TRAIN, VAL)
    }
    if not findings.errors:
        table, val = token_bytes(tokenizer), scan_val(shards[VAL], tokenizer)
        counts = measure_streams(shards, table)
        raw_bytes = check_sidecar(folder, findings)
        if raw_bytes is not None:
            counts["val_raw_bytes"] = raw_bytes
        compare_counts(folder, counts, findings)
        check_bytes(shards, val, table, findings)
        check_disjoint(shards[TRAIN], val, tokenizer, shingle_tokens, findings)
    if manifest is not None:
        findings.errors += file_errors(folder, manifest, tokenizer_path)
    return findings


# ==================================================================================================
# 8  Commands
# ==================================================================================================


def folder_name(text: str) -> str:
    """An argument that must be a plain folder name."""
    if not re.fullmatch(r"\w[\w.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not of letters, digits and _ . -")
    return text


def demo_plan(data_dir: Path, documents: Callable[[], Sequence[str]]) -> BuildPlan:
    """How the demo dataset is built from the harvested documents."""
    return BuildPlan(
        name=DEMO_NAME, data_dir=data_dir, train_texts=lambda: split_demo(documents())[0],
        val_texts=lambda: split_demo(documents())[1], tokenizer_name=DEMO_TOKENIZER,
        tokenizer_source=None, vocab_size=DEMO_RECIPE["vocab_size"],
        shard_tokens=DEMO_RECIPE["shard_tokens"], workers=1, transformed=False,
        provenance={
            "source": f"documentation of Python {sys.version.split()[0]}", "revision": None,
            "recipe": DEMO_RECIPE,
        },
    )


def run_demo(arguments: argparse.Namespace) -> int:
    """Builds the demo dataset unless it is there and whole."""
    library = Path(sysconfig.get_path("stdlib"))
    plan = demo_plan(arguments.data_dir, functools.cache(lambda: harvest_documents(library)))
    manifest = read_manifest(plan.folder) or {}
    complete = manifest.get("recipe") == DEMO_RECIPE and not file_errors(
        plan.folder, manifest, plan.tokenizer_path
    )
    if complete and not arguments.force:
        print(f"{plan.folder} is complete ({manifest.get('source')}); --force rebuilds it")
    else:
        build_dataset(plan)
    print_summary(plan.folder, plan.tokenizer_path)
    return 0


def check_tokenizer_place(plan: BuildPlan) -> None:
    """Raises DataError if another tokenizer lies where the plan's own would go."""
    source, place = plan.tokenizer_source, plan.tokenizer_path
    if source is not None and place.exists() and sha256_of(source) != sha256_of(place):
        raise DataError(f"{place}: differs from {source}; rename one of them")


def describe_inputs(source: JsonlSource) -> dict[str, object]:
    """What a manifest says of the files a dataset was made of."""
    train, val = (
        [{"file": path.name, "sha256": sha256_of(path)} for path in paths]
        for paths in (source.files, source.val_files)
    )
    return {"train": train, "val": val or f"{source.val_fraction} of train, by hash"}


def run_jsonl(arguments: argparse.Namespace) -> int:
    """Builds a dataset from JSON lines."""
    check_inputs([*arguments.files, *arguments.val])
    source = JsonlSource(
        tuple(arguments.files), tuple(arguments.val), arguments.val_fraction or 0.0
    )
    trained = arguments.train_tokenizer
    if arguments.caseops and not trained:
        raise DataError("--caseops: only with --train-tokenizer; --tokenizer says by itself "
                        "whether it is for transformed text")
    plan = BuildPlan(
        name=arguments.name, data_dir=arguments.data_dir, train_texts=source.train_texts,
        val_texts=source.val_texts,
        tokenizer_name=f"{arguments.name}_bpe.model" if trained else arguments.tokenizer.name,
        tokenizer_source=None if trained else arguments.tokenizer,
        vocab_size=trained or open_tokenizer(arguments.tokenizer).vocab_size(),
        shard_tokens=arguments.shard_tokens, workers=arguments.workers,
        transformed=arguments.caseops,
        provenance={
            "source": "jsonl", "revision": None, "inputs": describe_inputs(source),
        },
    )
    if plan.folder.exists() and not arguments.force:
        raise DataError(f"{plan.folder}: already there; --force replaces it")
    check_tokenizer_place(plan)
    build_dataset(plan)
    print_summary(plan.folder, plan.tokenizer_path)
    return 0


def run_download(arguments: argparse.Namespace) -> int:
    """Downloads a published export."""
    variant, data_dir = VARIANTS[arguments.variant], arguments.data_dir
    data_dir.mkdir(parents=True, exist_ok=True)
    hub, remote = list_remote(variant, arguments.revision, data_dir)
    print(f"{hub.repository} {arguments.revision} is commit {hub.commit}")
    files = select_files(remote, arguments.train_shards)
    checked = track(files, "checking what is here", "files")
    missing = [file for file in checked if not is_complete_file(file, variant.vocab_size)]
    needed_bytes = sum(file.size_bytes for file in missing)
    check_disk_space(data_dir, needed_bytes)
    print(f"{len(missing)} of {len(files)} files to download, {needed_bytes / 1e9:.2f} GB")
    staging = data_dir / f".downloading-{arguments.variant}"
    fetch_files(hub, missing, staging, variant.vocab_size)
    shutil.rmtree(staging, ignore_errors=True)
    folder, tokenizer_path = data_dir / "datasets" / variant.dataset, files[0].local
    write_download_manifest(variant, hub, files, folder)
    print_summary(folder, tokenizer_path)
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    """Prints what a dataset holds and everything that is wrong with it."""
    findings = verify_dataset(arguments.folder, arguments.tokenizer, arguments.shingle_tokens)
    for label, value in findings.rows:
        print(f"{label:18}{value}")
    for message in findings.warnings:
        print(f"warning: {message}", file=sys.stderr)
    for message in findings.errors:
        print(f"error: {message}", file=sys.stderr)
    print(f"{arguments.folder}: {'FAILED' if findings.errors else 'ok'}")
    return 1 if findings.errors else 0


def add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares `demo`."""
    parser = commands.add_parser(
        "demo",
        help="a small English corpus from this Python's own documentation, offline",
        description=f"Builds datasets/{DEMO_NAME} and tokenizers/{DEMO_TOKENIZER} from the help "
        "topics, docstrings and comments of the running Python. Does nothing if they are complete.",
    )
    parser.add_argument("--force", action="store_true", help="build it again")
    parser.set_defaults(run=run_demo)


def add_jsonl(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares `jsonl`."""
    parser = commands.add_parser(
        "jsonl",
        help='your own text: one JSON object {"text": ...} a line',
        description="Tokenises .jsonl, .jsonl.xz or .jsonl.gz files, in their order. Fails if a "
        "validation document also occurs in the training files, white space aside.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="training documents")
    parser.add_argument(
        "--name", required=True, type=folder_name, help="of the folder under datasets/"
    )
    val = parser.add_mutually_exclusive_group(required=True)
    val.add_argument(
        "--val", action="append", default=[], type=Path, metavar="FILE",
        help="validation documents; may be given more than once",
    )
    val.add_argument(
        "--val-fraction", type=number_between(float, 0.0001, 0.5), metavar="F",
        help="hold out this share of the documents, chosen by hash",
    )
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", type=Path, metavar="MODEL", help="SentencePiece model")
    tokenizer.add_argument(
        "--train-tokenizer", type=number_between(int, 300, VOCAB_SIZE_MAX), metavar="V",
        help="train one of V pieces on the training documents, at most the first "
        f"{TOKENIZER_TEXT_BYTES // 10**6} MB of them",
    )
    parser.add_argument(
        "--caseops", action="store_true",
        help="with --train-tokenizer: capitals become operators before small letters, without "
        "loss; an existing tokenizer says itself whether it is for such text",
    )
    parser.add_argument(
        "--shard-tokens", type=number_between(int, 1, 2**31 - 1), default=100_000_000, metavar="N",
        help="tokens in a shard (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=number_between(int, 1, 1024), default=os.cpu_count() or 1, metavar="N",
        help="processes that tokenise (default: one per CPU)",
    )
    parser.add_argument("--force", action="store_true", help="replace the dataset if it is there")
    parser.set_defaults(run=run_jsonl)


def add_download(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares `download`."""
    parser = commands.add_parser(
        "download",
        help="a published export from the Hugging Face hub (pip install huggingface_hub)",
        description="Downloads a published export, checks every file and goes on where an earlier "
        "attempt stopped; whole files are kept. HF_ENDPOINT names another hub.",
    )
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("--revision", default="main", help="branch, tag or commit (default: main)")
    parser.add_argument(
        "--train-shards", type=number_between(int, 1, 10**6), metavar="N",
        help="only the first N training shards (default: all that are published)",
    )
    parser.set_defaults(run=run_download)


def add_verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares `verify`."""
    parser = commands.add_parser(
        "verify",
        help="check a dataset folder",
        description="Checks shard headers and sizes, token ids, BOS, bytes, the manifest, and that "
        "no validation document occurs in train. Warns if over "
        f"{SHINGLE_SHARE_MAX:.0%} of the validation {SHINGLE_WORDS}-word shingles do.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="data/datasets/<name>")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="MODEL",
        help="default: the one the manifest or the folder's name tells",
    )
    parser.add_argument(
        "--shingle-tokens", type=number_between(int, 0, 10**15), default=200_000_000, metavar="N",
        help="compare shingles of the first N training tokens, 0 for all (default: %(default)s)",
    )
    parser.set_defaults(run=run_verify)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Prepares and checks the token shards that train_gpt.py reads."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (add_demo, add_jsonl, add_download, add_verify):
        add(commands)
    for name, command in commands.choices.items():
        command.epilog = "Exit codes: 0 done, 1 error or failed check, 2 usage."
        if name != "verify":
            command.add_argument(
                "--data-dir", type=Path, default=Path(os.environ.get("DATA_DIR", "data")),
                help="root of datasets/ and tokenizers/ (default: DATA_DIR, else data)",
            )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parsed = build_parser().parse_args(arguments)
    try:
        code: int = parsed.run(parsed)
    except (GolfError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenProcessPool:
        print("error: a tokenising process died (out of memory?); try --workers 1", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
