"""Sentences of the pages with figures that scripts have measured.

``{overhead.evaluations}`` stands for a number of ``benchmarks/outputs/overhead.json``, the line of JSON with which
``python -m benchmarks.overhead --json`` ends. After a colon stands how the page shows it: ``.1%`` as a share in per cent with
one decimal, ``.1p`` as that without the sign, ``word`` as a word, ``.2f`` as by ``format``.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OUTPUTS = ROOT / "benchmarks" / "outputs"
WORDS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

SENTENCES: dict[str, tuple[str, ...]] = {
    "README.md": (
        "Of {zoo.healthy_runs} healthy runs, {zoo.stopped_runs:word} were stopped (95 % bounds: {zoo.stopped_bounds.0:.0p} to "
        "{zoo.stopped_bounds.1:.0%}), which had become worse according to the classifier as well; "
        "{zoo.runs_with_wrong_alarms:.1%} ({zoo.wrong_bounds.0:.0p} to {zoo.wrong_bounds.1:.0%}) raised an alarm that the "
        "classifier calls wrong. Of {zoo.faults} faults, {zoo.found:.0%} were found.",
        "It found {planted_faults.regional_found:.1%} of the regions that were frozen, darkened, blurred, shifted or replaced "
        "by noise, within three evaluations if the fault was sudden, and {planted_faults.parts_found:.0%} of dropped classes, "
        "dead or entangled latents and weights that are nan",
        "In {planted_faults.runs} healthy runs with {planted_faults.evaluations} evaluations there were "
        "{planted_faults.wrong_alarms:word} false alarms, in {planted_faults.runs_with_wrong_alarms:word} runs.",
        "at {overhead.peak_memory_ratio:.2f} times the peak memory. There are {overhead.evaluations} evaluations of seven "
        "diagnostics: the first takes {overhead.first_evaluation_s:.2f} s with its setup, each later one "
        "{overhead.later_evaluation_s:.2f} s.",
        "every epoch takes {overhead.fid_over_none:.2f} times as long and {overhead.fid_memory_ratio:.2f} times the memory",
        "models {defaults.models.all.found:.0%} of {defaults.models.all.faults} faults were found, "
        "{defaults.models.all.within_3:.0%} within three evaluations; the median delay was "
        "{defaults.models.all.seconds:.1f} s of training",
    ),
    "docs/alarms.md": (
        "| nothing: {planted_faults.runs} healthy runs, {planted_faults.evaluations} evaluations | "
        "{planted_faults.wrong_alarms:word} false alarms, in {planted_faults.runs_with_wrong_alarms:word} runs |",
        "| healthy runs | {zoo.healthy_runs} |",
        "| stopped; stopped although the referee sees nothing worse | {zoo.stopped:.1%} ({zoo.stopped_bounds.0:.0p} to "
        "{zoo.stopped_bounds.1:.0%}); {zoo.wrongly_stopped:.1%} |",
        "| with an alarm that the referee calls wrong | {zoo.runs_with_wrong_alarms:.1%} ({zoo.wrong_bounds.0:.0p} to "
        "{zoo.wrong_bounds.1:.0%}) |",
        "50 to 100 steps | {zoo.wrong_by_spacing.0.0} of {zoo.wrong_by_spacing.0.1}, {zoo.wrong_by_spacing.12.0} of "
        "{zoo.wrong_by_spacing.12.1}, {zoo.wrong_by_spacing.25.0} of {zoo.wrong_by_spacing.25.1}, "
        "{zoo.wrong_by_spacing.50.0} of {zoo.wrong_by_spacing.50.1} |",
        "| faults in training found; named | {zoo.found:.1%} of {zoo.faults}; {zoo.named:.1%} |",
        "| faults of the data named as such | {zoo.data_found:.1%} of {zoo.data_faults} |",
        "| evaluations until the alarm, median | {zoo.delay:.0f} |",
        "| wrong from the start, found | {zoo.start_faults_found} of {zoo.start_faults}, of each of six kinds "
        "{zoo.start_kind_least:.0p} to 100 % |",
        "on the referee's FID: healthy runs stopped; faults found | {zoo.baselines.1.0:.0%}; {zoo.baselines.1.1:.0%} |",
        "on any series: healthy runs stopped; faults found | {zoo.baselines.2.0:.0%}; {zoo.baselines.2.1:.0%} |",
        "**{planted_faults.regional_found:.1%}** | median overlap with the planted region {planted_faults.regional_iou:.2f} ",
        "| `CollapseStopping` | {planted_faults.regional_found:.1%} | {planted_faults.runs_with_wrong_alarms} of "
        "{planted_faults.runs} with an alarm |",
        "| {planted_faults.baseline_found:.0%} | {planted_faults.baseline_false_alarms:.0%} |",
    ),
    "docs/costs.md": (
        "| {overhead.peak_memory_ratio:.2f} | 1.7 MiB | {overhead.evaluations} of the most frequent diagnostic; the first one "
        "takes {overhead.first_evaluation_s:.2f} s, setup included, and a later one {overhead.later_evaluation_s:.2f} s,",
        "turns give {overhead.default_over_none:.3f},",
        "An evaluation of {overhead.samples} samples takes {overhead.evaluation_over_fid:.0f} times as long as FID",
        *(
            f"{{defaults.models.{model}.within_3:.0%}} | {{defaults.models.{model}.named:.0%}} | "
            f"{{defaults.models.{model}.seconds:.1f}} | {{defaults.models.{model}.evaluations:.0f}}, "
            f"{{defaults.models.{model}.samples:.0f}} |"
            for model in ("gan", "vae", "flow", "diffusion")
        ),
        "| all | {defaults.models.all.found:.0%} of {defaults.models.all.faults} | {defaults.models.all.within_3:.0%} | "
        "{defaults.models.all.named:.0%} | {defaults.models.all.seconds:.1f} | {defaults.models.all.evaluations:.0f} |",
    ),
    "docs/codebook_usage.md": (
        "In {codebook_usage.runs} small trainings with a planted collapse (`python -m benchmarks.codebook_usage --json`), "
        "{codebook_usage.found} were found: within {codebook_usage.faults.killed.latest} evaluations where it began at the "
        "13th one, and at the {codebook_usage.faults.far.earliest}th to {codebook_usage.faults.far.latest}th where",
        "Of {codebook_usage.healthy.runs} healthy trainings with {codebook_usage.healthy.evaluations} evaluations, "
        "{codebook_usage.healthy.alarms:word} raised an alarm.",
    ),
    "docs/generation_balance.md": (
        "{planted_faults.parts_found:.0%} of dropped classes and dead latent dimensions were found",
        "Over 100 sets of 512 held-out images of MNIST with random shares, the distance from the true shares is "
        "{classifier.correction.MNIST.random.0:.3f} without correction and {classifier.correction.MNIST.random.1:.3f} with it; "
        "for textures (accuracy {classifier.correction.textures.accuracy:.0%}) "
        "{classifier.correction.textures.random.0:.3f} and {classifier.correction.textures.random.1:.3f}.",
        "({classifier.correction.MNIST.equal.0:.3f} and {classifier.correction.MNIST.equal.1:.3f} on MNIST)",
        "its shares lie {classifier.while_training.kernel.0:.2f} after the first and {classifier.while_training.kernel.7:.2f} "
        "after the eighth epoch from those by a trained convolutional network; those by neighbours "
        "{classifier.while_training.neighbours.0:.2f} and {classifier.while_training.neighbours.7:.2f}.",
    ),
    "docs/k_star.md": (
        "on digits its mean k* is {k_star.digits.2.mean:.3f}, and that of pixels is {k_star.digits.0.mean:.3f}",
    ),
    "docs/latent_regions.md": ("more dimensions help (for {dysfunctions.better} of 10 classes; for 9 in the study)",),
    "docs/memorization.md": (
        "Of the {memorization.healthy.runs} runs of models that need not copy, with {memorization.healthy.evaluations} "
        "evaluations, {memorization.healthy.alarms:word} raised an alarm of copies.",
    ),
    "docs/regional_primitives.md": (
        "the VAE needs {regional_primitives.vae_5.grid.components} of {regional_primitives.vae_5.grid.all_components} "
        "components, and the GAN at 8x8 still {regional_primitives.gan_7.grid.components}",
    ),
    "docs/regions.md": (
        "a blurred part of MNIST lowers the logarithm of its region's similarity by {regions.9.ways.blurred.fall:.2f} in the "
        "median, and a frozen part by {regions.9.ways.frozen.fall:.2f}",
        "an adjusted Rand index of {scale.agreement.scenes.1024:.2f} on scenes of known regions, "
        "{scale.agreement.digits.1024:.2f} on digits and {scale.agreement.mnist.1024:.2f} on MNIST. Exact maps of two halves "
        "of the images agree with each other at {scale.agreement.scenes.halves:.2f}, {scale.agreement.digits.halves:.2f} and "
        "{scale.agreement.mnist.halves:.2f}.",
    ),
    "docs/training_data.md": (
        "in {training_data.faults.nan.at.none:word} runs the weighted sampler never drew it",
        "A batch of 64 images takes {training_data.batch_ms.1x28x28:.2f} ms of one processor at (1, 28, 28) and "
        "{training_data.batch_ms.3x64x64:.2f} ms at (3, 64, 64)",
    ),
}
"""By page; line breaks of a page count as spaces."""


WAITING = (
    "cosine_mean_similarity", "dysfunctions", "manifold_entropy", "pixel_cka", "regional_primitives", "scale",
)  # fmt: skip
"""Outputs of scripts that were not run since they end with a line of JSON; pages show what they printed before."""


def sources_of(template: str) -> set[str]:
    """Returns the outputs that a template names."""
    return set(re.findall(r"\{(\w+)\.", template))


@cache
def output(name: str) -> Any:
    """Returns what a script has measured."""
    return json.loads((OUTPUTS / f"{name}.json").read_text())


def in_words(path: str, spec: str) -> str:
    """Returns a number of an output as a page shows it."""
    name, *parts = path.split(".")
    value = output(name)
    for part in parts:
        value = value[int(part)] if isinstance(value, list) else value[part]
    if spec == "word":
        return WORDS[value]
    if spec.endswith("p"):
        return f"{100 * value:{spec[:-1]}f}"
    if spec.endswith("%"):
        return f"{100 * value:{spec[:-1]}f} %"
    return f"{value:{spec or ',d'}}"


def sentence(template: str) -> str:
    """Returns a sentence with its figures."""
    return re.sub(r"\{([\w.]+)(?::([^}]*))?\}", lambda match: in_words(match[1], match[2] or ""), template)


def text_of(page: str) -> str:
    """Returns the text of a page with spaces for line breaks."""
    return " ".join((ROOT / page).read_text().split())
