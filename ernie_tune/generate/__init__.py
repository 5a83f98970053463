"""Continuing prompts with a model: sampling, a batch that rows join and leave, who runs when, answers as text.

The server is this and a thread; evaluation, the terminal chat and whoever needs samples in bulk use it alone:

    engine = Engine(model, processor)
    scheduler = engine.scheduler(Capacity(rows=64))
    prompts = [Prompt(row, engine.params(max_new_tokens=64, temperature=1.0, n=8), key=i, index=i) for i, row in ...]
    for key, completions in complete(scheduler, prompts):  # as prompts finish
        ...

No thread, no clock: what is let in when follows from what was submitted, so every rank decides alike. Refuses to know: HTTP, training.
"""
