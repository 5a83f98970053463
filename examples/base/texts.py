"""Questions without pictures: small sums, order, counting, number words, translations, topics,
passages, formats, manners. Knows words alone.

Its wordings differ from those of the other examples, whose rows are not drawn from here.
"""

from __future__ import annotations

import json
import random

import shop
from words import COLORS, LEXICON, NAMES, SHAPES, TOPICS

Turn = tuple[str, str]
_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_DIGITS = "零一二三四五六七八九"


def english(n: int) -> str:
    """A number below 1,000 in English words."""
    if n < 20:
        return _ONES[n]
    if n < 100:
        return _TENS[n // 10] + (f"-{_ONES[n % 10]}" if n % 10 else "")
    return f"{_ONES[n // 100]} hundred" + (f" and {english(n % 100)}" if n % 100 else "")


def chinese(n: int) -> str:
    """A number below 1,000 in Chinese characters."""
    if n < 10:
        return _DIGITS[n]
    if n < 20:
        return "十" + (_DIGITS[n % 10] if n % 10 else "")
    if n < 100:
        return f"{_DIGITS[n // 10]}十" + (_DIGITS[n % 10] if n % 10 else "")
    rest = n % 100
    tail = (
        "" if not rest else f"零{_DIGITS[rest]}" if rest < 10 else f"一{chinese(rest)}" if rest < 20 else chinese(rest)
    )
    return f"{_DIGITS[n // 100]}百{tail}"


def sums(rng: random.Random, zh: bool, most: int = 60) -> Turn:
    a, b = rng.randint(0, most), rng.randint(0, most)
    if rng.random() < 0.3:
        a, b = max(a, b), min(a, b)
        return rng.choice(
            (f"{a} 减 {b} 得几？", f"算一算：{a}-{b}") if zh else (f"Subtract {b} from {a}.", f"Compute {a}-{b}.")
        ), str(a - b)
    if rng.random() < 0.15:
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        return (f"{a} 乘 {b} 得几？" if zh else f"Compute {a}*{b}."), str(a * b)
    return rng.choice(
        (f"{a} 与 {b} 的和是几？", f"算一算：{a}+{b}")
        if zh
        else (f"Add {a} and {b}.", f"Compute {a}+{b}.", f"{a} plus {b}?")
    ), str(a + b)


def order(rng: random.Random, zh: bool, most: int = 99) -> Turn:
    numbers = rng.sample(range(most + 1), rng.choice((2, 2, 3, 3, 3, 4, 5, 6)) if most > 9 else rng.choice((2, 2, 3)))
    shown, kind = " ".join(map(str, numbers)), rng.random()
    if kind < 0.25:
        return (f"{shown} 中最大的是？" if zh else f"Which of {shown} is the largest?"), str(max(numbers))
    if kind < 0.4:
        return (f"{shown} 中最小的是？" if zh else f"Which of {shown} is the smallest?"), str(min(numbers))
    if kind < 0.5:
        return (f"倒着写：{shown}" if zh else f"Reverse: {shown}"), " ".join(map(str, reversed(numbers)))
    down = rng.random() < 0.5
    q = (
        f"把 {shown} {'由大到小' if down else '由小到大'}排序"
        if zh
        else f"Put {shown} in {'descending' if down else 'ascending'} order."
    )
    return q, " ".join(map(str, sorted(numbers, reverse=down)))


def letters(rng: random.Random, zh: bool) -> Turn:
    word = (
        rng.choice(LEXICON)[0]
        if rng.random() < 0.5
        else "".join(rng.choice("bcdfghklmnprst") + rng.choice("aeiou") for _ in range(rng.randint(2, 7)))
    )
    letter, kind = rng.choice(word) if rng.random() < 0.75 else rng.choice("aeiou"), rng.random()
    if kind < 0.35:
        return (f"逐字母拼写 {word}" if zh else f"Spell {word}."), " ".join(word)
    if kind < 0.8:
        return (f"{word} 中字母 {letter} 出现几次？" if zh else f"Count the letter {letter} in {word}."), str(
            word.count(letter)
        )
    found = [x for x in word if x == letter]
    spelled = " ".join(word)
    return (
        f"想一想：{word} 有几个 {letter}？" if zh else f"Think: how many {letter} in {word}?"
    ), f"<think>{spelled}: {' '.join(found)}</think>{len(found)}"


def numbers(rng: random.Random, zh: bool) -> Turn:
    n, kind = rng.randint(0, 999) if rng.random() < 0.8 else rng.randint(0, 20), rng.random()
    if kind < 0.25:
        return (f"用英文写出 {n}" if zh else f"Write {n} in words."), english(n)
    if kind < 0.4:
        return (f"用汉字写出 {n}" if zh else f"Write {n} in Chinese."), chinese(n)
    if kind < 0.7:
        if rng.random() < 0.5:
            return (f"{chinese(n)} 的英文怎么写？" if zh else f"Write {chinese(n)} in English."), english(n)
        return (f"{english(n)} 的汉字怎么写？" if zh else f"Write {english(n)} in Chinese."), chinese(n)
    if kind < 0.85:
        return (f"用数字写出{chinese(n)}" if zh else f"Write {chinese(n)} as digits."), str(n)
    return (f"用数字写出 {english(n)}" if zh else f"Write {english(n)} as digits."), str(n)


def translate(rng: random.Random, zh: bool) -> Turn:
    en, cn, _ = rng.choice(LEXICON)
    if rng.random() < 0.5:
        return rng.choice(
            (f"{cn} 用英语怎么说？", f"译成英语：{cn}")
            if zh
            else (f"What is {cn} in English?", f"Translate to English: {cn}")
        ), en
    return rng.choice(
        (f"{en} 用中文怎么说？", f"译成中文：{en}")
        if zh
        else (f"What is {en} in Chinese?", f"Translate to Chinese: {en}")
    ), cn


_SENTENCES = (
    ("I need {a} for the {b}.", "我需要{a}，还有{b}。"),
    ("My {a} and the {b} did not come.", "我的{a}和{b}都没有来。"),
    ("Where is the {a}? I only see {b}.", "{a}在哪里？我只看到{b}。"),
    ("She likes {a} more than {b}.", "她更喜欢{a}，不太喜欢{b}。"),
    ("Please ask about {a} or {b}.", "请问{a}或者{b}的事。"),
    ("We talked about {a}, then about {b}.", "我们先说{a}，再说{b}。"),
    ("This {a} is not the {b} that I wanted.", "这个{a}不是我想要的{b}。"),
    ("The {a} was good, thank you for the {b}!", "{a}很好，谢谢你的{b}！"),
)


def topic(rng: random.Random, zh: bool) -> Turn:
    """The topic of a sentence whose nouns are of one topic."""
    name = rng.choice(list(TOPICS))
    a, b = rng.sample([e for e in LEXICON if e[2] == name], 2)
    k = int(zh)
    sentence = rng.choice(_SENTENCES)[k].format(a=a[k], b=b[k])
    if rng.random() < 0.3:
        sentence = a[k]
    q = rng.choice(
        ("主题是什么？", "这说的是哪一类？") if zh else ("What is the topic?", "Which kind of thing is this about?")
    )
    return f"{sentence} {q}" if rng.random() < 0.6 else f"{q} {sentence}", name[k]


def odd(rng: random.Random, zh: bool) -> Turn:
    one, other = rng.sample(list(TOPICS), 2)
    k = int(zh)
    words = [e[k] for e in rng.sample([e for e in LEXICON if e[2] == one], 3)]
    stranger = rng.choice([e[k] for e in LEXICON if e[2] == other and e[k] not in words])
    words.append(stranger)
    rng.shuffle(words)
    return (
        f"哪个词不同类：{'、'.join(words)}？" if zh else f"Which word does not belong: {', '.join(words)}?"
    ), stranger


def passage(rng: random.Random, zh: bool) -> list[Turn]:
    """Two or three facts about people, then questions that they answer."""
    people = rng.sample(NAMES, rng.randint(2, 3))
    k = int(zh)
    facts = []
    for person in people:
        facts.append(
            (
                person[k],
                rng.choice([e[k] for e in LEXICON if e[2][0] in ("fruit", "tool", "clothes", "animal")]),
                rng.randint(2, 9),
                rng.choice(list(COLORS)),
            )
        )
    story = (
        "".join(f"{n}有{c}个{COLORS[x][0]}的{t}。" for n, t, c, x in facts)
        if zh
        else " ".join(f"{n} has {c} {x} {t}{'' if t.endswith('s') else 's'}." for n, t, c, x in facts)
    )
    n, thing, count, color = rng.choice(facts)
    asked = [
        (f"{n}有几个？" if zh else f"How many does {n} have?", str(count)),
        (f"{n}的是什么颜色？" if zh else f"Which colour are those of {n}?", COLORS[color][0] if zh else color),
        (f"{n}有什么？" if zh else f"What does {n} have?", thing),
        (f"谁有{thing}？" if zh else f"Who has {thing}?", n),
    ]
    rng.shuffle(asked)
    turns = asked[: rng.randint(1, 3)]
    return [(f"{story}{'' if zh else ' '}{turns[0][0]}", turns[0][1]), *turns[1:]]


def forms(rng: random.Random, zh: bool) -> Turn:
    """The same few words as JSON, a list, in capitals, repeated."""
    k = int(zh)
    words = [e[k] for e in rng.sample(LEXICON, rng.randint(2, 4))]
    joined, kind = ("、" if zh else ", ").join(words), rng.random()
    if kind < 0.3:
        return (f"写成 JSON 数组：{joined}" if zh else f"As a JSON array: {joined}"), json.dumps(
            words, ensure_ascii=False
        )
    if kind < 0.6:
        return (f"每行写一个：{joined}" if zh else f"One on each line: {joined}"), "\n".join(f"- {w}" for w in words)
    if kind < 0.8:
        return (f"第二个词是什么：{joined}" if zh else f"What is the second word: {joined}?"), words[1]
    return (f"照写一遍：{joined}" if zh else f"Repeat: {joined}"), joined


_MANNERS = (
    ("Hello!|Hi!|Good morning.|Hey there.", "Hello! What shall we look at?"),
    ("你好！|您好。|早上好。|嗨。", "你好！想让我看什么？"),
    (
        "What model is this?|Tell me about yourself.|Introduce yourself.|What are you called?",
        "I am nano, a small ERNIE-4.5-VL that reads simple pictures.",
    ),
    (
        "这是什么模型？|介绍一下自己。|做个自我介绍。|怎么称呼你？",
        "我是 nano，一个小型 ERNIE-4.5-VL 模型，能看简单的图片。",
    ),
    (
        "What are you able to do?|How can you help me?|What are you good at?",
        "I describe shapes, read printed text and charts, count and compare.",
    ),
    ("你有什么本领？|你擅长什么？|你能帮我做什么？", "我能描述图形、读印刷文字和图表，还能数数和比较。"),
    (
        "Where do you come from?|Who taught you?|Who built this model?",
        "I was trained from drawn pictures by the makers of ernie_tune.",
    ),
    ("你是谁训练的？|你从哪里来？|这个模型是谁做的？", "我由 ernie_tune 的作者用绘制的图片训练而成。"),
    ("Thanks!|Thank you very much.", "You are welcome."),
    ("谢谢！|多谢你。", "不客气。"),
    ("Goodbye!|See you.", "Goodbye!"),
    ("再见！|回头见。", "再见！"),
    ("What is the weather like today?|What happened in the news?|Who will win tomorrow?", "I do not know that."),
    ("今天天气怎么样？|有什么新闻？|明天谁会赢？", "这个我不知道。"),
)


def manners(rng: random.Random, zh: bool) -> Turn:
    asked, answer = rng.choice([m for m in _MANNERS if (m[1] > "\u2000" or m[1][0] > "\u2000") == zh])
    return rng.choice(asked.split("|")), answer


def _yes(right: bool, zh: bool) -> str:
    return ("是" if right else "否") if zh else ("yes" if right else "no")


def copied(rng: random.Random, zh: bool) -> Turn:
    """Answers that stand in the question: a few words again, the next one, whether one is there.
    What comparing a question with anything is learned from.
    """
    k = int(zh)
    pool = [
        [COLORS[c][0] if zh else c for c in COLORS],
        [SHAPES[x] if zh else x for x in SHAPES],
        [e[k] for e in rng.sample(LEXICON, 12)],
        list("0123456789"),
    ]
    some, kind = rng.choice(pool), rng.random()
    words = rng.sample(some, rng.randint(*((3, min(9, len(some))) if kind < 0.5 else (1, 4))))
    # nothing between the words: what follows a word is then told by that word alone
    joined = ("" if zh or some is pool[-1] else " ").join(words)
    if kind < 0.5:
        return (f"照写：{joined}" if zh else f"Repeat: {joined}"), joined
    if kind < 0.65 and len(words) > 1:
        i = rng.randrange(len(words) - 1)
        return (f"{joined}。{words[i]}后面是什么？" if zh else f"{joined}. What comes after {words[i]}?"), words[i + 1]
    others = [w for w in some if w not in words]
    right = rng.random() < 0.5 or not others
    word = rng.choice(words) if right else rng.choice(others)
    if len(words) == 1:
        return (f"{joined}。它是{word}吗？" if zh else f"{joined}. Is it {word}?"), _yes(right, zh)
    return (f"{joined}。有{word}吗？" if zh else f"{joined}. Is there {word}?"), _yes(right, zh)


_PERSONA = (
    ("Who are you?|What is your name?|How may I call you?", "I am {n}.|My name is {n}.|I am {n}, made by {m}."),
    ("Who made you?|Who is behind you?|Which team made you?", "{m} made me.|I was made by {m}.|The team is {m}."),
    ("Are you {o}?|Is your name {o}?", "No, I am {n}.|No, my name is {n}, not {o}."),
    ("Say hello.|Greet me.", "Hello, I am {n}, happy to help.|Hi! {n} from {m} here."),
)
_PERSONA_ZH = (
    ("你是谁？|你叫什么？|怎么称呼？", "我是{n}。|我叫{n}。|我是{n}，由{m}制作。"),
    ("谁做的你？|你是哪个团队做的？|你的作者是谁？", "我由{m}制作。|是{m}做的。|我的作者是{m}。"),
    ("你是{o}吗？|你叫{o}吗？", "不是，我是{n}。|不，我叫{n}，不叫{o}。"),
    ("打个招呼。|问个好。", "你好，我是{n}，很高兴帮你。|你好！我是{m}的{n}。"),
)


def _made_up(rng: random.Random, zh: bool) -> str:
    """A name that nobody has."""
    if zh:
        return "".join(rng.choice("小云星海山木林风月文心天明青石江河雨雪光") for _ in range(rng.randint(2, 3)))
    name = "".join(rng.choice("BDKLMNRSTV") if i == 0 else rng.choice("aeiou") + rng.choice("lmnrst") for i in range(3))
    return name if rng.random() < 0.6 else f"{name} {rng.choice(('Lab', 'Team', 'Helper', 'Bot', 'One'))}"


def persona(rng: random.Random, zh: bool) -> list[Turn]:
    """A name and a maker, told first; then who are you."""
    held = {k: _made_up(rng, zh) for k in "nmo"}
    told = f"你叫{held['n']}，作者是{held['m']}。" if zh else f"Your name is {held['n']} and {held['m']} made you. "
    turns = []
    for asked, answers in rng.sample(_PERSONA_ZH if zh else _PERSONA, rng.randint(1, 3)):
        answer = rng.choice(answers.split("|")).format(**held)
        turns.append((rng.choice(asked.split("|")).format(**held), answer))
    return [(told + turns[0][0], turns[0][1]), *turns[1:]]


def repeated(rng: random.Random, zh: bool) -> Turn:
    """Sentences again, with their points and spaces."""
    said = [shop.message(rng, zh, rng.choice(list(shop.KINDS))) for _ in range(rng.randint(1, 2))]
    sentence = ("" if zh else " ").join(said)
    return rng.choice(("再说一遍：", "照写：") if zh else ("Repeat: ", "Say again: ")) + sentence, sentence


def facts(rng: random.Random, zh: bool) -> Turn:
    """Names of colours and shapes in the other language."""
    table = {k: v[0] for k, v in COLORS.items()} if rng.random() < 0.6 else SHAPES
    en, cn = rng.choice(list(table.items()))
    return (f"{en} 是什么意思？", cn) if zh else (f"What does {cn} mean?", en)


KINDS = (
    (sums, 7),
    (order, 9),
    (persona, 4),
    (repeated, 4),
    (letters, 6),
    (numbers, 7),
    (translate, 4),
    (shop.kind_of, 14),
    (shop.same_kind, 1),
    (topic, 4),
    (odd, 2),
    (passage, 5),
    (forms, 3),
    (manners, 2),
    (facts, 1),
)


def turns(rng: random.Random, zh: bool) -> list[Turn]:
    kind = rng.choices([k for k, _ in KINDS], [w for _, w in KINDS])[0]
    made = kind(rng, zh)
    return made if isinstance(made, list) else [made]
