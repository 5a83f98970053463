"""Adds pieces to the tokenizer of weights that have been trained, and rows to their embedding: the
Chinese characters that a text needs and that are three bytes so far, then the merges of pieces that
shorten its English most. What is written with the old pieces alone keeps its pieces as far as no
new one shortens it. Knows sentencepiece's merging rule, the folder of a model, no training.

Usage: python widen.py --weights output/base/stage12 --out output/base/wide --pieces 464

A new row of the embedding is the mean of the rows of the pieces that spelled it until now. The
weights may be of any element type, also in shards; they are written in float32.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import shop
import texts
from safetensors.numpy import save_file
from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as messages

from ernie_tune.checkpoint.tensors import TensorReader, cast
from ernie_tune.data.vocabulary import MEDIA_TOKENS, TEXT_TOKENS, tokenizer_files, with_special_tokens

# What any text in these languages may need, beside the words of `shop` and `texts`.
CHARACTERS = (
    "国为他会以也于就之分部等全经法日进代那去定产前其种如理体力当实重从化平建又内此将员各但已度加合性常使因身入原路被利任量及应"
    "元特系展设己女打变清活解程直保放管便走更光信受听给选真却件何眼空干集增往即步连调感该始克造际约器段深则极装准吃试影整料随投"
    "热望息速爱况满且双未除需标确织初响药消失低离视副费宝底房音案富按查责细冲获演尽紧养适留念微例座害够您谁"
)
WORDS = (
    "a about after again all also always am an and any anyone are around as ask at away back be because been before "
    "below between both bought break broken brought but buy by call came can cannot change charge check child clean close "
    "cold come complain contact cost could customer damaged daughter day deliver delivered delivery did different do does "
    "done down dry each easy email every everything fast father few find first fit fix for found free friend from full get "
    "give given go going gone good got great had happy hard has have he help her here him home hot hour house how if in "
    "inside into is issue it its just keep kind know large last late later leave left let like little long look lost love "
    "made make many may me mean message minute missing money month more morning most mother much must my name need never "
    "new next night no not nothing now number of off old on once one online only open or order ordered other our out over "
    "own page pay people perfect phone piece place please problem product put question quick quickly quite really receive "
    "received refund refused repair reply return returned right said same saw say second see send sent service set several "
    "she ship shop should show side since small so some somebody something son soon sorry staff start still stop store "
    "street such support sure take tell than thank that the their them then there they thing think this three through time "
    "to today together told too took tried try turn two under until up us use used very wait want was water way we week "
    "well went were what when where which while who why wife will with without work works would write wrong year yet you "
    "your yesterday"
)
_MEDIA_ID = re.compile("im_patch_id|(image|video)(_(start|end))?(_token_id)?")  # in config.json
_CJK, _WORD = re.compile("[\u4e00-\u9fff]"), re.compile(" ?[A-Za-z']+|[^A-Za-z]")


def corpus(rows: int, seed: int) -> list[str]:
    """Messages and questions as they are drawn for the stages, and the words above."""
    rng, drawn = random.Random(seed), []
    for i in range(rows):
        drawn += [" ".join(turn) for turn in texts.turns(rng, bool(i % 2))]
        drawn.append(shop.message(rng, bool(i % 2), rng.choice(list(shop.KINDS))))
    return drawn + [f" {word}" for word in WORDS.split()] * (rows // 40)


def characters(lines: list[str], held: set[str], most: int) -> list[str]:
    """Chinese characters that are no pieces yet: those of the lines by number, then others."""
    seen = Counter(c for line in lines for c in _CJK.findall(line))
    return list(dict.fromkeys(c for c in [*(c for c, _ in seen.most_common()), *CHARACTERS] if c not in held))[:most]


def merges(lines: list[str], tokens: SentencePieceProcessor, held: set[str], count: int) -> list[str]:
    """`count` more merges of byte-pair encoding over the English words as `tokens` spells them."""
    words = Counter(w for line in lines for w in _WORD.findall(line) if w.strip().isascii() and w.strip().isalpha())
    spelled = {w: tokens.encode(w, out_type=str) for w in words}
    found: list[str] = []
    while len(found) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, n in words.items():
            for pair in zip(spelled[word], spelled[word][1:], strict=False):
                pairs[pair] += n
        (a, b), _ = next(p for p in pairs.most_common() if "<0x" not in "".join(p[0]))
        if a + b not in held:
            found.append(a + b)
        for word, parts in spelled.items():
            spelled[word] = _merged(parts, a, b)
    return found


def _merged(parts: list[str], a: str, b: str) -> list[str]:
    out: list[str] = []
    for part in parts:
        if out and out[-1] == a and part == b:
            out[-1] = a + b
        else:
            out.append(part)
    return out


def widened(model: bytes, more: list[str]) -> bytes:
    """A tokenizer model with the special tokens behind the new pieces instead of the old ones."""
    proto = messages.ModelProto()
    proto.ParseFromString(model)
    special = len(TEXT_TOKENS) + len(MEDIA_TOKENS)
    del proto.pieces[-special:]
    lowest = min(p.score for p in proto.pieces)
    for i, piece in enumerate(more):
        proto.pieces.add(piece=piece, score=lowest - 1 - i)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return with_special_tokens(proto.SerializeToString())


def embedding(rows: np.ndarray, old: SentencePieceProcessor, more: list[str]) -> np.ndarray:
    """The old rows, the new pieces' between the text's and the special tokens'."""
    special = len(TEXT_TOKENS) + len(MEDIA_TOKENS)
    new = [rows[old.encode(piece.replace("▁", " "))].mean(axis=0) for piece in more]
    return np.concatenate([rows[:-special], np.stack(new).astype(rows.dtype), rows[-special:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pieces", type=int, default=464)
    parser.add_argument("--characters", type=int, default=296)
    parser.add_argument("--rows", type=int, default=20000)
    o = parser.parse_args()
    model = (o.weights / "tokenizer.model").read_bytes()
    old = SentencePieceProcessor(model_proto=model)
    held = {old.id_to_piece(i) for i in range(old.get_piece_size())}
    lines = corpus(o.rows, seed=1)
    more = characters(lines, held, o.characters)
    more += merges(lines, old, held, o.pieces - len(more))
    o.out.mkdir(parents=True, exist_ok=True)
    shutil.copy(o.weights / "preprocessor_config.json", o.out)
    for name, content in tokenizer_files(widened(model, more)).items():
        (o.out / name).write_bytes(content)
    config = json.loads((o.weights / "config.json").read_text(encoding="utf-8"))
    config["vocab_size"] += len(more)
    for key in filter(_MEDIA_ID.fullmatch, config):
        config[key] += len(more)
    config |= dict.fromkeys({"dtype", "torch_dtype"} & config.keys(), "float32")
    (o.out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    reader, weights = TensorReader(o.weights), {}
    for name, entry in reader.entries.items():
        rows = weights[name] = cast(np.array(reader.read(name)), entry.dtype, "F32")
        if rows.ndim == 2 and rows.shape[0] == old.get_piece_size():
            weights[name] = embedding(rows, old, more)
            print(f"{name}: {rows.shape} -> {weights[name].shape}")
    save_file(weights, o.out / "model.safetensors", metadata={"format": "np"})
    new = SentencePieceProcessor(model_proto=(o.out / "tokenizer.model").read_bytes())
    before, after = (sum(len(t.encode(line)) for line in lines) for t in (old, new))
    print(f"{len(more)} pieces more: {before:,} -> {after:,} pieces in {len(lines):,} lines")


if __name__ == "__main__":
    main()
