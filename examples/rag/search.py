"""Which passages answer a question: by words (BM25), by vectors in an embedded database, by both.

Vectors come from any server with OpenAI's /v1/embeddings, or, without a model, from the passages'
own words (LSA). Nothing leaves the machine but what is asked of that server. Refuses to know:
prompts, answers.
"""

from __future__ import annotations

import base64
import http.client
import json
import logging
import os
import re
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bm25s
import jieba
import numpy as np
from passages import Passage
from qdrant_client import QdrantClient, models
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

jieba.setLogLevel(logging.ERROR)
_COLLECTION, _RANK_CONSTANT = "passages", 60  # the constant of reciprocal rank fusion
_STOP = frozenset(
    re.split(" ", "a an the is are of for in on to do i my me at be how many much what when which and or have has")
)
_STOP_ZH = frozenset(re.split(" ", "的 了 吗 呢 几 多少 是 有 我 要 可以 能 在 和 与 得 想 一 个"))
_ENDING = re.compile("(ing|ed|al|e)$")

Vectors = Callable[[Sequence[Any]], np.ndarray]  # texts, or lists of parts -> float [n, d]


def words(text: str) -> list[str]:
    """Lower-case words of English without their usual endings, of Chinese as jieba cuts them."""
    found = [w.strip().lower() for w in jieba.cut(text)]
    found = [w for w in found if re.search(r"\w", w) and w not in _STOP and w not in _STOP_ZH]
    return [_stem(w) if w.isascii() else w for w in found]


def _stem(word: str) -> str:
    """`approv` of approves, approval and approved."""
    word = word[:-1] if len(word) > 3 and word.endswith("s") else word
    return _ENDING.sub("", word) if len(word) > 5 else word


class Bm25:
    """Okapi BM25 over the words of passages."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        self._index = bm25s.BM25()
        self._index.index([words(one.words) for one in passages], show_progress=False)
        self._count = len(passages)

    def rank(self, question: str) -> list[int]:
        """Numbers of passages, best first; those that share no word are left out."""
        asked = words(question)
        if not asked:
            return []
        numbers, scores = self._index.retrieve([asked], k=self._count, show_progress=False)
        return [int(i) for i, score in zip(numbers[0], scores[0], strict=True) if score > 0]


def lsa(passages: Sequence[Passage], dimensions: int = 64) -> Vectors:
    """Vectors of the words that the passages have, by their singular values: no model is needed."""
    tfidf = TfidfVectorizer(analyzer=words, sublinear_tf=True)
    try:
        counts = tfidf.fit_transform([one.words for one in passages])
    except ValueError as error:
        raise ValueError("documents must hold words to search by; add some text") from error
    with np.errstate(invalid="ignore"):  # one passage has no variance
        svd = TruncatedSVD(max(1, min(dimensions, min(counts.shape) - 1)), random_state=0).fit(counts)

    def embed(inputs: Sequence[Any]) -> np.ndarray:
        texts = [one if isinstance(one, str) else " ".join(p.get("text", "") for p in one) for one in inputs]
        return np.asarray(svd.transform(tfidf.transform(texts)))

    return embed


def served(url: str, model: str | None = None, key: str = "none", batch: int = 32) -> Vectors:
    """Vectors of a server: `url` ends in /v1. Pictures are sent as parts where there are any.
    Raises ValueError for a server that cannot be reached or gives none.
    """

    def embed(inputs: Sequence[Any]) -> np.ndarray:
        out: list[list[float]] = []
        for start in range(0, len(inputs), batch):
            body = {"input": list(inputs[start : start + batch]), **({"model": model} if model else {})}
            found = post(f"{url}/embeddings", body, key)
            try:
                out += [one["embedding"] for one in sorted(found["data"], key=lambda one: one["index"])]
            except (KeyError, TypeError) as error:
                raise ValueError(f"{url}/embeddings must answer with vectors, but says: {str(found)[:200]}") from error
        if len(out) != len(inputs) or len({len(one) for one in out}) != 1:
            raise ValueError(f"{url}/embeddings must give a vector for each of {len(inputs)} inputs, all of one length")
        return np.array(out, np.float64)

    return embed


def post(url: str, body: dict[str, Any], key: str = "none") -> Any:
    """JSON to JSON. `key`: "none": that of OPENAI_API_KEY, where there is one. Raises ValueError
    with what the server says, or why it says nothing.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"server ({url}) must begin with http:// or https://, as http://127.0.0.1:8180/v1; correct it")
    known = os.environ.get("OPENAI_API_KEY", key) if key == "none" else key
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {known}"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as reply:
            said = reply.read()
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url} must answer, but says: {error.read().decode('utf-8', 'replace')[:500]}") from error
    except (OSError, http.client.HTTPException) as error:
        why = getattr(error, "reason", error)
        raise ValueError(
            f"{url} must be reached ({why}); start it with ernie-tune serve, or correct the address"
        ) from error
    try:
        return json.loads(said)
    except ValueError as error:
        shown = said[:100].decode("utf-8", "replace")
        raise ValueError(f"{url} must answer with JSON, but says: {shown}; the address ends in /v1") from error


def as_input(one: Passage, pictures: bool) -> Any:
    """What is embedded of a passage: its words, and its picture where `pictures`."""
    if one.picture is None or not pictures:
        return one.words
    data = base64.b64encode(one.picture.read_bytes()).decode()
    url = {"url": f"data:image/png;base64,{data}"}
    return [{"type": "text", "text": one.words}, {"type": "image_url", "image_url": url}]


class Index:
    """Passages and their vectors in a database in a folder (None: in memory), and their words."""

    def __init__(
        self, passages: Sequence[Passage], vectors: Vectors, folder: Path | None = None, pictures: bool = False
    ) -> None:
        self.passages, self._vectors = list(passages), vectors
        values = _unit(vectors([as_input(one, pictures) for one in passages]))
        try:
            self._database = QdrantClient(path=str(folder)) if folder else QdrantClient(":memory:")
        except (OSError, RuntimeError) as error:  # no folder, or another process has it
            raise ValueError(
                f"index ({folder}) must be a folder that nobody else uses ({error}); name another"
            ) from error
        if self._database.collection_exists(_COLLECTION):
            self._database.delete_collection(_COLLECTION)
        size = models.VectorParams(size=values.shape[1], distance=models.Distance.COSINE)
        self._database.create_collection(_COLLECTION, vectors_config=size)
        points = [
            models.PointStruct(id=i, vector=value.tolist(), payload={"key": one.key, "language": one.language})
            for i, (one, value) in enumerate(zip(passages, values, strict=True))
        ]
        self._database.upsert(_COLLECTION, points)
        self._bm25 = Bm25(passages)

        shown = [set(words(one.words)) for one in passages]
        counts = Counter(word for some in shown for word in some)
        self._weights = {word: _weight(len(shown), n) for word, n in counts.items()}
        self._unseen = _weight(len(shown), 0)

    def close(self) -> None:
        self._database.close()

    def covered(self, question: str, passage: Passage) -> float:
        """How much of a question a passage speaks of: the weight of the words that it has, of all
        words asked, rare ones weighing more; 0 to 1.
        """
        asked, has = set(words(question)), set(words(passage.words))
        weights = {word: self._weights.get(word, self._unseen) for word in asked}
        return sum(w for word, w in weights.items() if word in has) / max(sum(weights.values()), 1e-9)

    def by_words(self, question: str) -> list[int]:
        return self._bm25.rank(question)

    def by_vectors(self, question: str) -> list[int]:
        value = _unit(self._vectors([question]))[0]
        found = self._database.query_points(_COLLECTION, query=value.tolist(), limit=len(self.passages))
        return [int(point.id) for point in found.points]

    def by_both(self, question: str) -> list[int]:
        """Reciprocal rank fusion: the sum of 1 / (60 + rank) over the two."""
        scores: dict[int, float] = {}
        for ranked in (self.by_words(question), self.by_vectors(question)):
            for rank, i in enumerate(ranked):
                scores[i] = scores.get(i, 0.0) + 1 / (_RANK_CONSTANT + rank)
        return sorted(scores, key=lambda i: -scores[i])

    def find(self, question: str, k: int, language: str | None = None) -> list[Passage]:
        """The `k` best by both; with `language` only passages in it."""
        found = [self.passages[i] for i in self.by_both(question)]
        return [one for one in found if language in (None, one.language)][:k]


def _weight(passages: int, with_word: int) -> float:
    """The weight of a word in BM25 (Robertson and Spärck Jones)."""
    return float(np.log(1 + (passages - with_word + 0.5) / (with_word + 0.5)))


def _unit(values: np.ndarray) -> np.ndarray:
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
