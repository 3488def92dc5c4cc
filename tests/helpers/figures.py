"""Sentences of the pages with figures that scripts have measured.

``{overhead.evaluations}`` stands for a number of ``benchmarks/outputs/overhead.json``, the line of JSON with which
``python -m benchmarks.overhead --json`` ends. After a colon stands how the page shows it: ``.1%`` as a share in per cent with
one decimal, ``.1p`` as that without the sign, ``word`` as a word, ``.2f`` as by ``format``. Parts of names that hold spaces
are written as they are.
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


def row_of_failures(output: str, name: str, *before: str) -> str:
    """Returns the row of a table: cells, in how many runs a failure was found and named, and its delays."""
    at = f"{output}.failures.{name}"
    cells = *before, f"{{{at}.found}} of {{{at}.runs}}", f"{{{at}.named}}", f"{{{at}.delay:delay}}"
    return f"| {' | '.join(cells)} |"


def end_of_healthy(output: str) -> str:
    """Returns how a sentence about healthy runs ends."""
    at = f"{output}.healthy.all"
    return (
        f"with {{{at}.evaluations}} evaluations, {{{at}.alarms:word}} raised an alarm, which bounds the share of such runs at "
        f"{{{at}.upper_bound:.0%}} with 95 % confidence."
    )


def by_samples(what: str, numbers: tuple[int, ...] = (64, 128, 256, 512, 1024)) -> str:
    """Returns cells of a row, one for each number of samples."""
    return "".join(f"| {{power.power.{number}.{what}}} " for number in numbers) + "|"


SENTENCES: dict[str, tuple[str, ...]] = {
    "README.md": (
        "Of {zoo.healthy_runs} healthy runs, {zoo.stopped_runs:word} was stopped (95 % bounds: {zoo.stopped_bounds.0:.0p} to "
        "{zoo.stopped_bounds.1:.0%}), which had become worse according to the classifier as well; "
        "{zoo.runs_with_wrong_alarms:.1%} ({zoo.wrong_bounds.0:.0p} to {zoo.wrong_bounds.1:.0%}) raised an alarm that the "
        "classifier calls wrong. Of {zoo.faults} faults, {zoo.found:.0%} were found.",
        "It found {planted_faults.regional_found:.1%} of the regions that were frozen, darkened, blurred, shifted or replaced "
        "by noise, within three evaluations if the fault was sudden, and {planted_faults.parts_found:.0%} of dropped classes, "
        "dead or entangled latents and weights that are nan",
        "In {planted_faults.runs} healthy runs with {planted_faults.evaluations} evaluations there were "
        "{planted_faults.wrong_alarms:word} false alarms, in {planted_faults.runs_with_wrong_alarms:word} runs.",
        "take {overhead.measured_over_none:.2f} times as long with",
        "at {overhead.peak_memory_ratio:.2f} times the peak memory. There are {overhead.evaluations} evaluations of seven "
        "diagnostics: the first takes {overhead.first_evaluation_s:.2f} s with its setup, each later one "
        "{overhead.later_evaluation_s:.2f} s.",
        "every epoch takes {overhead.fid_over_none:.2f} times as long and {overhead.fid_memory_ratio:.2f} times the memory",
        "models {defaults.models.all.found:.0%} of {defaults.models.all.faults} faults were found, "
        "{defaults.models.all.within_3:.0%} within three evaluations; the median delay was "
        "{defaults.models.all.seconds:.1f} s of training",
    ),
    "docs/alarms.md": (
        "Of all faults of regions and of the whole image, **{planted_faults.regional_found:.1%}** were found; the median "
        "overlap with the planted region is {planted_faults.regional_iou:.2f} (intersection over union). The "
        "{planted_faults.runs} healthy runs with {planted_faults.evaluations} evaluations raised "
        "{planted_faults.wrong_alarms:word} false alarms, in {planted_faults.runs_with_wrong_alarms:word} runs.",
        "These are {planted_faults.runs} healthy runs of 100 evaluations",
        "{planted_faults.runs_with_faults} of them are forked at the 40th evaluation",
        "with a patience of 3 in {planted_faults.before_loss_by_patience.3:.0%} of the runs, and with a patience of 48 in "
        "{planted_faults.before_loss_by_patience.48:.0%}.",
        "in {zoo.wrong_by_kind.conditional_gan.0} of {zoo.wrong_by_kind.conditional_gan.1} conditional GANs, "
        "{zoo.wrong_by_kind.mlp_gan.0} of {zoo.wrong_by_kind.mlp_gan.1} MLP GANs, {zoo.wrong_by_kind.wgan_gp.0} of "
        "{zoo.wrong_by_kind.wgan_gp.1} WGAN-GPs, {zoo.wrong_by_kind.convolutional_vae.0} of "
        "{zoo.wrong_by_kind.convolutional_vae.1} convolutional VAEs, {zoo.wrong_by_kind.mlp_vae.0} of "
        "{zoo.wrong_by_kind.mlp_vae.1} MLP VAEs and {zoo.wrong_by_kind.face_dcgan.0} of {zoo.wrong_by_kind.face_dcgan.1} "
        "DCGANs of faces, and in none of the others.",
        "it was found in {zoo.start_kind_least:.0%} of the runs.",
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
        "within eight evaluations in {zoo_falls.12.found} of {zoo_falls.12.runs} runs if it comes after 12 evaluations, in "
        "{zoo_falls.16.found} of {zoo_falls.16.runs} after 16, and in {zoo_falls.24.found} of {zoo_falls.24.runs} after 24. "
        "After 8 evaluations it is found in {zoo_falls.8.found} of {zoo_falls.8.runs}.",
    ),
    "docs/costs.md": (
        "turns give {overhead.default_over_none:.3f},",
        "An evaluation of {overhead.samples} samples takes {overhead.evaluation_over_fid:.2f} of the time of FID of "
        "{overhead.samples} samples with a network of the size of InceptionV3, which FID is defined with, and "
        "{overhead.evaluation_over_small_fid:.0f} times as long as FID with the small network.",
        "and takes {overhead.inception_fid_s:.1f} s for {overhead.samples} samples.",
        "| faults found, of {power.power.64.faults} " + by_samples("found:.0%"),
        "seconds of training until half of them are found " + by_samples("seconds:.1f"),
        "until nine tenths of them are found " + by_samples("seconds_90:.1f", (64, 128, 256)) + " | |",
        "evaluations of a healthy run " + by_samples("evaluations:.0f"),
    ),
    "docs/any_model.md": (
        "trains {field.models} models of these libraries as their users write them, with the diagnostics and without. Weights, "
        "optimizers and random generators were the same bit for bit afterwards in {field.identical} of them, the right "
        "way to sample or to reconstruct was found in {field.right_sampler}, and {field.alarms:word} raised an alarm.",
        "Exactly these were attached in {field.rightly_attached}.",
        *(
            f"| {title} | {{field.diagnostics.{name}.models}} | {{field.diagnostics.{name}.attached}} |"
            for name, title in (
                ("cms", "cosine mean similarity"),
                ("generation_balance", "generation balance"),
                ("k_star", "k*"),
                ("manifold_entropy", "manifold entropy"),
                ("posterior_kl", "posterior KL"),
                ("codebook", "codebook usage"),
                ("latent_regions", "latent regions"),
                ("round_trip", "round trip"),
                ("regional_primitives", "regional primitives"),
                ("timestep_loss", "timestep loss"),
                ("memorization", "memorization"),
                ("adversary", "adversary"),
                ("training_data", "training data"),
            )
        ),
    ),
    "docs/adversary.md": (
        *(
            row_of_failures("adversary", name, title)
            for name, title in (
                ("discriminator frozen", "the discriminator stops changing"),
                ("discriminator frozen from the start", "the discriminator has never changed"),
                ("generator frozen", "the generator stops changing"),
                (
                    "too strong",
                    "a saturating loss, and 20 times the discriminator's learning rate (MLP and DCGAN)",
                ),
                ("overfits", "50 training images (MLP, DCGAN, conditional)"),
                ("discriminator explodes", "the discriminator's gradient times 1,000"),
                ("generator explodes", "the generator's gradient times 10,000"),
            )
        ),
        "Of {adversary.healthy.all.runs} healthy runs of seven kinds (these, LSGAN and R1) "
        + end_of_healthy("adversary"),
    ),
    "docs/timestep_loss.md": (
        *(
            row_of_failures("timestep_loss", name, title, rule)
            for name, title, rule in (
                ("no weight in a band", "no weight from time 0.4 to 0.6", "no weight"),
                ("short schedule", "times above 0.6 are never drawn", "pure noise is never reached"),
                ("dead at high noise", "predictions above time 0.8 become zero, of velocities", "the bands' own past"),
                ("dead at high noise, flow", "the same, of flow matching", "the bands' own past"),
                ("clipped at low noise", "predictions below time 0.25 become clipped", "the bands' own past"),
                (
                    "wrong sign in a band",
                    "predictions from time 0.5 to 0.65 have the wrong sign from the beginning",
                    "the network fails",
                ),
                ("few images", "24 training images", "overfitting"),
                ("EMA never updated", "averaged weights that are never updated", "averaged weights are worse"),
                ("EMA far too slow", "averaged weights with a decay of 0.9999", "averaged weights are worse"),
            )
        ),
        "Of {timestep_loss.healthy.all.runs} healthy runs, ten of each of six kinds, "
        + end_of_healthy("timestep_loss"),
    ),
    "docs/round_trip.md": (
        *(
            row_of_failures("round_trip", name, title)
            for name, title in (
                ("scales near zero before a shift (coupling)", "a coupling scales to almost zero before it shifts"),
                ("scales that explode away from the data (coupling)", "a coupling's scales explode away from the data"),
                ("an inverse that leaves out the shift (coupling)", "the inverse of a coupling leaves out the shift"),
                ("nan in the inverse (coupling)", "nan in the inverse of a coupling"),
                ("a learnt scale near zero (Glow)", "a step of Glow scales a channel to almost zero"),
                ("log-determinant with the wrong sign, of a layer", "wrong sign of a layer's log-determinant"),
                ("log-determinant with the wrong sign, of the whole", "wrong sign of the flow's log-determinant"),
                (
                    "log-determinant without the number of positions (Glow)",
                    "the log-determinant of a step of Glow leaves out the number of positions",
                ),
                (
                    "log-determinant without a learnt factor of the data",
                    "the log-determinant leaves out a learnt factor of the data",
                ),
                ("a region turns black (autoencoder)", "a region of an autoencoder turns black"),
                ("a region turns black (VAE)", "a region of a VAE turns black"),
                (
                    "the decoder ignores a latent dimension (autoencoder)",
                    "the decoder of an autoencoder ignores a latent dimension",
                ),
                ("the decoder ignores a latent dimension (VAE)", "the decoder of a VAE ignores a latent dimension"),
            )
        ),
        "Of {round_trip.healthy.all.runs} healthy runs of flows, VAEs and autoencoders, of this package, of zuko and of "
        "`benchmarks/zoo`, " + end_of_healthy("round_trip"),
    ),
    "docs/codebook_usage.md": (
        "Of {codebook_usage.runs} collapses that were planted in small trainings (`python -m benchmarks.codebook_usage`), "
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
    "docs/latent_regions.md": (
        "more dimensions help (for {dysfunctions.better} of 10 classes; for 9 in the study)",
        "Here {dysfunctions.2.grey_classes.0}, {dysfunctions.2.grey_classes.1} and {dysfunctions.2.grey_classes.2} lead in "
        "2-D; in 3-D {dysfunctions.3.grey_classes.0}, {dysfunctions.3.grey_classes.1}, {dysfunctions.3.grey_classes.2} and "
        "{dysfunctions.3.grey_classes.3} do.",
    ),
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
    if spec == "delay":
        return delay_in_words(value)
    if spec == "word":
        return WORDS[value]
    if spec.endswith("p"):
        return f"{100 * value:{spec[:-1]}f}"
    if spec.endswith("%"):
        return f"{100 * value:{spec[:-1]}f} %"
    return f"{value:{spec or ',d'}}"


def delay_in_words(delay: dict[str, float | None]) -> str:
    """Returns a median and its range, without what runs in which nothing is found leave unknown."""
    low, median, high = delay["min"], delay["median"], delay["max"]
    if median is None:
        return "-"
    if high is None:
        return f"{median:g} ({low:g} or more)"
    return f"{median:g}" if low == high else f"{median:g} ({low:g} to {high:g})"


def sentence(template: str) -> str:
    """Returns a sentence with its figures."""
    return re.sub(r"\{([^{}:]+)(?::([^}]*))?\}", lambda match: in_words(match[1], match[2] or ""), template)


def text_of(page: str) -> str:
    """Returns the text of a page with spaces for line breaks."""
    return " ".join((ROOT / page).read_text().split())


SAID = ("pictures", "gallery")
"""Outputs of what alarms said."""


def alarms() -> list[str]:
    """Returns what alarms of the runs of the guides and of the gallery said."""
    pictures, gallery = map(output, SAID)
    return [text for texts in pictures.values() for text in texts] + list(gallery.values())


def quotes(page: str) -> list[str]:
    """Returns what alarms say in the Markdown of a page: its block quotes, a column of README, and what rose or fell."""
    page = re.sub(r"^```[\s\S]*?^```", "", page, flags=re.M)
    blocks = re.findall(r"(?:^>.*\n)+", page, re.M)
    cells = [row.split(" | ")[3] for row in re.findall(r"^\| \[`.*", page, re.M) if row.count(" | ") == 4]
    inline = re.findall(r'"([^"]*\b(?:fell|rose) from [^"]*)"', re.sub(r"`[^`]*`|^>.*", "", page, flags=re.M))
    return [" ".join(re.sub(r"^> ?", "", text, flags=re.M).split()) for text in (*blocks, *cells, *inline)]
