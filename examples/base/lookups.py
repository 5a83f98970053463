"""Text whose answers stand in its questions, many at a time: runs to repeat, pairs to look up, what
follows, what is there, what is the same. What a decoder learns to search its context from. Knows
words alone.

A picture carries one to five words of answer, a run up to forty, and every word of it is told by
the context and by nothing else.
"""

from __future__ import annotations

import random

from words import CHINESE, COLORS, ENGLISH, LEXICON, NAMES, PLACES, SHAPES

Turn = tuple[str, str]
_HAN = "".join(sorted({c for _, cn, _ in LEXICON for c in cn} | {c for word in CHINESE for c in word}))


def _color(zh: bool) -> list[str]:
    return [v[0] if zh else k for k, v in COLORS.items()]


def _shape(zh: bool) -> list[str]:
    return list(SHAPES.values()) if zh else list(SHAPES)


def _things(zh: bool) -> list[str]:
    return [entry[int(zh)] for entry in LEXICON]


def _all(zh: bool) -> list[str]:
    """Every word of a language, each once."""
    k = int(zh)
    words = [*_color(zh), *_shape(zh), *_things(zh), *(CHINESE if zh else ENGLISH)]
    words += [n[k] for n in NAMES] + [p[k] for p in PLACES]
    return list(dict.fromkeys(words))


def _joined(words: list[str], zh: bool) -> str:
    """Nothing between the words: what follows a word is then told by that word alone."""
    return ("" if zh and not words[0].isascii() else " ").join(words)


def run(rng: random.Random, zh: bool, count: int) -> str:
    """Different words of a language, Chinese ones of one character; " " before each English one."""
    return "".join(rng.sample(_HAN, count)) if zh else "".join(f" {w}" for w in rng.sample(_all(False), count))


def echo(rng: random.Random, zh: bool, few: bool = False) -> list[Turn]:
    """Three to forty words, characters, letters or digits, again; `few`: two to six."""
    n = rng.randint(2, 6) if few else rng.randint(*rng.choice(((3, 8), (6, 20), (16, 40))))
    draw = rng.random()
    if draw < 0.6:
        words = rng.sample(_all(zh), n)
    elif draw < 0.75:
        words = rng.sample(_HAN, n)
    elif draw < 0.85:
        words = [str(rng.randrange(100)) for _ in range(n)]
    elif draw < 0.95:
        words = rng.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", min(n, 26))
    else:  # words that come again: what follows is told by more than one word
        words = [rng.choice(_color(zh)[:4] + _shape(zh)[:2]) for _ in range(n)]
    run = _joined(words, zh)
    ask = rng.choice(("照写：", "再写一遍：", "") if zh else ("Repeat: ", "Say again: ", ""))
    return [(ask + run, run)]


def _keys_and_values(rng: random.Random, zh: bool) -> tuple[list[str], list[str]]:
    """Two pools, of which no word is in the other."""
    pools = [_color(zh), _shape(zh), [n[int(zh)] for n in NAMES], rng.sample(_things(zh), 12), list("ABCDEFGHKLMN")]
    keys = rng.choice(pools)
    values = rng.choice([[str(i) for i in range(10)], *(p for p in pools if p is not keys)])
    return keys, [v for v in values if v not in keys]


def pairs(rng: random.Random, zh: bool, few: bool = False) -> list[Turn]:
    """Keys, each with a value behind it; then some of the keys, in another order, one at a time or
    all in one answer. Up to seven of them; `few`: up to three.
    """
    keys, values = _keys_and_values(rng, zh)
    keys = rng.sample(keys, rng.randint(2, 3 if few else min(7, len(keys))))
    held = {k: rng.choice(values) for k in keys}
    end, gap = ("。", "") if zh else (". ", " ")
    told = gap.join(f"{k}{gap}{v}" for k, v in held.items())
    asked = rng.sample(keys, len(keys))
    if rng.random() < 0.4:
        return [
            (f"{told}{end}{_joined(asked, zh)}", gap.join(f"{k}{gap}{held[k]}" for k in asked)),
        ]
    turns = [(f"{k}？" if zh else f"{k}?", held[k]) for k in asked]
    return [(f"{told}{end}{turns[0][0]}", turns[0][1]), *turns[1:]]


def after(rng: random.Random, zh: bool) -> list[Turn]:
    """A list, and what comes behind some of its words."""
    pool = rng.choice((_color(zh), _shape(zh), rng.sample(_things(zh), 12), list("0123456789")))
    words = rng.sample(pool, rng.randint(3, min(8, len(pool))))
    asked = rng.sample(range(len(words) - 1), min(len(words) - 1, 4))
    turns = [(f"{words[i]}后面是什么？" if zh else f"What comes after {words[i]}?", words[i + 1]) for i in asked]
    end = "。" if zh else ". "
    return [(f"{_joined(words, zh)}{end}{turns[0][0]}", turns[0][1]), *turns[1:]]


def _yes(right: bool, zh: bool) -> str:
    return ("是" if right else "否") if zh else ("yes" if right else "no")


def there(rng: random.Random, zh: bool) -> list[Turn]:
    """Up to five words, and whether each of some others is among them: as often as not."""
    pool = rng.choice((_color(zh), _color(zh), _shape(zh), _shape(zh), _things(zh), list("0123456789")))
    words = rng.sample(pool, rng.randint(1, 5))
    others, turns = [w for w in pool if w not in words], []
    for _ in range(rng.randint(3, 6)):
        right = rng.random() < 0.5
        word = rng.choice(words if right else others)
        if len(words) == 1:
            turns.append((f"它是{word}吗？" if zh else f"Is it {word}?", _yes(right, zh)))
        else:
            turns.append((f"有{word}吗？" if zh else f"Is there {word}?", _yes(right, zh)))
    end = "。" if zh else ". "
    return [(f"{_joined(words, zh)}{end}{turns[0][0]}", turns[0][1]), *turns[1:]]


def same(rng: random.Random, zh: bool) -> list[Turn]:
    """Two words a turn, equal or not."""
    turns = []
    for _ in range(rng.randint(3, 6)):
        pool = rng.choice((_color(zh), _shape(zh), _things(zh), list("0123456789")))
        a, b = rng.sample(pool, 2)
        right = rng.random() < 0.5
        b = a if right else b
        turns.append((f"{a}和{b}一样吗？" if zh else f"Is {a} the same as {b}?", _yes(right, zh)))
    return turns
