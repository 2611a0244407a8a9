"""`python -m causal_conv1d.backend`, or `-m causal_conv1d`: which backend runs what, and why."""

import argparse

from causal_conv1d.backend import report


def main(program: str) -> None:
    """Print the report; `program` is what the user called, for the help."""
    argparse.ArgumentParser(
        program, description="Print which backend runs which op on this machine, and why."
    ).parse_args()
    print(report())


if __name__ == "__main__":
    main("python -m causal_conv1d.backend")
