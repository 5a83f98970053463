"""A company's rules in words (`rules.json`, one a line): for each its value with us, how documents
put it, and how it is asked for, in Chinese and English.

Words of this project. Refuses to know: passages, models.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LANGUAGES = ("zh", "en")
COMPANY = {"zh": "远帆科技", "en": "Farsail"}
NOT_FOUND = {"zh": "资料中没有", "en": "not in the passages"}


@dataclass(frozen=True)
class Rule:
    """One rule. `said`: how our documents put it, then how another company's might; `asked`: three
    ways for training, then two that training never sees. `{v}` is the value in all of them.
    """

    document: str
    section: str  # rules of one section of a document stand in one passage
    value: int
    unit: dict[str, str]
    said: dict[str, tuple[str, str]]
    asked: dict[str, tuple[str, str, str, str, str]]

    def answer(self, value: int, language: str) -> str:
        """`5 天`, `5 days`."""
        return f"{value} {self.unit[language]}"


DOCUMENTS = {
    "leave": {"zh": "休假制度", "en": "Leave policy"},
    "attendance": {"zh": "考勤与远程办公", "en": "Attendance and remote work"},
    "travel": {"zh": "差旅与报销", "en": "Travel and expenses"},
    "equipment": {"zh": "设备与账号", "en": "Equipment and accounts"},
}
SECTIONS = {
    "annual_early": ("年假：十年以下", "Annual leave up to ten years"),
    "annual_late": ("年假：十年至二十年", "Annual leave from ten to twenty years"),
    "annual_senior": ("年假：二十年以上", "Annual leave after twenty years"),
    "carry": ("年假结转", "Carrying annual leave over"),
    "notice": ("年假申请", "Asking for annual leave"),
    "sick": ("病假", "Sick leave"),
    "marriage": ("婚假", "Marriage leave"),
    "maternity": ("产假", "Maternity leave"),
    "paternity": ("陪产假", "Paternity leave"),
    "child": ("育儿假", "Child care leave"),
    "grief": ("丧假", "Bereavement leave"),
    "unpaid": ("事假", "Unpaid leave"),
    "exam": ("考试假", "Examination leave"),
    "volunteer": ("志愿者假", "Volunteer leave"),
    "overtime": ("加班调休", "Overtime"),
    "remote": ("远程办公", "Remote work"),
    "probation": ("试用期", "Probation"),
    "lateness": ("迟到", "Lateness"),
    "claims": ("报销时限", "Expense claims"),
    "meals": ("出差餐补", "Meals on trips"),
    "hotel": ("住宿标准", "Hotels"),
    "laptop": ("笔记本电脑", "Laptops"),
    "password": ("密码", "Passwords"),
    "visitors": ("访客网络", "Guest network"),
}


def _read(values: dict[str, Any]) -> tuple[str, Rule]:
    name = values.pop("rule")
    both = {key: {tongue: tuple(texts) for tongue, texts in values[key].items()} for key in ("said", "asked")}
    return name, Rule(**{**values, **both})


_TEXT = (Path(__file__).parent / "rules.json").read_text(encoding="utf-8")
RULES: dict[str, Rule] = dict(map(_read, json.loads(_TEXT)))

# Pictures among the documents: their captions, then how what they show is asked for.
FIGURES: dict[str, dict[str, tuple[str, ...]]] = {
    "closing_days": {
        "zh": ("图一：公司全年统一放假安排，各月放假天数的柱状图", "统一放假安排中，哪个月放假天数最多？",
               "公司哪个月统一放假最久？", "全年里，各月放假天数最多的是几月？", "我想知道公司放假最多的月份。"),
        "en": ("Figure 1: company closing days, bars of days by month", "In which month are there most company closing days?",
               "When is the company closed for most days?", "Which month has the longest closing?",
               "Are there more closing days in October or in February?"),
    },
    "approval": {
        "zh": ("图二：请假审批流程，从员工到主管再到人事的流程图", "请假审批流程中，主管之后由谁审批？",
               "主管同意请假以后，下一步找谁审批？", "请假最后由谁批？", "请假流程图里，最后一格是谁？"),
        "en": ("Figure 2: approval of leave, a flow chart from staff to human resources",
               "In the flow chart of approval, who approves after the manager?",
               "After my manager agrees to the leave, who is next?", "Who is the last to approve leave?",
               "Whose approval do I need besides the manager's?"),
    },
}  # fmt: skip
FIGURE_ANSWERS = {"closing_days": {"zh": "10 月", "en": "October"}, "approval": {"zh": "人事", "en": "human resources"}}

# What no document says.
UNANSWERED = {
    "zh": ("公司有健身房吗，每月多少元？", "年终奖发几个月工资？", "停车位每月多少元？", "食堂几点开门？"),
    "en": ("What does the gym cost a month?", "How many months of salary is the bonus?",
           "What does a parking place cost a month?", "When does the canteen open?"),
}  # fmt: skip
