"""Who judges sampled answers: from what a user names to a `Rubric`. Here are reward models, as
judges of groups of answers; checkers and functions are the rubric's own (rewards/).

A reward model that is the policy's own base with another adapter is switched on the policy's model
and needs no second copy; any other is placed beside it. Refuses to know: when is judged, what
becomes of the rewards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ernie_tune.config.arguments import RunConfig
from ernie_tune.config.language import say
from ernie_tune.config.loader import ARGS_FILE, load_config
from ernie_tune.data.processor import Processor
from ernie_tune.data.records import Candidate, Message, Record, Reward, Verifier, as_words
from ernie_tune.data.units import UnitEncoder
from ernie_tune.evaluate.reward_model import score_records
from ernie_tune.machine.place import Place
from ernie_tune.machine.placed import Placed, read_parts
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.peft.model import PeftModel
from ernie_tune.rewards.endpoint import SCHEME, EndpointJudge
from ernie_tune.rewards.functions import Answered, Group, RewardFunction, Scores
from ernie_tune.rewards.named import load_function, made_of
from ernie_tune.rewards.rubric import ROW, Judge, RowVerifiers, Rubric
from ernie_tune.rewards.verifiers import SHAPING, VERIFIERS
from ernie_tune.train.reward_model import HEAD_FOLDER, RewardHead, read_head
from ernie_tune.trainers import assemble
from ernie_tune.trainers.reward import RewardModel, RewardTrainer


class ModelJudge:
    """A reward model's number of each answer; None for an answer that does not fit its length, or
    whose thought has no end.

    `folder`: what `ernie-tune reward` left, a whole model or an adapter. Raises ValueError for a
    folder that holds no reward model.
    """

    def __init__(self, folder: str | Path, rows: int = 8) -> None:
        self.folder, self.rows = Path(folder), rows
        if not (self.folder / ARGS_FILE).is_file() or not (self.folder / HEAD_FOLDER).is_dir():
            raise ValueError(
                say(
                    f"reward model {folder} must hold {ARGS_FILE} and {HEAD_FOLDER}/; name the output_dir of "
                    "`ernie-tune reward`",
                    f"奖励模型 {folder} 中须有 {ARGS_FILE} 和 {HEAD_FOLDER}/；请给出 `ernie-tune reward` 的 output_dir",
                )
            )
        self.name = self.folder.name
        self.config = load_config(self.folder / ARGS_FILE).config
        self.is_adapter = not (self.folder / "config.json").is_file()
        self.head: RewardHead = read_head(self.folder)
        processor = Processor.from_pretrained(self.folder)
        longest = self.config.data.max_seq_len
        self.encoder = UnitEncoder(processor, longest, longest - 1, "delete")
        self._adapter = ""  # its name on the policy's model
        self._shared: PeftModel | None = None
        self._forward: Any = None

    def shares(self, model: ErnieModel, config: RunConfig) -> bool:
        """Whether it is another adapter of the base that `model` has."""
        mine = self.config
        same = _same_folder(mine.model.model_name_or_path, model.name_or_path)
        quantised = mine.compute.weight_quantize_algo == config.compute.weight_quantize_algo
        return self.is_adapter and isinstance(model, PeftModel) and same and quantised

    def attach(self, model: ErnieModel, config: RunConfig) -> None:
        """Called before the policy is laid out: a reward model of its base goes onto it."""
        if self._shared is None and self.shares(model, config):
            assert isinstance(model, PeftModel)
            self._shared, self._adapter = model, f"reward-{len(model.adapters)}"
            with kept_active(model):
                model.load_adapter(self.folder, self._adapter)

    def open(self, place: Place, policy: Placed) -> None:
        """Called once the policy lies: a reward model of its own goes beside it."""
        if self._shared is not None:
            self._forward = policy.forward
        elif self._forward is None:
            self._forward = place.put(*self._unread(), trained=False).forward

    def _unread(self) -> tuple[ErnieModel, Any]:
        if not self.is_adapter:
            named = dataclasses.replace(self.config.model, model_name_or_path=str(self.folder))
            return assemble.unread_model(RunConfig(**{**vars(self.config), "model": named}))
        base, source = assemble.unread_model(self.config)
        if self.config.compute.weight_quantize_algo != "none":
            assemble.quantize_base(base, self.config.compute.weight_quantize_algo)
        return PeftModel.from_pretrained(base, self.folder), source

    def __call__(self, groups: Sequence[Group]) -> Scores:
        if self._forward is None:  # nothing is trained beside it
            model, source = self._unread()
            read_parts(model, source)
            self._forward = model
        shared = self._shared
        with shared.acting(self._adapter) if shared is not None else contextlib.nullcontext():
            found = score_records(
                self._forward, [judged(*group) for group in groups], self.encoder, self.rows, self.head
            )
        return [
            [None] * len(answers) if scores is None else list(scores)
            for (_, answers), scores in zip(groups, found, strict=True)
        ]


class OpenedJudge:
    """A `RewardModel` that is at hand already, as a judge."""

    def __init__(self, model: RewardModel, name: str = "reward_model") -> None:
        self.model, self.name = model, name

    def __call__(self, groups: Sequence[Group]) -> Scores:
        found = self.model.score([judged(*group) for group in groups])
        return [
            [None] * len(answers) if scores is None else list(scores)
            for (_, answers), scores in zip(groups, found, strict=True)
        ]


def open_judges(rubric: Rubric, place: Place, policy: Placed) -> None:
    """Called once the policy lies: reward models go beside it, and of the processes that judge the
    same answers one asks an address and tells the others.
    """
    for judge in rubric.judges:
        if isinstance(judge, ModelJudge):
            judge.open(place, policy)
        if isinstance(judge, EndpointJudge) and place.several:
            _asked_once(judge, place)


def _asked_once(judge: EndpointJudge, place: Place) -> None:
    tensor, pipe = place.mesh.group("tensor"), place.mesh.group("pipe")
    judge.leads = place.mesh.rank_in("tensor") == place.mesh.rank_in("pipe") == 0
    judge.share = lambda values: pipe.objects(tensor.objects(values)[0])[0]


@contextlib.contextmanager
def kept_active(model: PeftModel) -> Any:
    """A `with` after which the adapter that acts and is trained is the one from before it."""
    before = model.active
    yield
    if before is not None:
        model.set_adapter(before)


def judged(record: Record, answers: Sequence[Answered]) -> Record:
    """A prompt with its sampled answers as the candidates that a reward model reads, pictures
    included. Thoughts are thoughts there, too."""
    candidates = tuple(Candidate((_turn(answer.text),)) for answer in answers)
    return dataclasses.replace(record, signal="rating", messages=record.prompt, candidates=candidates, reward=None)


def _turn(text: str) -> Message:
    thought, mark, after = text.partition("</think>")
    if not mark:
        return {"role": "assistant", "content": as_words(text)}
    thought = thought.replace("<think>", "", 1)
    turn: Message = {"role": "assistant", "content": as_words(after.strip("\n"))}
    return {**turn, "reasoning_content": as_words(thought.strip("\n"))} if thought.strip() else turn


def _same_folder(one: str, other: str) -> bool:
    return bool(one) and Path(one).is_dir() and Path(other).is_dir() and Path(one).resolve() == Path(other).resolve()


# --- from what is named to a rubric ---------------------------------------------------------------


def rubric_of(config: RunConfig, functions: Any, weights: Sequence[float] | None, reward_model: Any = None) -> Rubric:
    """The judges of a run: `functions` given as objects, else those that the settings name, and the
    reward model beside them; else what rows name. Raises ValueError for what is no judge."""
    r = config.rollout
    given = functions if functions is not None else r.reward_funcs
    listed = list(given) if isinstance(given, list | tuple) else [given]
    listed += [reward_model if reward_model is not None else _folder_of_judge(config.critic.reward_model)]
    judges = [_judge(config, one) for one in listed if one is not None and one != ""]
    _number(judges)
    return Rubric(
        judges,
        tuple(weights if weights is not None else r.reward_weights),
        r.max_completion_length,
        r.reward_check,
        config.evidence.evidence_scope,
    )


def monitors_of(config: RunConfig) -> Rubric | None:
    """The judges that nothing is learned from; None where none is named. Raises ValueError for what
    is no judge."""
    judges = [_judge(config, name) for name in config.watch.monitor_reward_funcs]
    _number(judges)
    return Rubric(judges, (), config.rollout.max_completion_length, False) if judges else None


def _number(judges: Sequence[Judge]) -> None:
    """Different functions of one name (lambdas, those of two files) are told apart by a number."""
    seen: dict[str, list[Any]] = {}
    for judge in judges:
        if isinstance(judge, RewardFunction):
            others = seen.setdefault(judge.name, [])
            if others and not any(_same(judge.function, other) for other in others):
                judge.name = f"{judge.name}_{len(others) + 1}"
            others.append(judge.function)


def _same(one: Any, other: Any) -> bool:
    """Whether two functions are one, also where its file was read twice."""
    known = [(f.__code__, f.__defaults__, f.__closure__) for f in (one, other) if inspect.isfunction(f)]
    return one is other or (len(known) == 2 and known[0] == known[1] and known[0][2] is None)


def _folder_of_judge(name: str) -> Path | None:
    """The setting `reward_model`; None where it is empty. Raises ValueError where no folder is."""
    if name and not Path(name).is_dir():
        raise ValueError(
            say(
                f"reward_model ({name}) must be a folder that `ernie-tune reward` made; correct the path, or name "
                "checkers and functions in reward_funcs",
                f"reward_model（{name}）须为 `ernie-tune reward` 生成的目录；请改正路径，或在 reward_funcs 中给出检查器与函数",
            )
        )
    return Path(name) if name else None


class _Named:
    """A checker by name, for rows that give its gold answer."""

    def __init__(self, name: str, limit: int, scope: str) -> None:
        self.name, self.rows = name, RowVerifiers(limit, scope)

    def __call__(self, groups: Sequence[Any]) -> Any:
        mine = []
        for record, answers in groups:
            reward = record.reward or Reward()
            mine.append(
                (
                    dataclasses.replace(record, reward=dataclasses.replace(reward, verifiers=(Verifier(self.name),))),
                    answers,
                )
            )
        return self.rows(mine)


def _judge(config: RunConfig, given: Any) -> Judge:
    r = config.rollout
    how = r.reward_error, r.reward_timeout_seconds, config.watch.reward_limit_seconds
    if isinstance(given, RewardModel):
        return OpenedJudge(given)
    if isinstance(given, RewardTrainer):
        return OpenedJudge(RewardModel(given.model, given.processor, given.args.data.max_seq_len))
    if isinstance(given, Path):
        return ModelJudge(given)
    if isinstance(given, type):
        given = made_of(given, given.__name__)
    if callable(given):
        if hasattr(given, "name") and "groups" in inspect.signature(type(given).__call__).parameters:
            return given  # a judge of ours
        return RewardFunction(given, "", *how)
    text = str(given)
    if text.startswith(SCHEME):
        return EndpointJudge(text, r.reward_timeout_seconds, r.reward_error)
    if text == ROW:
        return RowVerifiers(r.max_completion_length, config.evidence.evidence_scope)
    if text in VERIFIERS:
        return _Named(text, r.max_completion_length, config.evidence.evidence_scope)
    if ".py:" in text:
        return RewardFunction(load_function(text), text.rpartition(":")[2], *how)
    if Path(text).is_dir():
        return ModelJudge(text)
    checkers = ", ".join(n for n in VERIFIERS if n not in SHAPING)
    raise ValueError(
        say(
            f"reward_funcs ({text}) must be the name of a checker ({checkers}), {ROW} (what each row names), "
            "file.py:function, the folder of a reward model, or judge:http://…; correct it",
            f"reward_funcs（{text}）须为检查器名（{checkers}）、{ROW}（由每行指定）、file.py:function、"
            "奖励模型的目录，或 judge:http://…；请改正",
        )
    )
