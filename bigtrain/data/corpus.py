"""A tokenized corpus on the disk: where it lies, what is in it, and its tokens by memory map."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from bigtrain import strict_json
from bigtrain.config.schema import Family, Recipe
from bigtrain.data.cache import cache_folder, file_digest, fingerprint
from bigtrain.data.decoding import data_error
from bigtrain.data.selection import NOTHING_LEFT_OUT, is_left_out, selection_facts
from bigtrain.data.shards import Shard, Tokens, open_shard
from bigtrain.data.sources import EMBEDDED, identity, source_origin
from bigtrain.data.suitability import check_tokenizer
from bigtrain.data.vocabulary import LARGEST_VOCABULARY, TRAIN, SpecialTokens, tokenizer_path
from bigtrain.data.words import continuing_tokens
from bigtrain.errors import DataError, Fault

FORMAT_VERSION = 1
Split: TypeAlias = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")

CORPORA, MIXTURES = "corpora", "mixtures"
"""Folders of the cache: tokens of one source each, and what makes one corpus of several."""
MANIFEST = "manifest.json"
LARGEST_MANIFEST_BYTES = 32 * 2**20
"""A part of 64 Mi tokens takes four entries, so this is enough for 2.5T tokens."""
DTYPES = ("uint16", "uint32")
LEAST_DOCUMENTS_OF_PAIRS = 2
TOKENIZER = "tokenizer.json"
UNIGRAM_COUNTS = "unigram_counts.npy"
SAFE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


class SplitCounts(NamedTuple):
    """What a split holds; `text_bytes` counts its UTF-8."""

    documents: int
    tokens: int
    text_bytes: int


class Source(NamedTuple):
    """A corpus of which a mixture takes a share of its rows, by `weight` beside the others' weights."""

    corpus: Corpus
    weight: float


@dataclass(frozen=True)
class Corpus:
    """A complete corpus: documents one after another, BERT's as [CLS] ... [SEP], others with an end token.

    A mixture's documents are those of its sources, one source after another; their tokens stay where they are.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def family(self) -> Family:
        """Return the family of models whose documents these are."""
        return self.manifest["family"]  # type: ignore[no-any-return]

    @property
    def vocab_size(self) -> int:
        """Return how many token ids the tokenizer has."""
        return int(self.manifest["tokenizer"]["vocab_size"])

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        """Return the ids of the special tokens."""
        return SpecialTokens(**self.manifest["tokenizer"]["special_tokens"])

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """Return what a mixture is made of; nothing for the corpus of one source."""
        folder, sources = self.folder.parent.with_name(CORPORA), self.manifest.get("sources", ())
        return tuple(Source(read_corpus(folder / source["corpus"]), float(source["weight"])) for source in sources)

    @property
    def left_out(self) -> dict[str, int]:
        """Return how many documents of the source the recipe's filter left out, and how many as duplicates."""
        return dict(self.manifest.get("left_out", NOTHING_LEFT_OUT))

    @property
    def tokenizer_file(self) -> Path:
        """Return the tokenizer.json that made the tokens."""
        return self.folder / TOKENIZER

    @cached_property
    def unigram_counts(self) -> NDArray[np.int64]:
        """Return how often each token stands in the training split, (vocab_size,)."""
        path = self.folder / UNIGRAM_COUNTS
        try:
            counts: NDArray[np.int64] = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(_damaged(path)) from error
        if not isinstance(counts, np.ndarray) or counts.dtype.str != "<i8" or counts.shape != (self.vocab_size,):
            raise DataError(_damaged(path))
        return counts

    def counts(self, split: Split) -> SplitCounts:
        """Return what a split holds."""
        return SplitCounts(**self.manifest["splits"][split])

    def shards(self, split: Split) -> list[Shard]:
        """Map the shards of a split into memory."""
        shards = []
        for name in self._names(split):
            try:
                shards.append(open_shard(self.folder, name, self.manifest["dtype"], self._tokens_file(name)))
            except (OSError, ValueError, IndexError) as error:
                raise DataError(_damaged(self.folder / f"{name}.offsets")) from error
        return shards

    def documents(self, split: Split) -> Iterator[Tokens]:
        """Yield the token ids of each document."""
        for shard in self.shards(split):
            starts = (shard.offsets - shard.offsets[0]).tolist()
            for start, end in pairwise(starts):
                yield shard.tokens[start:end]

    def verify(self) -> None:
        """Read every file and compare it with its digest; raises DataError that names those that differ."""
        self._require(lambda path, facts: _is_own(path) and file_digest(path) == facts["sha256"])

    def check_sizes(self) -> None:
        """Compare the sizes of all files with the manifest; raises DataError that names those that differ."""
        self._require(lambda path, facts: _is_own(path) and path.stat().st_size == facts["bytes"])
        for source in self.sources:
            source.corpus.check_sizes()

    def _require(self, whole: Callable[[Path, Mapping[str, Any]], bool]) -> None:
        files = ((self.folder / name, facts) for name, facts in self.manifest["files"].items())
        damaged = [path for path, facts in files if not whole(path, facts)]
        if damaged:
            raise DataError(*(_damaged(path) for path in damaged))

    def _names(self, split: Split) -> list[str]:
        names = (name.removesuffix(".offsets") for name in self.manifest["files"] if name.endswith(".offsets"))
        return sorted(name for name in names if name.startswith(split))

    def _tokens_file(self, name: str) -> Path:
        if not self.sources:
            return self.folder / f"{name}.tokens"
        split, source, shard = name.split("-")
        return self.sources[int(source)].corpus.folder / f"{split}-{shard}.tokens"


def corpus_facts(recipe: Recipe) -> dict[str, Any]:
    """Return all that shapes the tokens of a recipe's corpus: not the length of rows, not the seed."""
    data = recipe.data
    selection = selection_facts(data)
    return {
        "format": FORMAT_VERSION,
        "source": identity(data, source_origin(recipe)),
        "tokenizer": tokenizer_facts(recipe),
        "family": recipe.model.family,
        "validation_fraction": data.validation_fraction,
        **({"selection": selection} if selection else {}),
    }


def tokenizer_facts(recipe: Recipe) -> dict[str, Any]:
    """Return what tells a recipe's tokenizer from another."""
    data = recipe.data
    if data.tokenizer == TRAIN:
        return {"train": recipe.model.family, "vocab_size": data.vocab_size, "lowercase": data.lowercase}
    path = tokenizer_path(data.tokenizer, recipe.origin("data.tokenizer"))
    return {"hub": data.tokenizer} if path is None else {"sha256": file_digest(path)}


def corpus_folder(recipe: Recipe) -> Path:
    """Return where a recipe's corpus is, or will be; raises DataError when its source or tokenizer is not there."""
    kind = CORPORA if recipe.data.mixture is None else MIXTURES
    return cache_folder(recipe.data) / kind / fingerprint(corpus_facts(recipe))


def is_prepared(folder: Path) -> bool:
    """Return whether a corpus was finished in this folder, and each one that it is a mixture of."""
    if not (folder / MANIFEST).exists():
        return False
    sources = _read_manifest(folder / MANIFEST)["sources"] if folder.parent.name == MIXTURES else ()
    return all((folder.parent.with_name(CORPORA) / source["corpus"] / MANIFEST).exists() for source in sources)


def read_corpus(folder: Path) -> Corpus:
    """Return the corpus in a folder; raises DataError for what is none."""
    return Corpus(folder, _read_manifest(folder / MANIFEST))


def open_corpus(recipe: Recipe) -> Corpus:
    """Open a recipe's corpus; raises DataError where it is absent or damaged, or its tokenizer does not suit."""
    folder = corpus_folder(recipe)
    if not is_prepared(folder):
        text = "the data is not prepared; run: bigtrain prepare RECIPE"
        raise data_error(source_origin(recipe), text)
    corpus = read_corpus(folder)
    corpus.check_sizes()
    check_tokenizer(recipe, corpus.special_tokens, corpus.vocab_size)
    if recipe.train.objective == "mlm_nsp":
        for split in SPLITS if recipe.train.eval_every else SPLITS[:1]:
            require_documents(corpus, split, recipe.origin("train.objective"))
    if recipe.train.whole_word_masking:
        continuing_tokens(corpus.tokenizer_file, corpus.vocab_size, recipe.origin("train.whole_word_masking"))
    return corpus


def require_documents(corpus: Corpus, split: Split, origin: str = "") -> None:
    """Raise DataError where a split has no two documents: a text of another one is what a pair's second may be.

    Of a mixture each source needs two: both texts of a pair are of one source.
    """
    parts = [source.corpus for source in corpus.sources] or [corpus]
    for number, part in enumerate(parts, start=1):
        found = part.counts(split).documents
        if found >= LEAST_DOCUMENTS_OF_PAIRS:
            continue
        held = f"{found} {'document' if found == 1 else 'documents'}"
        of = f" of source {number}, {_source_name(part)}," if corpus.sources else ""
        more = "raise data.validation_fraction, or give more" if split == "validation" else "give more"
        pairs = f"'mlm_nsp' pairs texts of different documents{' of a source' if of else ''}"
        raise data_error(
            origin, f"{pairs}, and the {split} split{of} has {held}; {more}, or use 'mlm'", "train.objective"
        )


def _source_name(corpus: Corpus) -> str:
    """Return what a corpus was made of, in short: a hub id, or its first file."""
    source = corpus.manifest["facts"]["source"]
    files = source.get("files")
    return str(files[0][0] if files else source.get("hub", EMBEDDED))


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = strict_json.read(path, LARGEST_MANIFEST_BYTES)
    except ValueError as error:
        raise DataError(_damaged(path)) from error
    try:
        whole = _is_whole(path, manifest)
    except (TypeError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise DataError(_damaged(path))
    return dict(manifest)


def _is_whole(path: Path, manifest: Any) -> bool:
    """Tell whether a manifest says what the rest of the code goes by; what has no such form at all raises."""
    size, special = manifest["tokenizer"]["vocab_size"], manifest["tokenizer"]["special_tokens"]
    splits = [manifest["splits"][split] for split in SPLITS]
    return (
        manifest["dtype"] in DTYPES
        and manifest["family"] in get_args(Family)
        and type(size) is int
        and 0 < size <= LARGEST_VOCABULARY
        and special.keys() <= asdict(SpecialTokens()).keys()
        and all(token is None or (type(token) is int and 0 <= token < size) for token in special.values())
        and all(counts.keys() == set(SplitCounts._fields) for counts in splits)
        and all(type(count) is int and count >= 0 for counts in splits for count in counts.values())
        and are_files(manifest["files"])
        and {TOKENIZER, UNIGRAM_COUNTS} <= manifest["files"].keys()
        and is_left_out(manifest.get("left_out", NOTHING_LEFT_OUT))
        and all(_is_source(source) for source in manifest.get("sources", ()))
        and ("sources" in manifest) == (path.parent.parent.name == MIXTURES)
    )


def _is_source(source: Mapping[str, Any]) -> bool:
    weight = source["weight"]
    return bool(SAFE_NAME.fullmatch(source["corpus"])) and type(weight) is float and 0 < weight < inf


def are_files(files: Mapping[str, Any]) -> bool:
    """Tell whether these are names of files in a corpus, each with its size and digest; raises for another form."""
    return all(
        SAFE_NAME.fullmatch(name) and type(facts["bytes"]) is int and isinstance(facts["sha256"], str)
        for name, facts in files.items()
    )


def _is_own(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _damaged(path: Path) -> Fault:
    text = f"this tokenized data is damaged, truncated or absent; delete the folder {path.parent} and run again"
    return Fault(str(path), "data.cache", text)
