"""Tables of pages, made from what scripts have recorded.

``python -m benchmarks.pages`` writes those of all pages in :data:`TABLES` and of the papers, and computes nothing. A table
follows a comment with its name, and is made from files of ``benchmarks/outputs``, the last lines of scripts that were called
with ``--json``, or of ``benchmarks/records``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lightning_gendiag.callbacks.generative_diagnostics import MONITORS

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "records"

NOT_MEASURED = "This part has a script, and was not measured yet."
"""What a page says in place of a table."""

LABELS = {
    "sampling": "samples of a DCGAN",
    "cosine mean similarity, real side": "`CosineMeanSimilarity`, real side and null, once",
    "cosine mean similarity, compare": "`CosineMeanSimilarity`, later",
    "class features": "class features",
    "classification": "classes by real images, on the CPU",
    "Jacobian Gram matrices": "Jacobian Gram matrices",
    "find_regions": "`find_regions`",
    "shares, Fréchet distance by class": "shares and Fréchet distances of the classes",
    "k*": "`KStar`",
    "manifold entropy of these": "manifold entropy of these",
}
"""What the pages call each part."""

AXES = {
    "resolution": "side of the image",
    "samples": "images",
    "latent dimensions": "latent dimensions",
    "latents": "latents",
    "classes": "classes",
    "regions": "regions",
}
"""What the pages call the amounts by which the cost of a part grows."""

BASE = {"samples": 512, "latents": 16}
"""The amounts of a base case."""

SETTINGS = ((64, 1024), (64, 8192), (256, 1024), (256, 4096))
"""Side of the images and number of samples in the columns of the table of GPUs."""


def text_of(cell: Any) -> str:
    """Returns a cell as a page shows it, numbers with three digits."""
    if not isinstance(cell, float):
        return re.sub(r"(\d)%", r"\1 %", str(cell))
    return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:.3g}"


def markdown(columns: list[str], rows: list[list[Any]]) -> str:
    """Returns a table."""
    first, *others = ["| " + " | ".join(map(text_of, line)) + " |" for line in (columns, *rows)]
    return "\n".join([first, "|" + "---|" * len(columns), *others])


def filled(text: str, made: dict[str, str]) -> str:
    """Returns the text of a page whose tables, which follow comments with their names, are those that were made."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n\n{made.get(match[1], NOT_MEASURED)}\n"

    row = rf"(?:\||{re.escape(NOT_MEASURED)}).*\n"
    return re.sub(rf"<!-- (\w+) -->\n(?:\n(?:{row})+)?", table, text)


def two_digits(value: float) -> str:
    """Returns a measured time or ratio, of which no more digits come back in another run.

    Example:
        >>> two_digits(1234.5), two_digits(0.0456), two_digits(30.2)
        ('1,200', '0.046', '30')
    """
    short = float(f"{value:.2g}")
    return f"{short:,.0f}" if short >= 10 else f"{short:.2g}"


def share(value: float) -> str:
    """Returns a share in per cent."""
    return f"{100 * value:.0f} %"


# ---- docs/costs.md ----

MODELS = {"gan": "GAN", "vae": "VAE", "flow": "flow", "diffusion": "diffusion", "vq": "VQ-VAE"}
"""Example models in the columns of the table of evaluations."""


def overhead_table(found: Any) -> str:
    """Returns what a training takes without callbacks, with the diagnostics and with FID."""
    again = found.get("none_again_memory_ratio")
    rows = [
        [
            "no callback; a second process without",
            f"1; {found['none_again_over_none']:.3f}",
            f"1; {again:.2f}" if again else "1",
            f"{found['none_events_mib']:.2f} MiB",
            "",
        ],
        [
            "`GenerativeDiagnostics()`: seven diagnostics and the alarms",
            f"{found['measured_over_none']:.3f}",
            f"{found['peak_memory_ratio']:.2f}",
            f"{found['default_events_mib']:.1f} MiB",
            f"{found['evaluations']:.0f} of the most frequent diagnostic; the first one takes "
            f"{found['first_evaluation_s']:.2f} s, setup included, and a later one {found['later_evaluation_s']:.2f} s, with "
            "what other diagnostics evaluate at the same time",
        ],
        [
            "torchmetrics' FID of 1,024 samples with a small network, every epoch",
            f"{found['fid_over_none']:.2f}",
            f"{found['fid_memory_ratio']:.2f}",
            f"{found['fid_events_mib']:.2f} MiB",
            f"{found['fid_evaluations']:.0f}; {found['fid_evaluation_s']:.2f} s each",
        ],
    ]
    return markdown(["", "time", "peak memory", "event files", "evaluations"], rows)


def evaluation_table(found: Any) -> str:
    """Returns milliseconds of an evaluation by diagnostic and model."""

    def cell(name: str, model: str) -> str:
        if model == "vq" and name not in ("shared", "codebook"):
            # as with other models
            return ""
        own = [sizes[name]["later"] for sizes in found[model].values() if name in sizes]
        return ", ".join(map(two_digits, own))

    def largest(name: str, part: str) -> str:
        values = [size[name][part] for sizes in found.values() for size in sizes.values() if part in size.get(name, {})]
        # less than a millisecond is no setup, and nothing was drawn
        return two_digits(max(values)) if max(values, default=0) >= 1 else ""

    names = {"shared": "the copy of the module, its samples, latents and reconstructions, for all"}
    often = {kind.name: kind.period_multiplier for kind in MONITORS}
    names |= {kind.name: f"`{kind.metric_class.__name__}`" for kind in MONITORS}
    rows = [
        [
            label,
            *(cell(name, model) for model in MODELS),
            largest(name, "setup"),
            largest(name, "panel"),
            often.get(name, ""),
        ]
        for name, label in names.items()
    ]
    return markdown(["", *MODELS.values(), "setup, once, at most", "panel, at most", "evaluated at one of"], rows)


LARGE = {
    ("find_regions, 400 of 1x32x32", "find_regions, 400 of 1x64x64"): (
        "`find_regions`, 400 grey images of 32x32; 64x64",
        "P pixels: P² for each batch of 100, and for the clustering",
    ),
    tuple(f"find_regions, 400 of 1x{size}x{size}" for size in (128, 256, 512)): (
        "of 128x128; 256x256; 512x512",
        "above 4,096 pixels, at most 4,096 square cells are clustered; what grows is their length",
    ),
    ("find_regions, 400 of 3x256x256",): ("of 3x256x256", "the channels"),
    ("CosineMeanSimilarity, 1,024 of 3x64x64",): (
        "`CosineMeanSimilarity`, first evaluation with its null: 1,024 against 1,024 of 3x64x64",
        "(M N + M² + 2 N²) D for images of D numbers; later evaluations (M N + M²) D",
    ),
    ("CosineMeanSimilarity, 8,192 of 3x64x64", "CosineMeanSimilarity, 1,024 of 3x256x256"): (
        "8,192 against 8,192 of 3x64x64; 1,024 of 3x256x256",
        "memory: both sides once in float32, and one block of pairs",
    ),
    ("k_star, 10,000 of 128", "k_star, 50,000 of 128"): ("`k_star`, N = 10,000; 50,000, D = 128", "N² D"),
}
"""Label of each row of the table of large images, and what its cost grows with, by the measurements that it shows."""


def large_table(scale: Any, entropy: Any, primitives: Any) -> str:
    """Returns seconds and memory of large images and many of them."""
    rows = []
    for names, (label, growth) in LARGE.items():
        own = [scale["sizes"][name] for name in names]
        seconds = "; ".join(two_digits(each["seconds"]) for each in own) + " s"
        rows.append([label, seconds, "; ".join(f"{each['gib']:.1f}" for each in own) + " GiB", growth])
    gram, minimal = entropy["decoder_gram"], primitives["minimal_features"]
    rows.append(
        [
            "`decoder_gram`, decoder of a DCGAN, 3x64x64, L = 100, 64 latents",
            f"{two_digits(gram['seconds'])} s",
            f"{two_digits(gram['mib'])} MiB more",
            "L passes of tangents for each latent",
        ]
    )
    rows.append(
        [
            "`minimal_features` of all 512 sets of 9 regions, GAN at 8x8",
            f"{two_digits(minimal['seconds'])} s",
            f"{two_digits(minimal['mib']['512'])} MiB more; {two_digits(minimal['mib']['64'])} MiB with `batch_size=64`",
            "2^n for n regions",
        ]
    )
    return markdown(["", "time", "peak", "grows with"], rows)


def compared_table(cka: Any, cosine: Any, entropy: Any, primitives: Any, k_star: Any) -> str:
    """Returns how many times as fast functions are as the obvious way."""
    forward, reverse = entropy["jacfwd"], entropy["jacrev"]
    ratios = [
        ("`pixel_cka` of 64x64 pixels", "a loop over pairs", cka["ratio"]),
        ("`cosine_mean_similarity`", "its definition", cosine["ratio"]),
        ("`decoder_gram`", f"`jacfwd`, which takes {forward['mib'] / 1024:.1f} GiB", forward["ratio"]),
        ("`decoder_gram`", "`jacrev`", reverse["ratio"]),
        ("`minimal_features`", "one optimisation after another with Adam", primitives["minimal_features"]["ratio"]),
        ("mutual information of L = 784 dimensions", "a loop", entropy["mutual_information_ratio"]),
        ("`k_star`", "the matrix of distances and a sort", k_star["ratio"]),
    ]
    rows = [[function, other, two_digits(ratio)] for function, other, ratio in ratios]
    return markdown(["function", "compared with", "times as fast"], rows)


def scaling_table(found: Any) -> str:
    """Returns how the time of each part grows."""
    amounts = {entry["axis"]: entry["amounts"] for entry in found}
    rows = []
    for part, label in LABELS.items():
        own = {entry["axis"]: entry for entry in found if entry["part"] == part}
        axis = next(axis for axis in BASE if axis in own)
        base = own[axis]["seconds"][own[axis]["amounts"].index(BASE[axis])]
        rows.append([label, 1e3 * base, *(f"{own[a]['exponent']:.1f}" if a in own else "" for a in AXES)])
    ranges = [f"{name}, {amounts[axis][0]:,} to {amounts[axis][-1]:,}" for axis, name in AXES.items()]
    return markdown(["", "milliseconds of a base case", *ranges], rows)


def defaults_table(found: Any) -> str:
    """Returns what is found at default settings, by model."""
    rows = []
    for model, own in found["models"].items():
        rows.append(
            [
                MODELS.get(model, model),
                f"{own['found'] * own['faults']:.0f} of {own['faults']}",
                share(own["within_3"]),
                share(own["named"]),
                f"{own['seconds']:.1f}",
                f"{own['evaluations']:.0f}" + (f", {own['samples']:.0f}" if model in MODELS else " on average"),
                f"{own['stopped'] * own['runs']:.0f} and {own['alarms'] * own['runs']:.0f} of {own['runs']}",
            ]
        )
    columns = ["", "faults found", "within three evaluations", "named", "delay in seconds of training, median"]
    return markdown([*columns, "evaluations, samples of each", "healthy runs stopped, with an alarm"], rows)


def gpu_table(found: Any) -> str:
    """Returns milliseconds on a GPU, and those of the products alone."""
    by_setting = {(row["part"], row["size"], row["samples"]): row for row in found["rows"]}
    rows = [
        [label, *(f"{row['ms']:.0f} ({row['products_ms']:.0f})" for row in own)]
        for part, label in LABELS.items()
        if all(own := [by_setting.get((part, *setting), {}) for setting in SETTINGS])
    ]
    return markdown(["", *(f"{count:,} of 3x{size}x{size}" for size, count in SETTINGS)], rows)


# ---- guides ----

KINDS = {
    "MNIST": "MNIST", "digits": "digits", "faces": "faces", **{f"scenes of {r}": f"scenes of {r} regions" for r in (4, 5, 6)},
}  # fmt: skip
"""What the page about regions calls its images, in order."""


def regions_table(found: Any) -> str:
    """Returns how good maps of both methods are."""
    rows = []
    for kind, label in KINDS.items():
        own = [row for row in found if row["images"] == kind]
        cells = []
        for row in own:
            background = " (background)" if row["largest_is_background"] else ""
            cells.append(
                [
                    f"{share(row['largest'])}{background}, {share(row['smallest'])}",
                    f"{row['stability']:.2f}",
                    f"{row['within']:.3f}, {row['between']:.3f}",
                    f"{row['iou']:.2f} ({row['ways']['frozen']['iou']:.2f})",
                    ", ".join(share(row["ways"][way]["placed"]) for way in ("blurred", "frozen", "noisy")),
                ]
            )
        if all(cell == cells[0] for cell in cells):
            rows.append([f"{label}, both", *cells[0]])
        else:
            rows += [[f"{label}, {row['method']}", *cell] for row, cell in zip(own, cells, strict=True)]
    titles = ("largest, smallest region", "agree", "CKA within, between", "IoU", "placed: blurred, frozen, noisy")
    return markdown(["images, method", *titles], rows)


SETS = {
    "digits": "digits", "MNIST": "MNIST", "faces": "faces or not", "textures": "8 textures",
    "photographs": "patches of 7 photographs",
}  # fmt: skip
"""What the page about the balance of classes calls its images, in order."""


def classifier_table(found: Any) -> str:
    """Returns accuracy of the classifier and distance of its shares from the true ones, beside neighbours."""
    ways = {"clean": "held-out images", "blurred": "blurred images", "noisy": "noisy images"}
    rows = [
        [label]
        + [
            f"{found['held_out'][name][kind][way]['accuracy']:.3f} ({found['held_out'][name][kind][way]['distance']:.3f})"
            for way in ways
            for kind in ("kernel", "neighbours")
        ]
        for name, label in SETS.items()
    ]
    return markdown(["", *(title for way in ways.values() for title in (way, "neighbours"))], rows)


def k_star_table(found: Any) -> str:
    """Returns k* of several features of digits."""
    rows = [
        [
            row["features"], f"{row['mean']:.3f}", f"{row['true_skewness']:.2f}", f"{row['approximate_skewness']:.2f}",
            ", ".join(map(str, row["patterns"])),
        ]
        for row in sorted(found["digits"], key=lambda row: row["mean"])
    ]  # fmt: skip
    titles = ("mean k*", "true skewness", "approximate skewness", "fractured, overlapped, clustered")
    return markdown(["features of 1,797 digits", *titles], rows)


def beta_table(found: Any) -> str:
    """Returns effective dimensions and total correlation of VAEs by beta."""
    betas = found["beta"][0]["betas"]
    rows = [
        [f"L = {row['latent_dim']}", *(", ".join(f"{value:.1f}" for value in row["betas"][beta]) for beta in betas)]
        for row in found["beta"]
    ]
    return markdown(["beta", *betas], rows)


def primitives_table(found: Any) -> str:
    """Returns what generators draw together."""
    rows = []
    for name, label in {"gan_7": "GAN, 8x8", "gan_10": "GAN, 16x16", "vae_5": "VAE, 8x8"}.items():
        own = found[name]["found"]
        curve = ", ".join(f"{own['curve'][count]:.2f}" for count in ("1", "4", "8", "16"))
        rows.append(
            [
                label, str(own["components"]), curve,
                f"{two_digits(own['relevant'] / own['irrelevant'])} times "
                f"({own['relevant']:.2f} and {own['irrelevant']:.3f} of its whole change)",
                f"{100 * own['leakage']:.1f} %",
            ]
        )  # fmt: skip
    titles = (
        "components with 9/10 of the squared norm",
        "error with the 1, 4, 8, 16 largest",
        "change of a region by its own components, over that by all others",
        "outside",
    )
    return markdown(["generator, split at", *titles], rows)


DATA_FAULTS = {
    "class": "a class removed", "range": "another normalisation", "region": "a region inverted",
    "repeat": "16 images repeat for ever", "nan": "nan in one image",
}  # fmt: skip
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


def training_data_table(found: Any) -> str:
    """Returns when faults of the data are found."""
    healthy = found["healthy"]
    alarms = f"an alarm in {healthy['with_alarm']}" if healthy["with_alarm"] else "no alarm"
    rows: list[list[Any]] = [["healthy", healthy["runs"], f"{alarms} in {healthy['evaluations']:,} evaluations"]]
    for fault, label in DATA_FAULTS.items():
        at = found["faults"][fault]["at"]
        said = [
            f"none in {count}" if number == "none" else f"at the {ORDINALS[int(number) - 1]} in {count}"
            for number, count in at.items()
        ]
        said[0] = said[0].replace(" in ", " evaluation after it in ")
        rows.append([label, found["faults"][fault]["runs"], ", ".join(said)])
    return markdown(["", "runs", "result"], rows)


def dysfunctions_table(found: Any) -> str:
    """Returns the study of VAEs on MNIST, with the figures of the authors in brackets."""
    labels = {
        "prior": "FID of images from the prior", "cluster": "from clusters", "margin": "from margins",
        "grey": "from the grey area",
    }  # fmt: skip
    own = [found[dims] for dims in ("2", "3")]

    def fid(one: Any, kind: str) -> str:
        theirs = one["theirs"]["fid"].get(kind)
        return f"{one['fid'][kind]:.1f}" + (f" ({theirs:.1f})" if theirs else "")

    rows = [[label, *(fid(one, kind) for one in own)] for kind, label in labels.items()]
    rows.append(
        [
            "images that would have to change class",
            *(f"{share(one['imbalance'])} ({share(one['theirs']['imbalance'])})" for one in own),
        ]
    )
    rows.append(
        ["mean FID within a class", *(f"{one['class_fid']:.1f} ({one['theirs']['class_fid']:.1f})" for one in own)]
    )
    return markdown(["", "2-D", "3-D"], rows)


RUNS = {
    "generator, 50 images": "the generator of the guide, 50 training images, 800 steps",
    "VAE, 50 images": "a VAE with 2 latent dimensions, 50 training images of 8x8, 1,600 steps",
    "generator, 1,400 images": "that generator, 1,400 images",
    "VAE, 1,400 images": "that VAE, 1,400 images",
    "example GAN": "the example GAN, 1,797 images, 12 epochs",
    "example VAE": "the example VAE",
    "example flow": "the example flow",
    "example diffusion model": "the example diffusion model",
    "example GAN, 50 images": "the example GAN, 50 training images, 1,200 steps",
}
"""What the page about memorization calls its runs."""


def span(least: float, most: float) -> str:
    """Returns a range of numbers."""
    return f"{least:.0f}" if f"{least:.0f}" == f"{most:.0f}" else f"{least:.0f} to {most:.0f}"


def memorization_table(found: Any) -> str:
    """Returns how often models that copy are found, and others raise an alarm."""
    rows = []
    for kind, label in RUNS.items():
        own = found["kinds"][kind]
        first = span(own["first"][0], own["first"][-1]) if own["first"] else ""
        rows.append(
            [label, f"{own['alarms']} of {own['runs']}", first, f"{span(*(100 * value for value in own['copied']))} %"]
        )
    return markdown(["runs", "alarm of copies", "at evaluation", "samples that are copies at the end"], rows)


# ---- docs/alarms.md ----

PLANTED = {
    "region frozen": "a region frozen",
    "region darkened": "darkened",
    "region noisy": "replaced by noise",
    "region shifted": "shifted",
    "region blurred": "blurred to its mean at once",
    "region decaying": "blurred to its mean slowly",
    "two regions frozen": "two regions frozen",
    "image frozen": "the whole image frozen",
    "image blurred": "the whole image blurred",
    "image darkened": "the whole image darkened",
    "class dropped": "a class dropped",
    "classes drawn as one": "two classes generated as one",
    "classes encoded as one": "two classes encoded as one",
    "dimension dead": "a latent dimension dead",
    "dimensions entangled": "two dimensions entangled",
    "dimensions silent": "all but a tenth of the dimensions silent",
    "latents ignored": "a VAE's decoder ignores its latents",
    "KL term too heavy": "a KL term of 10,000",
    "learning rate too high": "learning rate too high",
    "weight is nan": "a weight that is nan",
}
"""What the page calls each fault."""

BASELINES = {
    "EarlyStopping on the loss": "`EarlyStopping` on the loss, patience {:g}",
    "EarlyStopping on FID": "`EarlyStopping` on FID, patience {:g}",
    "threshold on image-wise CMS": "threshold of {:g} on the cosine mean similarity of the image",
}
"""What the page calls what people use today, with its setting."""


def planted_table(found: Any) -> str:
    """Returns in how many runs each planted fault is found, and how soon."""
    rows = [
        [label, own["runs"], share(own["found"]), share(own["named"]), f"{own['delay']:.0f}, {own['longest']:.0f}"]
        for fault, label in PLANTED.items()
        for own in [found["faults"][fault]]
    ]
    columns = ["planted", "runs", "detected in time", "named correctly", "evaluations until the alarm: median, largest"]
    return markdown(columns, rows)


def today_table(found: Any) -> str:
    """Returns how the detector compares with what people use today."""
    alarmed = f"{found['runs_with_wrong_alarms']} of {found['runs']} with an alarm"
    rows = [["`CollapseStopping`", f"{100 * found['regional_found']:.1f} %", alarmed]]
    for name, label in BASELINES.items():
        own = found["baselines"][name]
        stopped = f"{own['stopped'] * found['runs']:.0f} of {found['runs']}"
        rows.append([label.format(own["setting"]), share(own["found"]), stopped])
    return markdown(["", "regional faults found in time", "healthy runs stopped"], rows)


def rates_table(found: Any) -> str:
    """Returns by what the stated rate of false alarms is multiplied on series of several kinds."""
    rows = [[kind, two_digits(rate)] for kind, rate in found.items() if " in " not in kind]
    return markdown(["series", "the stated rate is multiplied by"], rows)


def steps_table(found: Any) -> str:
    """Returns how often a lasting step is found in time."""
    rows = []
    for name, value in found.items():
        if match := re.fullmatch(r"of (\S+), AR\(1\) of (\S+), in (\d+)", name):
            size, correlation, within = match.groups()
            kind = "independent" if correlation == "0" else f"AR(1) of {correlation}"
            rows.append([f"{size} standard deviations", kind, f"{within} values", share(value)])
    return markdown(["lasting step of", "series", "found within", "in"], rows)


# ---- docs/tab.md ----


def tab_table(found: Any) -> str:
    """Returns what the tab costs."""
    rows = [
        ["event files", f"{found['event_files_mb']:.1f} MB"],
        ["page ready in a new browser, TensorBoard itself included", f"{found['page_ready_s']:.1f} s"],
        [
            "a move of the slider, to the next picture on the screen: median, 95th percentile",
            f"{found['slider_move_ms']:.0f} ms, {found['slider_move_p95_ms']:.0f} ms",
        ],
        ["time that writing takes, of the training of the example GAN", f"{100 * found['writing_share']:.1f} %"],
    ]
    return markdown(["", ""], rows)


# ---- all pages ----


class Table(NamedTuple):
    """How a table is made."""

    make: Callable[..., str]
    """From what its sources hold."""
    sources: tuple[str, ...]
    """Files in ``benchmarks``."""


def _from_outputs(make: Callable[..., str], *names: str) -> Table:
    return Table(make, tuple(f"outputs/{name}.json" for name in names))


TABLES: dict[str, dict[str, Table]] = {
    "docs/costs.md": {
        "overhead": _from_outputs(overhead_table, "overhead"),
        "evaluation": _from_outputs(evaluation_table, "evaluation"),
        "large": _from_outputs(large_table, "scale", "manifold_entropy", "regional_primitives"),
        "defaults": _from_outputs(defaults_table, "defaults"),
        "scaling": Table(scaling_table, ("records/scaling.json",)),
        "gpu": Table(gpu_table, ("records/gpu.json",)),
        "compared": _from_outputs(
            compared_table, "pixel_cka", "cosine_mean_similarity", "manifold_entropy", "regional_primitives", "k_star"
        ),
    },
    "docs/alarms.md": {
        "rates": _from_outputs(rates_table, "detector"),
        "steps": _from_outputs(steps_table, "detector"),
        "planted": _from_outputs(planted_table, "planted_faults"),
        "today": _from_outputs(today_table, "planted_faults"),
    },
    "docs/tab.md": {"tab": _from_outputs(tab_table, "tab")},
    "docs/generation_balance.md": {"classifier": _from_outputs(classifier_table, "classifier")},
    "docs/k_star.md": {"digits": _from_outputs(k_star_table, "k_star")},
    "docs/latent_regions.md": {"study": _from_outputs(dysfunctions_table, "dysfunctions")},
    "docs/manifold_entropy.md": {"beta": _from_outputs(beta_table, "manifold_entropy")},
    "docs/memorization.md": {"found": _from_outputs(memorization_table, "memorization")},
    "docs/regional_primitives.md": {"together": _from_outputs(primitives_table, "regional_primitives")},
    "docs/regions.md": {"regions": _from_outputs(regions_table, "regions")},
    "docs/training_data.md": {"found": _from_outputs(training_data_table, "training_data")},
}
"""By page, and the name in the comment before it."""


def page(path: str) -> str:
    """Returns the text of a page with the tables that were recorded; one without its files stays as it is."""
    text = (ROOT / path).read_text()
    made = {name: body.rstrip() for name, body in re.findall(r"<!-- (\w+) -->\n\n((?:\|.*\n)+)", text)}
    for name, table in TABLES[path].items():
        files = [ROOT / "benchmarks" / source for source in table.sources]
        if all(file.exists() for file in files):
            made[name] = table.make(*(json.loads(file.read_text()) for file in files))
    return filled(text, made)


if __name__ == "__main__":
    from benchmarks.papers.study import write_pages

    for path in TABLES:
        (ROOT / path).write_text(page(path))
    write_pages()
