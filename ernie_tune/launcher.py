"""The file that `python -m paddle.distributed.launch [options] ernie_tune/launcher.py train
run.yaml` runs: the launcher takes a path, no module.

Refuses to know anything but where the package is.
"""

if __name__ == "__main__":
    import os
    import sys

    # Python puts this file's folder first on the path, where `data` or `models` would hide other
    # packages of those names.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or ".") != here]
    if os.path.dirname(here) not in map(os.path.abspath, sys.path):
        sys.path.insert(0, os.path.dirname(here))

    from ernie_tune.cli.main import main

    raise SystemExit(main())
