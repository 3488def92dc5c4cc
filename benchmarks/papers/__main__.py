"""Shows results of a paper again, and writes them to its record and its page.

``python -m benchmarks.papers entropy`` takes some minutes of one core; without a name, all papers have their turn. Data are
those of scikit-learn, and the small sets of ``benchmarks.zoo``, which need the extra ``zoo``. ``--only moons`` repeats one
part; ``python -m benchmarks.pages`` makes the pages of the records.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
import warnings

import torch
from lightning.pytorch import seed_everything

from benchmarks.pages import markdown
from benchmarks.papers.study import STUDIES, Part, record_of, save


def show(part: Part) -> None:
    """Prints a part."""
    print(markdown(part.columns, part.rows))
    for finding in part.findings:
        print(f"  shown again: {finding.shown}. {finding.paper}: {finding.ours}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"papers out of {', '.join(STUDIES)}; all by default")
    parser.add_argument("--only", help="one part of the study")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="end with a line of JSON")
    options = parser.parse_args(arguments)
    names = options.names or STUDIES
    if unknown := sorted({*names} - {*STUDIES}):
        parser.error(f"names must be out of {', '.join(STUDIES)}, got {', '.join(unknown)}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in names:
        parts = importlib.import_module(f"benchmarks.papers.{name}").PARTS
        for part, run in parts.items():
            if options.only in (None, part):
                seed_everything(options.seed, verbose=False)
                started = time.process_time()
                found = run(options.seed)
                seconds = time.process_time() - started
                print(f"\n{name}, {part}: {seconds:.0f} s", flush=True)
                show(found)
                save(name, part, seconds, found)
    if options.json:
        print(json.dumps({name: record_of(name) for name in names}))


if __name__ == "__main__":
    main()
