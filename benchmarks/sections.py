"""The parts of the page, one function each; a part without results says so."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.cases import NETWORKS, SCALES, STARTUP, STRATEGIES, TOOLS
from benchmarks.results import OURS, Results, spread
from benchmarks.wording import number, percent, span, table, times

NOT_MEASURED = "Not measured.\n"
HEADINGS = {
    "squeezenet": "SqueezeNet 1.0 with ImageNet weights, 244 photographs, 153 more to judge, 224 pixels",
    "resnet18": "ResNet-18 with random weights, 1,600 images, 400 more to judge, 64 pixels",
    "resnet50": "ResNet-50 with random weights, 1,600 images, 400 more to judge, 64 pixels",
}
PIPELINE = {
    "pillow": "Pillow alone: decode to RGB",
    "ours_evaluation": "ours, evaluation view",
    "ours_training": "ours, training view (`light`)",
    "plain_training": "the tutorial's training view",
    "timm_training": "timm's training view",
}
DIFFERENCES = """\
## What is the same, and what is not

- Same files, weights, image size, batch size, epochs, threads and decoding processes for all tools; each
  judges the validation part after every epoch. `freeze` trains a new head, `top` the head and the last
  stage (`features.12`, `layer4`), `full` everything.
- Ours starts with empty caches in every process, except where the page says "second". Files of images
  are in the system's page cache for all. Ours also checks every image, writes checkpoints and
  predictions, exports a model and loads it again; none of the peers does, except that the plain loop
  saves its best weights.
- *plain* is the loop of PyTorch's transfer learning tutorial: one rate of 0.001, times 0.1 every 7
  epochs, crops from 8 % of the area, no channels-last layout. It returns the weights of the best epoch.
- *fastai* is `vision_learner` with its own larger head and one cycle, SGD with our rates, falling from
  head to stem. It lets BatchNorm learn in frozen stages, so that its frozen networks need a backward pass
  where there is BatchNorm.
- *timm* is built from the pieces of its training script: its augmentation, cosine schedule and rule for
  the rate, with its switch for channels-last. For SqueezeNet, which it does not have, its pieces train
  torchvision's.
- On SqueezeNet *plain* and *timm* get a rate of 0.0001: its classifier ends in a ReLU, and at 0.001 the
  tutorial's loop stayed at chance. That is in their favour, and changes no time.
- "Training alone" is what the tool says of itself: the epochs with their validation; for ours with the
  making of the features before them, without checking the images and exporting the model.
- Accuracy is that of the best epoch on the validation part, for every tool. 153 photographs decide by 0.7
  points each. With random weights accuracy says little.
- Memory is the largest sum over all processes of a tool, shared pages counted once (PSS), sampled about
  every second: looking more often would cost more than 3 % of a core.
- ResNets have seeded random weights: the time does not depend on them. The 2,000 images are ten classes
  of Tiny-ImageNet, written as JPEG, since not every tool looks for WebP.
- The peers' environment is made by the suite, with the very same torch, torchvision and timm
  (`benchmarks/peers/requirements.txt` holds the other versions).
"""


def epochs_of(results: Results, strategy: str, network: str) -> list[int]:
    """Return the numbers of epochs that were timed."""
    found = [case.split("-") for case in results.cases() if case.startswith(f"{strategy}-{network}-")]
    return sorted(int(parts[2]) for parts in found)


def commands(results: Results) -> Iterator[str]:
    """Yield a table a network: every strategy, number of epochs and tool."""
    head = ("strategy", "epochs", "tool", "seconds", "as ours", "training alone", "accuracy", "peak MB")
    for network in NETWORKS:
        rows = [
            command_row(results, strategy, network, epochs, tool)
            for strategy in STRATEGIES
            for epochs in epochs_of(results, strategy, network)
            for tool in TOOLS
        ]
        yield f"### {HEADINGS[network]}\n"
        yield from table(head, rows) if rows else [NOT_MEASURED]


def command_row(results: Results, strategy: str, network: str, epochs: int, tool: str) -> tuple[str, ...]:
    """Return one row of a table of whole commands."""
    case = f"{strategy}-{network}-{epochs}"
    accuracy = results.facts(case, tool, "accuracy")
    peak = spread(result.peak_mb for result in results.of(case, tool))
    return (
        strategy,
        str(epochs),
        f"**{tool}**" if tool == OURS else tool,
        span(results.walls(case, tool)),
        "1" if tool == OURS else times(results.ratios(case, tool)),
        span(results.facts(case, tool, "seconds", "training")),
        f"{accuracy.middle:.3f}" if accuracy else "-",
        f"{peak.middle:,.0f}" if peak else "-",
    )


def limits(results: Results) -> Iterator[str]:
    """Yield how near training comes to the bare network."""
    yield "## Beside the bare network\n"
    yield (
        "The limit is the same network on the same threads with its images in memory: forward and backward "
        "without an optimiser's step, in the faster memory layout. Ours is `full`, images a second of the "
        "training part with decoding, the median epoch of the longest run.\n"
    )
    rows = []
    for network in NETWORKS:
        forward = results.facts(f"limit-{network}", "bare", "forward")
        both = results.facts(f"limit-{network}", "bare", "forward_backward")
        longest = max(epochs_of(results, "full", network), default=0)
        ours = results.facts(f"full-{network}-{longest}", OURS, "images_per_second")
        if forward and both:
            share = percent(ours.middle if ours else None, both.middle)
            rows.append((network, span(forward), span(both), span(ours), share))
    head = ("network", "forward, images/s", "forward and backward, images/s", "ours, images/s", "share")
    yield from table(head, rows) if rows else [NOT_MEASURED]


def pipeline(results: Results) -> Iterator[str]:
    """Yield images a second on one core."""
    yield "## The data pipeline alone\n"
    yield "Photographs a second on one core, in one process that decodes itself, over the same files.\n"
    bare = results.facts("pipeline-photographs", "views", "pillow")
    rows = []
    for key, words in PIPELINE.items():
        rate = results.facts("pipeline-photographs", "views", key)
        if rate and bare:
            rows.append((words, span(rate), percent(rate.middle, bare.middle)))
    yield from table(("", "photographs/s", "of the bare decode"), rows) if rows else [NOT_MEASURED]


def overhead(results: Results) -> Iterator[str]:
    """Yield what our loop costs."""
    yield "## Our loop beside a bare one\n"
    yield (
        "Batches in memory, `full`, step by step in turns in one process. The bare loop is forward, backward "
        "and SGD; the last column leaves SGD's step out of the bare loop, but not out of ours.\n"
    )
    rows = []
    for network in NETWORKS:
        case = f"overhead-{network}"
        loop, gradient = (results.facts(case, "bare", f"over_{name}") for name in ("loop", "gradient"))
        ours = results.facts(case, "bare", "images_per_second")
        bare = results.facts(case, "bare", "bare_images_per_second")
        if loop and gradient:
            ends = f"{loop.middle:+.1%} [{loop.low:+.1%}..{loop.high:+.1%}]"
            rows.append((network, span(bare), span(ours), ends, f"{gradient.middle:+.1%}"))
    head = ("network", "bare, images/s", "ours, images/s", "over the bare loop", "over forward and backward")
    yield from table(head, rows) if rows else [NOT_MEASURED]


def startup(results: Results) -> Iterator[str]:
    """Yield start-up times, and the second run."""
    yield "## Start, and the second run\n"
    rows = [
        (f"`{tool}`", span(results.walls("startup", tool))) for tool in STARTUP if results.of("startup", tool)
    ]
    for case in (name for name in results.cases() if name.startswith("second-")):
        seen = spread(result.appeared for result in results.of(case, OURS) if result.appeared is not None)
        words = f"second `freeze` run of {case.rpartition('-')[2]} epochs on the same photographs"
        rows.append((f"{words}: whole command", span(results.walls(case, OURS))))
        rows.append((f"{words}: training alone", span(results.facts(case, OURS, "seconds", "training"))))
        rows.append((f"{words}: from start to the end of the first epoch", span(seen)))
    yield "A run is *second* when one with another rate has run before: what that one kept on disk is used.\n"
    yield from table(("", "seconds"), rows) if rows else [NOT_MEASURED]


def extraction(results: Results) -> Iterator[str]:
    """Yield the keeping of features."""
    yield "## Features alone\n"
    yield (
        "Ours is `finetune extract --layers last` to CSV, with labels and splits; the peer keeps one tensor "
        "file without names. thingsvision cannot be "
        "installed beside a current torch (its newest release asks for torchvision 0.15.2, NumPy below 2 "
        "and TensorFlow below 2.16), so the peer is torchvision's `create_feature_extractor`.\n"
    )
    case, rows = "extract-squeezenet", []
    for tool in (OURS, "torchvision"):
        phases = results.of(case, tool)[-1].facts.get("seconds", {}) if results.of(case, tool) else {}
        shown = ", ".join(
            f"{name} {number(value)}" for name, value in phases.items() if name not in ("total", "training")
        )
        peak = spread(result.peak_mb for result in results.of(case, tool))
        if results.of(case, tool):
            rows.append((tool, span(results.walls(case, tool)), shown, span(peak)))
    head = ("tool", "whole process", "phases of the last one", "peak MB")
    yield from table(head, rows) if rows else [NOT_MEASURED]


def scaling(results: Results) -> Iterator[str]:
    """Yield cost against the number of images."""
    yield "## Cost against the number of images\n"
    yield (
        "`freeze` for one epoch on 200 classes of Tiny-ImageNet at 32 pixels, with a very small network "
        "(timm's `test_resnet`, random weights): everything but the network.\n"
    )
    rows = []
    for size in SCALES:
        found = results.of(f"scaling-{size}", OURS)
        wall = results.walls(f"scaling-{size}", OURS)
        if wall:
            peak, single = spread(r.peak_mb for r in found), spread(r.rss_mb for r in found)
            each = f"{1000 * wall.middle / size:.2f}"
            rows.append((f"{size:,}", span(wall), each, span(peak), span(single)))
    head = ("images", "seconds", "ms an image", "peak MB", "largest process, MB")
    yield from table(head, rows) if rows else [NOT_MEASURED]


def gpu(results: Results) -> Iterator[str]:
    """Yield the share of the GPU's own matrix rate."""
    yield "## On a GPU\n"
    found = results.of("gpu-resnet50", "bare")
    if not found:
        yield NOT_MEASURED
        return
    rate = results.facts("gpu-resnet50", "bare", "matrix_rate")
    assert rate is not None
    yield (
        f"ResNet-50 at 224 pixels, bfloat16, channels-last, on {found[0].facts['gpu']}, which multiplies "
        f"large bfloat16 matrices at {rate.middle / 1e12:,.0f} Tflop/s (measured here).\n"
    )
    rows = []
    for name in ("forward", "training"):
        rate = results.facts("gpu-resnet50", "bare", f"{name}_images_per_second")
        share = results.facts("gpu-resnet50", "bare", f"{name}_share")
        rows.append((name, span(rate), f"{share.middle:.0%}" if share else "-"))
    yield from table(("", "images/s", "share of the matrix rate"), rows)


def failures(results: Results) -> Iterator[str]:
    """Yield the processes that failed: their rows above lack them."""
    failed = results.failed()
    if failed:
        yield "## Processes that failed\n"
        rows = [
            (r.case, r.tool, str(r.repeat), r.failed.replace("\n", " ").replace("|", "/")) for r in failed
        ]
        yield from table(("case", "tool", "turn", "last words"), rows)
