"""Shows results of a paper again, and writes them to its record and its page.

``python -m benchmarks.papers entropy`` takes some minutes of one core. Data are those of scikit-learn, and the small sets of
``benchmarks.zoo``, which need the extra ``zoo``. ``--only moons`` repeats one part; ``--pages`` writes the tables of the pages
from the records and computes nothing.
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
from benchmarks.papers.study import Part, record_of, save, write_pages

STUDIES = ("cms", "entropy", "dysfunctions", "k_star", "primitives")


def show(part: Part) -> None:
    """Prints a part."""
    print(markdown(part.columns, part.rows))
    for finding in part.findings:
        print(f"  shown again: {finding.shown}. {finding.paper}: {finding.ours}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=STUDIES, help="the paper")
    parser.add_argument("--only", help="one part of the study")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="end with a line of JSON")
    parser.add_argument("--pages", action="store_true", help="write the tables of all pages from the records")
    options = parser.parse_args(arguments)
    if options.pages:
        write_pages(STUDIES)
        return
    if options.name is None:
        parser.error(f"name must be one of {', '.join(STUDIES)}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    parts = importlib.import_module(f"benchmarks.papers.{options.name}").PARTS
    for name, run in parts.items():
        if options.only in (None, name):
            seed_everything(options.seed, verbose=False)
            started = time.process_time()
            part = run(options.seed)
            seconds = time.process_time() - started
            print(f"\n{options.name}, {name}: {seconds:.0f} s", flush=True)
            show(part)
            save(options.name, name, seconds, part)
    if options.json:
        print(json.dumps(record_of(options.name)))


if __name__ == "__main__":
    main()
