"""`python -m ernie_tune VERB …`: the same as `ernie-tune VERB …`."""

from ernie_tune.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
