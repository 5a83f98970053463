"""The studio: look at data, train, watch, compare, judge answers by hand, serve, in a browser.

Its rooms stand on plain modules that know no page: `workspace` (which paths exist for it), `jobs`
(training and serving as child processes), `runs` (what run folders tell), `forms` (settings as
fields and as YAML), `desk` and `judgements` (judging, and what is written of it), `asking` (models
behind child servers). `app` is the page, `gate` what every request passes. Loads without paddle and
never imports what trains.
"""
