"""Continuing prompts with a model: sampling, a batch that rows join and leave, who runs when,
answers as text.

The server is this and a thread; evaluation, the terminal chat and whoever needs samples in bulk use
it alone:

    engine = Engine(model, processor)
    scheduler = engine.scheduler(Capacity(rows=64))
    params = engine.params(max_new_tokens=64, temperature=1.0, n=8)
    prompts = [Prompt(row, params, key=i, index=(0, i)) for i, row in enumerate(rows)]
    for key, completions in complete(scheduler, prompts):  # as prompts finish
        ...

A row may hold pictures (`Row`), and its `n` samples share its prefill and its memory. Sample s
draws from a generator seeded by (seed, *index, s) alone, one number a token: index=(round, prompt)
makes the samples of a run of rollouts. A `Completion` has token ids, the log-probability of each
under the model and under what it was really drawn from (`sampled_logps`), which tokens were sampled
and which forced (`sampled`), and why it ended. `abort` gives unfinished samples back as `Partial`s,
and `resume` (or `complete(..., partials=...)`) goes on with them as if they had never stopped;
`cancel` forgets. For learning ask for no penalty and no truncation: then `sampled_logps` are log
softmax(scores / temperature) over what `banned_ids` leaves.

No thread, no clock: what is let in when follows from what was submitted, so every rank decides
alike. Refuses to know: HTTP, training.
"""
