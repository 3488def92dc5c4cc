"""What a run has come to, and two runs compared, on the command line.

python -m lightning_gendiag report lightning_logs/version_3
python -m lightning_gendiag compare lightning_logs/version_2 lightning_logs/version_3 --figure compared.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from lightning_gendiag.comparison import compare_runs
from lightning_gendiag.tensorboard.files import read_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command, and returns the exit status: 1 where a run cannot be read, or a picture not be written."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_gendiag", description="Reads what runs wrote for TensorBoard."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="say in words what a run has come to")
    report.add_argument("run", help="folder with its event files, such as lightning_logs/version_3")
    compare = commands.add_parser("compare", help="say what is better and worse in the second of two runs")
    compare.add_argument("first", help="folder of the first run")
    compare.add_argument("second", help="folder of the run that is compared with it")
    compare.add_argument("--table", action="store_true", help="print all series as a table")
    compare.add_argument("--figure", help="file for a picture of the comparison, such as compared.png")
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, TextIOWrapper):
        # consoles of Windows lack some letters
        sys.stdout.reconfigure(errors="replace")
    try:
        if options.command == "report":
            print(_report(options.run))
        else:
            _compare(options.first, options.second, options.table, options.figure)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _report(run: str) -> str:
    found = read_run(run)
    if found.report is not None:
        return str(found.report["summary"])
    counts = ", ".join(f"{name} {len(monitored.evaluations)}" for name, monitored in found.monitors.items())
    return f"Not judged: the run had no CollapseStopping. Evaluations: {counts}."


def _compare(first: str, second: str, table: bool, figure: str | None) -> None:
    comparison = compare_runs(first, second)
    print(comparison.summary)
    if table:
        print(f"\n{comparison.table}")
    if figure is not None:
        from PIL import Image

        Image.fromarray(comparison.figure().numpy()).save(figure)
        print(f"The figure is in {figure}.")


if __name__ == "__main__":
    sys.exit(main())
