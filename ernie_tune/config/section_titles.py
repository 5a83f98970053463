"""What the sections of the settings are about, in both languages.

Refuses to know: which settings stand in them, where the titles are shown.
"""

from __future__ import annotations

from ernie_tune.config.language import say

SECTIONS = {
    "data": say("rows: which, in which proportion, cut to which length", "数据：哪些、按什么比例、截到多长"),
    "media": say(
        "size of pictures and videos; null: what the model folder says", "图片与视频的大小；null 表示按模型文件夹"
    ),
    "model": say("the model, and what is done to it", "模型，以及如何训练"),
    "lora": say("low-rank adapters", "低秩适配器"),
    "added": say("bottleneck adapters, prompts and prefixes", "瓶颈适配器、提示与前缀"),
    "freeze": say("what stays as it is", "保持不变的部分"),
    "train": say("how long, in what batches, on which loss", "训练多久、批多大、什么损失"),
    "optim": say("the optimizer and its schedule", "优化器与学习率曲线"),
    "compute": say("number format, and time for memory", "数值格式，以及用时间换显存"),
    "eval": say("when and on what the model is measured", "何时、用什么评估模型"),
    "save": say("what is written where", "写出什么、写到哪里"),
    "log": say("what is told while training", "训练时输出什么"),
    "parallel": say("degrees of parallelism", "并行度"),
    "preference": say("objectives that compare answers", "比较回答的目标"),
    "picture": say("pairs made of a row's own picture", "由图片本身制作的成对数据"),
    "reference": say("the policy that answers are compared with", "用于比较的参考策略"),
    "signals": say("how each kind of judgement is learned", "各类评判如何学习"),
    "rollout": say("sampled answers and their rewards", "采样的回答及其奖励"),
    "sampling": say(
        "where sampled answers end, and what of them is learned from", "采样回答何时结束、学习其中哪些部分"
    ),
    "evidence": say("rewards for looking at the picture", "看图的奖励"),
    "watch": say("what a run that samples answers does not put up with", "采样训练的监视与时限"),
    "policy": say("the loss of a policy that samples its answers", "采样回答的策略的损失"),
    "mismatch": say("whether sampling and training see one policy", "采样与训练是否为同一策略"),
    "critic": say("what answers are expected to be worth", "回答的预期价值"),
    "teacher": say("a teacher of sampled answers, token by token", "逐 token 指导采样回答的教师模型"),
    "pairs": say("pairs among sampled answers, beside the policy's loss", "采样回答之间的成对比较，与策略损失相加"),
}
