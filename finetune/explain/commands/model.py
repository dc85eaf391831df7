"""The model that is explained, and its classes and layers by the names that a user gives."""

from __future__ import annotations

from collections.abc import Sequence

from timm.data import ImageNetInfo

from finetune.errors import UsageError, suggest
from finetune.evaluation.predictor import resolve_names
from finetune.features.network import Network, open_network
from finetune.recipe import Recipe
from finetune.system.display import Display
from finetune.targets import Target, make_unique, read_target
from pretrained.catalog import Card


def open_model(recipe: Recipe, display: Display) -> Network:
    """Load the network that is explained, with its own classifier.

    Args:
        recipe: names the model (``backbone.name``: a finished run, an exported folder or a backbone), its
            weights, input and device.
        display: shows progress.

    Raises:
        UsageError: there is no such model, or the weights do not fit it.
        EnvironmentFaultError: the weights are not on this machine and cannot be downloaded.
    """
    try:
        return open_network(recipe, display)
    except UsageError as error:  # the original message speaks of --backbone
        asked = error.asked.replace("--backbone ", "the model ", 1)
        raise UsageError(asked, error.found, error.fix.replace("--backbone ", "")) from None


def find_target(network: Network) -> Target:
    """Return what the labels of the network are."""
    return read_target(dict(network.backbone.card.target))


def require_classes(network: Network) -> tuple[str, ...]:
    """Return the names of the model's classes in index order.

    Raises:
        UsageError: the weights hold no classifier, or the labels are numbers.
    """
    if not find_target(network).has_classes:
        fix = "Name a model of classes."
        raise UsageError(
            f"the model {network.backbone.card.name}", "it predicts numbers, and no classes", fix
        )
    return name_outputs(network)


def name_outputs(network: Network) -> tuple[str, ...]:
    """Return the names of the model's outputs in index order, each of which is unique.

    Classes of an ImageNet backbone have the names of WordNet; other unnamed classes their index.

    Raises:
        UsageError: the weights hold no classifier.
    """
    match, card = network.backbone.match, network.backbone.card
    if not match.head or match.head_replaced:
        found = "its weights hold no classifier that fits"
        fix = "Name a finished run, or a network with its own classifier."
        raise UsageError(f"the model {card.name}", found, fix)
    return _name_imagenet() if _is_imagenet(card) else resolve_names(card)


def require_images(network: Network) -> None:
    """Refuse a network that takes arrays: there is no image to draw on.

    Raises:
        UsageError: it does.
    """
    card = network.backbone.card
    if card.preprocessing.kind == "array":
        found = "it takes arrays, and this command draws images"
        fix = "`finetune explain filters` and `finetune explain receptive-field` need no images."
        raise UsageError(f"the model {card.name}", found, fix)
    if card.preprocessing.kind == "bands" and not (card.preprocessing.mean and card.preprocessing.std):
        found = "it was not trained on such channels, whose mean and deviation are unknown"
        fix = "Name a run that was trained on them, or set input.mean and input.std."
        raise UsageError(f"the model {card.name} with --channels", found, fix)


def find_class(classes: Sequence[str], name: str) -> int:
    """Return the index of a class.

    Args:
        classes: unique names in index order.
        name: a name, one of the synonyms of a name (``tabby`` of ``tabby, tabby cat``), or an index.

    Raises:
        UsageError: there is no such class; the message lists similar names.
    """
    if name in classes:
        return classes.index(name)
    wanted = name.strip().lower()
    found = [index for index, other in enumerate(classes) if wanted in _synonyms(other)]
    if len(found) == 1:
        return found[0]
    if name.isdecimal() and len(name) < 9 and int(name) < len(classes):
        return int(name)
    known = [*classes, *(word for other in classes for word in other.split(", "))]
    near = suggest(name, known)
    shown = ", ".join(classes) if len(classes) <= 10 else f"a name, or an index below {len(classes)}"
    raise UsageError(f"--class {name}", f"the model has no such class{near}", f"Take {shown}.")


def _synonyms(name: str) -> list[str]:
    return [word.strip().lower() for word in name.split(",")]


def _is_imagenet(card: Card) -> bool:
    """Return whether the classes are those of ImageNet-1k: both libraries publish no other 1,000 classes."""
    is_published = card.place in ("hub", "url", "package")
    return is_published and card.num_classes == 1000 and not card.label_names


def _name_imagenet() -> tuple[str, ...]:
    info = ImageNetInfo("imagenet-1k")
    return make_unique([info.index_to_description(index) for index in range(1000)])
